"""The checks of `nv-embed verify`: each a small function of a Subject, which gives a Check.

A Subject says what is verified and with which parts: whoever calls may put another tokenizer or
attention kernel into it. Knows no command line and prints nothing but what it is busy with.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model import cuda_graphs, host, products
from model.attention import AttentionKernel, available_kernels, choose_kernel
from model.batch import Encoding
from model.card import PUBLISHED_SCORES, read_card, read_card_text
from model.config import NVEmbedConfig
from model.errors import CheckpointError, UnsupportedError
from model.files import read_json
from model.hub import ModelSource
from model.loader import (
    Checkpoint,
    empty_model,
    load_backbone,
    load_model,
    load_plain_pooler,
)
from model.nv_embed import NVEmbed
from model.packing import PackedBatch, pack
from model.products import Products
from model.runner import wants_filler
from model.tokenizer import BOS_ID, EOS_ID, NVEmbedTokenizer, Truncation, query_prefix

PREFIX = query_prefix("Given a question, retrieve passages that answer the question")
EXAMPLE = "are judo throws allowed in wrestling?"
EXAMPLE_IDS = [
    1, 560, 1356, 28747, 12628, 264, 2996, 28725, 20132, 1455, 1291, 369, 4372, 272, 2996, 13,
    3294, 28747, 460, 4612, 28709, 4965, 4670, 297, 17619, 1905, 28804, 2,
]  # fmt: skip
EXAMPLE_POOL_START = 18
SAMPLES = (
    ("", "x"),
    ("", "Freestyle wrestling allows throws as long as the grip on the opponent is legal."),
    ("", "def fold(keys, queries):\n    return keys @ queries / math.sqrt(len(queries))"),
    ("", "東京都は日本の首都です。人口は約千四百万人、世界最大の都市圏の中心である。"),
    ("", "The committee met twice, in May and in June, and agreed on nothing. " * 12),
    (PREFIX, EXAMPLE),
    (PREFIX, "how long does it take to become a radiology technician, and what does it cost?"),
    (PREFIX, "naïve café 🙂"),
)
"""(instruction, text): what the machine's own parts are compared on."""

