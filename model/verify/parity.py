"""Steps of gpu-check that compare vectors: each precision against float32, and the parts."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model import cuda_graphs
from model.batch import Encoding
from model.errors import UnsupportedError
from model.verify import authors, structure
from model.verify.bench import Bench, precision_of
from model.verify.outcome import Check, at_least, difference, smallest_cosine
from model.verify.precisions import SlowFloat8Linear, least_cosine
from model.verify.referee import Referee
from model.verify.subject import Measured, layers_of, load, sample_encodings


def tokens(bench: Bench) -> dict[str, Any]:
    """The checkpoint's tensors, and the ids of known texts."""
    subject = bench.subject(bench.job["base"])
    tensors = authors.check_tensors(subject)
    return _checks(tensors, authors.check_example_ids(subject), authors.check_eos(subject))


def card(bench: Bench, variant: str) -> dict[str, Any]:
    """The example in the model's card."""
    subject, working = bench.loaded(variant)
    return _checks(authors.check_card(subject, working.embed))


def parts(bench: Bench, variant: str) -> dict[str, Any]:
    """What holds for every checkpoint: attention, pooler, kernels, recordings, batch-mates."""
    subject, working = bench.loaded(variant)
    checks = [
        structure.check_finite(subject, working, Measured(), variant),
        structure.check_mask(subject, working),
        structure.check_alone(subject, working),
        structure.check_pooler(subject, working),
        *structure.check_kernels(subject, working),
        *structure.check_graphs(subject, working),
    ]
    return {"attention": subject.kernel(subject.dtype)[0], **_checks(*checks)}


def backbone(bench: Bench) -> dict[str, Any]:
    """The first layers in float32 against transformers'."""
    return _checks(structure.check_backbone(bench.subject("float32")))


def bits(bench: Bench, variant: str) -> dict[str, Any]:
    """How many samples have the same bits alone as among others, and recorded as eagerly."""
    subject, working = bench.loaded(variant)
    samples = sample_encodings(subject)
    alone = np.concatenate([working.embed([encoding]) for encoding in samples])
    found = {"alone_and_together": _same_bits(alone, working.embed(samples))}
    short = [index for index, e in enumerate(samples) if len(e) <= cuda_graphs.SIZES[-1]]
    try:
        recorded = bench.recorded(variant)
    except UnsupportedError as error:
        return {**found, "recorded_and_eager": str(error)}
    rows = np.concatenate([recorded([samples[index]]) for index in short])
    return {**found, "recorded_and_eager": _same_bits(rows, alone[short])}


def _same_bits(got: NDArray[np.float32], expected: NDArray[np.float32]) -> dict[str, Any]:
    equal = (got.view(np.uint32) == expected.view(np.uint32)).all(axis=1)
    return {
        "equal": int(equal.sum()),
        "of": len(got),
        "largest_difference": difference(got, expected),
        "smallest_cosine": smallest_cosine(got, expected),
    }


def referee(bench: Bench) -> dict[str, Any]:
    """float32 vectors, layer by layer, left for the steps that compare with them."""
    subject = bench.subject("float32")
    judge = Referee(bench.source.path, bench.config, subject.device)
    wanted: list[Encoding] = sample_encodings(subject)
    example = authors.card_example(subject)
    if not isinstance(example, str):
        wanted += [*example.queries, *example.passages]
    try:
        judge.embed(wanted)  # in one pass
    except UnsupportedError as error:  # for the steps that would compare with them
        (bench.work / "float32.unsupported").write_text(str(error))
        raise
    np.save(bench.work / "float32.npy", judge.embed(sample_encodings(subject)))
    return {**_checks(authors.check_card(subject, judge.embed)), **bench.memory()}


def vectors(bench: Bench, variant: str) -> dict[str, Any]:
    """The samples' vectors in `variant`, left for `cosine`."""
    subject, working = bench.loaded(variant)
    np.save(bench.work / f"{variant}.npy", working.embed(sample_encodings(subject)))
    return {}


def cosine(bench: Bench, variant: str) -> dict[str, Any]:
    """`variant` against float32, made here if no process left it; with fused kernels also against
    the same without."""
    if not (bench.work / f"{variant}.npy").exists():
        vectors(bench, variant)
    got, exact = (_left(bench, name) for name in (variant, "float32"))
    check = at_least(
        f"{variant} and float32",
        smallest_cosine(got, exact),
        least_cosine(precision_of(variant), bench.config),
        "smallest cosine",
    )
    found: dict[str, Any] = {"cosines": np.einsum("nd,nd->n", got, exact).tolist()}
    if precision_of(variant) != variant:
        found["smallest_to_plain"] = smallest_cosine(got, _left(bench, precision_of(variant)))
    return {**found, **_checks(check)}


def _left(bench: Bench, name: str) -> NDArray[np.float32]:
    path = bench.work / f"{name}.npy"
    if (bench.work / f"{name}.unsupported").exists():
        raise UnsupportedError((bench.work / f"{name}.unsupported").read_text())
    if not path.exists():
        raise FileNotFoundError(f"there are no vectors in {name}: their step failed")
    rows: NDArray[np.float32] = np.load(path)
    return rows


def accumulation(bench: Bench) -> dict[str, Any]:
    """float8 with sums in float32, against float32 and against float8 as it serves."""
    subject = bench.subject("float8")
    bench.drop()
    layers = replace(layers_of(subject, subject.dtype, "float8"), eight_bit=SlowFloat8Linear)
    working = load(subject, subject.dtype, "float8", layers)
    rows = working.embed(sample_encodings(subject))
    fast, exact = (_left(bench, name) for name in ("float8", "float32"))
    return {
        "slow_and_float32": smallest_cosine(rows, exact),
        "fast_and_float32": smallest_cosine(fast, exact),
        "fast_and_slow": smallest_cosine(fast, rows),
    }


def _checks(*checks: Check) -> dict[str, Any]:
    return {"checks": [asdict(check) for check in checks]}
