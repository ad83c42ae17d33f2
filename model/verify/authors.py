"""Checks against what the authors published: tensors, token ids, vectors, the card's example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from model.batch import Encoding
from model.card import PUBLISHED_SCORES, read_card, read_card_text
from model.errors import CheckpointError
from model.families import Side
from model.files import read_json
from model.tokenizer import BOS_ID, EOS_ID, NVEmbedTokenizer, Truncation
from model.tokenizer_file import lowers, read_tokenizer, without_lowering
from model.verify.authors_models import KnownIds
from model.verify.outcome import Check, at_most, difference, finite, skipped, status_of
from model.verify.subject import SAMPLES, VECTOR_TOLERANCE, Loaded, Subject, prompt_of
from model.weights.checkpoint import Checkpoint

Embed = Callable[[Sequence[Encoding]], NDArray[np.float32]]
MISTRAL_PIECES = 32_000
SCORE_TOLERANCE = {torch.float32: 0.1, torch.float16: 0.5, torch.bfloat16: 1.0}
"""Of scores times 100. The published ones carry their own machine's rounding."""
_MOST_GOLDEN_BYTES = 256 << 20


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
    """Texts whose ids are known of the authors' code, and how many are left out of the pool."""
    name, family = "token ids", subject.config.family
    good, wrong, known = 0, "", _known_ids(subject)
    tokenizer, note = subject.tokenizer, "texts"
    library = read_tokenizer(subject.source.path, byte_level=family.byte_level)
    if subject.authors.vocabulary and lowers(
        library
    ):  # the authors' do not: the rest of it is compared
        tokenizer = NVEmbedTokenizer(without_lowering(library), family)
        note = "texts, without its small letters for capitals"
    for example in known:
        prompt = family.prompt(example.side, example.task)
        encoding = tokenizer.encode(example.text, prompt, max_tokens=4096)
        if (encoding.ids.tolist(), encoding.pool_start) == (example.ids, example.left_out):
            good += 1
        else:
            found = f"ids {encoding.ids.tolist()}, {encoding.pool_start} left out"
            wrong = f"a {example.side} has {found}; ids {example.ids}, {example.left_out} left out"
    return Check(name, status_of(good == len(known)), good, len(known), note=wrong or note)


def _known_ids(subject: Subject) -> Sequence[KnownIds]:
    """Those of the authors' code; with another vocabulary, or prefixes of the folder's own, what
    the library makes of prefix and text as one, behind BOS."""
    authors = subject.authors
    if authors.vocabulary:
        return authors.known
    is_mistrals = subject.tokenizer.vocab_size == MISTRAL_PIECES
    library = Tokenizer.from_file(str(subject.source.path / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    found = []
    for known in authors.known:
        prefix = _prefix(subject, known.side)
        if not is_mistrals or prefix != f"{known.side}: ":
            ids = library.encode(prefix + known.text, add_special_tokens=False).ids
            known = replace(known, ids=[BOS_ID, *ids])
        found.append(known)
    return found


def _prefix(subject: Subject, side: Side) -> str:
    """As the folder's own prompts name it, or as the authors of the family write it."""
    names = ("query",) if side == "query" else ("passage", "document")
    own = [subject.config.prompts[name] for name in names if name in subject.config.prompts]
    return own[0] if own else f"{side}: "


def check_eos(subject: Subject) -> Check:
    """Every encoding begins with BOS and ends with EOS where the family has it, also when it is cut
    where the family keeps it, and has them nowhere else."""
    authors = subject.authors
    inputs = [(side, text, 4096) for side, text in SAMPLES]
    inputs += [("passage", text, 4096) for text in ("a literal </s> in the text", "<s>")]
    inputs += [("passage", SAMPLES[4][1], 24)]
    good = 0
    for side, text, most in inputs:
        ids = subject.tokenizer.encode(
            text, prompt_of(subject, side), max_tokens=most, truncate=Truncation.END
        ).ids.tolist()
        ends = [EOS_ID] if authors.eos and (most > len(ids) or authors.keeps_eos) else []
        inner = ids[1 : len(ids) - len(ends)]
        whole = ids[0] == BOS_ID and ids[len(ids) - len(ends) :] == ends
        good += whole and not {BOS_ID, EOS_ID} & set(inner)
    return Check("BOS and EOS", status_of(good == len(inputs)), good, len(inputs), note="inputs")


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
        return skipped("golden ids", "the folder holds no golden.json, and no --golden was given")
    same = total = 0
    for case in _golden_cases(subject):
        for encoding, ids in zip(_golden_encodings(subject, case), case["token_ids"], strict=True):
            total += 1
            same += encoding.ids.tolist() == ids
    return Check("golden ids", status_of(same == total), same, total, note="texts")


def check_golden_vectors(subject: Subject, exact: Loaded | None, reason: str | None) -> Check:
    """The float32 vectors of every case of the golden file."""
    name = "golden vectors"
    if subject.golden is None:
        return skipped(name, "the folder holds no golden.json, and no --golden was given")
    if exact is None:
        return skipped(name, f"they are float32: {reason}")
    differences = []
    for case in _golden_cases(subject):
        rows = exact.embed(_golden_encodings(subject, case))
        differences.append(difference(rows, np.array(case["embeddings"], dtype=np.float32)))
    worst = float(np.max(differences))  # NaN stays NaN, and fails
    return at_most(name, worst, VECTOR_TOLERANCE, "largest difference, float32")


@dataclass(frozen=True, slots=True)
class CardExample:
    """The example of a model card as inputs, and the scores that it prints."""

    queries: list[Encoding]
    passages: list[Encoding]
    scores: list[list[float]]


def card_example(subject: Subject) -> CardExample | str:
    """The example in the model card that comes with the weights, or why there is none."""
    card = read_card_text(subject.source.path)
    if card is None:
        return "the folder holds no model card (README.md)"
    example = read_card(card)
    if example is None:
        return "the model card holds no example that can be read"
    identity = f"{subject.source.model_id} {subject.config.name}".lower()
    published = (scores for model, scores in PUBLISHED_SCORES.items() if model in identity)
    expected = example.scores or next(published, None)
    if expected is None:
        return "the model card prints no scores"
    encode = subject.tokenizer.encode
    return CardExample(
        [encode(query, example.prefix, max_tokens=32768) for query in example.queries],
        [encode(p, example.passage_prefix, max_tokens=32768) for p in example.passages],
        expected,
    )


def check_card(subject: Subject, embed: Embed) -> Check:
    """The card's example, by `embed` in the subject's precision."""
    name = "model card's example"
    example = card_example(subject)
    if isinstance(example, str):
        return skipped(name, example)
    rows = embed([*example.queries, *example.passages])
    queries, passages = np.split(rows, [len(example.queries)])
    got, expected = (queries @ passages.T) * 100, example.scores
    tolerance = 3.0 if subject.quantization != "none" else SCORE_TOLERANCE[subject.dtype]
    close = got.shape == np.shape(expected) and difference(got, np.array(expected)) <= tolerance
    shown = [[finite(round(score, 4)) for score in row] for row in got.tolist()]
    return Check(name, status_of(close), shown, expected, tolerance)