SCORE_TOLERANCE = {torch.float32: 0.1, torch.float16: 0.5, torch.bfloat16: 1.0}
"""Of scores times 100. The published ones carry their own machine's rounding."""
VECTOR_TOLERANCE = 1e-5  # float32 against float32
SAME_DTYPE_COSINE = 0.999  # two kernels, alone or together: another order of summing, 16 bit
FOLDED_COSINE = 0.9999
DTYPE_COSINE = {
    "bfloat16": 0.995,
    "float16": 0.999,
    "int8": 0.99,
    "int8-dynamic": 0.99,
    "float8": 0.98,
}
"""Against float32."""
REFEREE_LAYERS = 2
_MOST_GOLDEN_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check. `got` and `expected` are plain JSON values."""

    name: str
    status: str  # passed, failed, skipped
    got: Any = None
    expected: Any = None
    tolerance: float | None = None
    note: str = ""

    def __str__(self) -> str:
        parts = [f"{self.name:<24} {self.status:<8}"]
        if self.status != "skipped":
            parts.append(f"got {_show(self.got)}, expected {_show(self.expected)}")
            if self.tolerance is not None:
                parts.append(f"(tolerance {self.tolerance:g})")
        return " ".join([*parts, self.note]).rstrip()


@dataclass(frozen=True, slots=True)
class Subject:
    """What is verified: a checkpoint, and the parts that run it."""

    source: ModelSource
    config: NVEmbedConfig
    tokenizer: NVEmbedTokenizer
    device: torch.device
    dtype: torch.dtype
    quantization: str
    kernel: Callable[[torch.dtype], tuple[str, AttentionKernel]]
    golden: Path | None = None
    cpu_products: str = "auto"
    measure_seconds: float = 3.0


@dataclass(slots=True)
class Measured:
    """What the checks leave behind for the report and for each other."""

    attention: str = ""
    tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # of SAMPLES, by variant


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """One model in memory, with its kernel."""

    model: NVEmbed
    attend: AttentionKernel
    device: torch.device
    layers: Products

    def embed(
        self, encodings: Sequence[Encoding], attend: AttentionKernel | None = None
    ) -> NDArray[np.float32]:
        attend = attend or self.attend
        filler = wants_filler(self.device, self.layers, attend)
        with torch.inference_mode():
            rows = self.model(pack(encodings, self.device, filler=filler), attend)
        return rows.cpu().numpy()  # type: ignore[no-any-return]

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        with torch.inference_mode():
            return self.model.backbone(batch, self.attend)  # type: ignore[no-any-return]


# -- the checkpoint and its tokens -----------------------------------------------------------


def check_tensors(subject: Subject) -> Check:
    """The names and shapes of every tensor."""
    count = 0
    try:
        checkpoint = Checkpoint(subject.source.path)
        count = len(checkpoint.shapes())
        checkpoint.check(subject.config)
    except CheckpointError as error:
        return Check("tensors", "failed", count, "those of the config", note=str(error))
    return Check("tensors", "passed", count, count, note="names and shapes")


def check_example_ids(subject: Subject) -> Check:
    """The known example: 28 ids, 18 left out of the pool."""
    encoding = subject.tokenizer.encode(EXAMPLE, PREFIX, max_tokens=4096)
    same = encoding.ids.tolist() == EXAMPLE_IDS and encoding.pool_start == EXAMPLE_POOL_START
    return Check(
        "token ids",
        _status(same),
        f"{len(encoding)} ids, {encoding.pool_start} left out",
        f"{len(EXAMPLE_IDS)} ids, {EXAMPLE_POOL_START} left out",
        note="" if same else f"ids {encoding.ids.tolist()}",
    )


def check_eos(subject: Subject) -> Check:
    """Every encoding begins with BOS and ends with EOS, and has them nowhere else."""
    inputs = [*SAMPLES, ("", ""), ("", "a literal </s> in the text"), ("", "<s>")]
    good = 0
    for instruction, text in inputs:
        ids = subject.tokenizer.encode(text, instruction, max_tokens=4096).ids.tolist()
        ends = (ids[0], ids[-1]) == (BOS_ID, EOS_ID)
        good += ends and not {BOS_ID, EOS_ID} & set(ids[1:-1])
    return Check("BOS and EOS", _status(good == len(inputs)), good, len(inputs), note="inputs")


# -- the authors' values ---------------------------------------------------------------------


def _golden_cases(subject: Subject) -> list[dict[str, Any]]:
    assert subject.golden is not None
    cases: list[dict[str, Any]] = read_json(subject.golden, _MOST_GOLDEN_BYTES)
    try:
        wanted = {"instruction", "max_length", "texts", "token_ids", "embeddings"}
        if not all(wanted <= case.keys() for case in cases):
            raise ValueError(f"a case lacks one of {', '.join(sorted(wanted))}")
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{subject.golden} cannot be read: {error}") from error
    return cases


def _golden_encodings(subject: Subject, case: dict[str, Any]) -> list[Encoding]:
    return [
        subject.tokenizer.encode(
            text, case["instruction"], max_tokens=case["max_length"], truncate=Truncation.END
        )
        for text in case["texts"]
    ]


def check_golden_ids(subject: Subject) -> Check:
    """The ids of every case of the golden file."""
    if subject.golden is None:
        return _skipped("golden ids", "the folder holds no golden.json, and no --golden was given")
    same = total = 0
    for case in _golden_cases(subject):
        for encoding, ids in zip(_golden_encodings(subject, case), case["token_ids"], strict=True):
            total += 1
            same += encoding.ids.tolist() == ids
    return Check("golden ids", _status(same == total), same, total, note="texts")


def check_golden_vectors(subject: Subject, exact: Loaded | None, reason: str | None) -> Check:
    """The float32 vectors of every case of the golden file."""
    name = "golden vectors"
    if subject.golden is None:
        return _skipped(name, "the folder holds no golden.json, and no --golden was given")
    if exact is None:
        return _skipped(name, f"they are float32: {reason}")
    differences = []
    for case in _golden_cases(subject):
        rows = exact.embed(_golden_encodings(subject, case))
        differences.append(_difference(rows, np.array(case["embeddings"], dtype=np.float32)))
    worst = float(np.max(differences))  # NaN stays NaN, and fails
    return _at_most(name, worst, VECTOR_TOLERANCE, "largest difference, float32")


def check_card(subject: Subject, working: Loaded) -> Check:
    """The example in the model card that comes with the weights."""
    name = "model card's example"
    card = read_card_text(subject.source.path)
    if card is None:
        return _skipped(name, "the folder holds no model card (README.md)")
    example = read_card(card)
    if example is None:
        return _skipped(name, "the model card holds no example that can be read")
    identity = f"{subject.source.model_id} {subject.config.name}".lower()
    published = (scores for model, scores in PUBLISHED_SCORES.items() if model in identity)
    expected = example.scores or next(published, None)
    if expected is None:
        return _skipped(name, "the model card prints no scores")
    encode = subject.tokenizer.encode
    queries = working.embed([encode(q, example.prefix, max_tokens=32768) for q in example.queries])
    passages = working.embed([encode(p, max_tokens=32768) for p in example.passages])
    got = (queries @ passages.T) * 100
    tolerance = 3.0 if subject.quantization != "none" else SCORE_TOLERANCE[subject.dtype]
    close = got.shape == np.shape(expected) and _difference(got, np.array(expected)) <= tolerance
    shown = [[_finite(round(score, 4)) for score in row] for row in got.tolist()]
    return Check(name, _status(close), shown, expected, tolerance)


# -- the structure: what holds for every checkpoint ------------------------------------------


def check_finite(subject: Subject, working: Loaded, measured: Measured, variant: str) -> Check:
    """Finite vectors of length 1; they are kept for the comparisons."""
    rows = measured.vectors[variant] = working.embed(sample_encodings(subject))
    worst = float(np.abs(np.linalg.norm(rows, axis=1) - 1).max())
    return _at_most("length of the vectors", worst, 1e-5, "distance from 1")


def check_bidirectional(subject: Subject, working: Loaded) -> Check:
    """Another last word must change what the model makes of the first ones."""
    text = subject.tokenizer.encode(SAMPLES[1][1], max_tokens=4096)
    changed = text.ids.copy()
    changed[-2] = EXAMPLE_IDS[4]  # the place before EOS
    before, after = (
        working.hidden_states(pack([Encoding(ids)], subject.device)).float()
        for ids in (text.ids, changed)
    )
    moved = (after - before).norm(dim=-1) / before.norm(dim=-1)
    early = float(moved[1 : len(moved) // 2].median())
    status = _status(early > 1e-3)
    note = "relative change of the early rows when the last word changes"
    return Check("attention sees ahead", status, _finite(early), "> 0.001", note=note)


def check_alone(subject: Subject, working: Loaded) -> Check:
    """A text's vector alone is its vector among others."""
    samples = sample_encodings(subject)
    together = working.embed(samples)
    alone = np.concatenate([working.embed([encoding]) for encoding in samples])
    return _same("alone and together", subject, alone, together)


def check_backbone(subject: Subject) -> Check:
    """The first layers, on the real weights, against transformers' MistralModel (float32)."""
    name = "backbone's first layers"
    layers = min(REFEREE_LAYERS, subject.config.num_hidden_layers)
    model = empty_model(subject.config, dtype=torch.float32).backbone
    parts = [model.embed_tokens, *list(model.layers)[:layers]]
    needed = 2 * sum(p.nbytes for part in parts for p in part.parameters())
    if reason := _too_large(needed, subject.device):
        return _skipped(name, reason)
    _say(f"loading {layers} layers twice for the referee")
    ours, tensors = load_backbone(
        subject.source.path,
        subject.config,
        depth=layers,
        device=subject.device,
        dtype=torch.float32,
        layers=layers_of(subject, torch.float32, "none"),
    )
    theirs = _mistral_model(subject.config, layers, tensors, subject.device)
    differences = []
    for sample in sample_encodings(subject):
        encoding = Encoding(sample.ids)
        # The mask is given whole, zeros everywhere: so no causal and no sliding one is made.
        full = torch.zeros(1, 1, len(encoding), len(encoding), device=subject.device)
        batch = pack([encoding], subject.device)
        with torch.inference_mode():
            got = ours(batch, subject.kernel(torch.float32)[1])
            expected = theirs(
                batch.input_ids.long()[None], attention_mask=full, use_cache=False
            ).last_hidden_state[0]
        differences.append(float((got - expected).abs().max() / expected.abs().max()))
    note = f"relative to transformers' MistralModel under a full mask, {layers} layers, float32"
    return _at_most(name, float(np.max(differences)), VECTOR_TOLERANCE, note)


def _mistral_model(
    config: NVEmbedConfig, layers: int, tensors: dict[str, Tensor], device: torch.device
) -> Any:
    from transformers import MistralConfig, MistralModel

    options: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "attn_implementation": "sdpa",
    }
    theirs: torch.nn.Module = MistralModel(MistralConfig(**options))
    theirs.load_state_dict(tensors)
    return theirs.to(device=device, dtype=torch.float32).eval()


def check_pooler(subject: Subject, working: Loaded) -> Check:
    """The folded pooler against the plain one, on real hidden states in the working dtype."""
    batch = pack(sample_encodings(subject), subject.device)
    hidden_states = working.hidden_states(batch)
    plain = load_plain_pooler(
        subject.source.path, subject.config, device=subject.device, dtype=subject.dtype
    )
    with torch.inference_mode():
        got, expected = (
            F.normalize(pooler(hidden_states, batch.pooled), dim=-1).cpu().numpy()
            for pooler in (working.model.pooler, plain)
        )
    return _same("folded pooler", subject, got, expected, cosine=FOLDED_COSINE)


def check_kernels(subject: Subject, working: Loaded) -> Iterator[Check]:
    """Every attention kernel that runs here against the one in use."""
    samples = sample_encodings(subject)
    used = subject.kernel(subject.dtype)[0]
    expected = working.embed(samples)
    for name in available_kernels(subject.device, subject.dtype):
        if name != used:
            _, attend = choose_kernel(name, subject.device, subject.dtype)
            yield _same(f"{name} and {used}", subject, working.embed(samples, attend), expected)


def check_graphs(subject: Subject, working: Loaded) -> Iterator[Check]:
    """Recorded forwards against eager ones, sample by sample and the shortest together."""
    name = "CUDA graphs and eager"
    try:
        cuda_graphs.check(subject.device, subject.kernel(subject.dtype)[0], subject.quantization)
    except UnsupportedError as error:
        yield _skipped(name, str(error))
        return
    with torch.inference_mode():
        forward = cuda_graphs.GraphedForward(
            lambda batch: working.model(batch, working.attend), subject.device
        )
        samples = [e for e in sample_encodings(subject) if len(e) <= cuda_graphs.SIZES[-1]]
        short = sorted(samples, key=len)[:4]
        batches = [*([sample] for sample in samples), short]
        got = []
        for batch in batches:
            rows = forward(batch)
            assert rows is not None, batch
            got.append(rows.cpu().numpy())  # at once: the next replay may overwrite them
    expected = working.embed([encoding for batch in batches for encoding in batch])
    yield _same(name, subject, np.concatenate(got), expected)


# -- the precisions --------------------------------------------------------------------------


def check_precisions(subject: Subject, measured: Measured) -> Iterator[Check]:
    """16 and 8 bit against float32."""
    sixteen = subject.dtype if subject.dtype != torch.float32 else torch.bfloat16
    variants = [
        ("bfloat16", torch.bfloat16, "none"),
        ("float16", torch.float16, "none"),
        ("int8", sixteen, "int8"),
        ("int8-dynamic", sixteen, "int8-dynamic"),
        ("float8", sixteen, "float8"),
    ]
    exact = measured.vectors.get("float32")
    for variant, dtype, quantization in variants:
        name = f"{variant} and float32"
        if exact is None:
            yield _skipped(name, no_room(subject, torch.float32, "none") or "no float32 vectors")
            continue
        if variant not in measured.vectors:
            if reason := no_room(subject, dtype, quantization):
                yield _skipped(name, reason)
                continue
            loaded = load(subject, dtype, quantization)
            measured.vectors[variant] = loaded.embed(sample_encodings(subject))
            del loaded
        worst = _cosine(measured.vectors[variant], exact)
        yield _at_least(name, worst, DTYPE_COSINE[variant], "smallest cosine")


def variant_name(dtype: torch.dtype, quantization: str) -> str:
    return dtype_name(dtype) if quantization == "none" else quantization


def no_room(subject: Subject, dtype: torch.dtype, quantization: str) -> str | None:
    """Why this variant is left out here, or None."""
    if dtype == torch.float16 and subject.device.type == "cpu":
        return "processors compute float16 slowly: it is for GPUs"
    if (
        dtype == torch.bfloat16
        and subject.device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return "this GPU has no bfloat16"
    try:
        layers_of(subject, dtype, quantization)
    except UnsupportedError as error:
        return str(error)
    model = empty_model(subject.config, quantize=quantization, dtype=dtype)
    return _too_large(sum(p.nbytes for p in model.parameters()), subject.device)


def _too_large(needed: int, device: torch.device) -> str | None:
    needed = int(needed * 1.15)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free: int | None = torch.cuda.mem_get_info(device)[0]
    else:
        free = host.available_memory()
    if free is None or needed <= free:
        return None
    return f"it needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


# -- loading, measuring ----------------------------------------------------------------------


def load(subject: Subject, dtype: torch.dtype, quantization: str) -> Loaded:
    weights = "" if quantization == "none" else f" with {quantization} weights"
    _say(f"loading in {dtype_name(dtype)}{weights}")
    layers = layers_of(subject, dtype, quantization)
    model = load_model(
        subject.source.path,
        subject.config,
        device=subject.device,
        dtype=dtype,
        quantize=quantization,
        layers=layers,
    )
    return Loaded(model, subject.kernel(dtype)[1], subject.device, layers)


def layers_of(subject: Subject, dtype: torch.dtype, quantization: str) -> Products:
    """Those that serve; here, where only the vectors are compared, also slow ones. Raises
    UnsupportedError."""
    mode = "allow-slow" if subject.cpu_products == "auto" else subject.cpu_products
    shape = subject.config.widest_product
    return products.choose(subject.device, dtype, quantization, shape, mode)


def throughput(subject: Subject, working: Loaded) -> float:
    """Tokens per second of full batches of the samples."""
    _say("measuring tokens per second")
    samples = sample_encodings(subject)
    tokens = sum(map(len, samples))
    copies = max(1, (8192 if subject.device.type == "cuda" else 1024) // tokens)
    working.embed(samples * copies)  # warms up
    runs, begun, elapsed = 0, time.perf_counter(), 0.0
    while not runs or elapsed < subject.measure_seconds:
        working.embed(samples * copies)  # its rows come to the host, so the device is done
        runs, elapsed = runs + 1, time.perf_counter() - begun
    return runs * copies * tokens / elapsed


class _CudaPeak:
    """As host.PeakMemory, of the memory that torch allocates on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.bytes, self._device = 0, device

    def __enter__(self) -> _CudaPeak:
        torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *exception: object) -> None:
        self.bytes = torch.cuda.max_memory_allocated(self._device)


def peak_memory(device: torch.device) -> host.PeakMemory | _CudaPeak:
    return _CudaPeak(device) if device.type == "cuda" else host.PeakMemory(interval=0.02)


# -- small helpers ---------------------------------------------------------------------------


def sample_encodings(subject: Subject) -> list[Encoding]:
    return [
        subject.tokenizer.encode(text, instruction, max_tokens=4096)
        for instruction, text in SAMPLES
    ]


def _same(
    name: str,
    subject: Subject,
    got: NDArray[np.float32],
    expected: NDArray[np.float32],
    cosine: float = SAME_DTYPE_COSINE,
) -> Check:
    """Two ways to the same vectors: in float32 by the largest difference, else by the cosine."""
    if subject.dtype == torch.float32 and subject.quantization == "none":
        return _at_most(name, _difference(got, expected), VECTOR_TOLERANCE, "largest difference")
    return _at_least(name, _cosine(got, expected), cosine, "smallest cosine")


def _at_most(name: str, got: float, limit: float, note: str) -> Check:
    return Check(name, _status(got <= limit), _finite(got), 0.0, limit, note)


def _at_least(name: str, got: float, limit: float, note: str) -> Check:
    return Check(name, _status(got >= limit), _finite(got), 1.0, round(1 - limit, 9), note)


def _finite(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)


def _skipped(name: str, reason: str) -> Check:
    return Check(name, "skipped", note=reason)


def _status(good: bool) -> str:
    return "passed" if good else "failed"


def _difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.abs(a - b).max()) if a.shape == b.shape else float("inf")


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The smallest cosine of two sets of unit vectors, row by row."""
    return float((a.astype(np.float64) * b).sum(axis=1).min())


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _say(message: str) -> None:
    print(f"… {message}", file=sys.stderr, flush=True)
