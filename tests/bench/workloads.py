"""What the benchmarks embed: mixes of lengths, texts of those lengths, random checkpoints.

Everything is drawn from fixed seeds, so that two runs and two systems see the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.batch import BatchLimits, Encoding
from model.tokenizer import NVEmbedTokenizer
from tests.checkpoints import write_checkpoint

SMALL = Path(__file__).parents[2] / "model" / "checkpoints" / "nv-embed-small"
MIXES = ("all-16", "all-128", "all-512", "lognormal")
_WORDS = (Path(__file__).parents[2] / "LICENSE").read_text().lower().split()


def lengths_of(mix: str, count: int) -> list[int]:
    """`count` lengths in tokens. lognormal: median 28, mean about 47, from 4 to 512."""
    if mix.startswith("all-"):
        return [int(mix.removeprefix("all-"))] * count
    assert mix == "lognormal", mix
    drawn = np.random.default_rng(5).lognormal(np.log(28), 1.0, count)
    return np.clip(drawn, 4, 512).astype(int).tolist()


def encodings_of(mix: str, count: int) -> list[Encoding]:
    generator = np.random.default_rng(6)
    return [
        Encoding(np.r_[1, generator.integers(3, 32_000, length - 2), 2].astype(np.int32))
        for length in lengths_of(mix, count)
    ]


def texts_of(tokenizer: NVEmbedTokenizer, mix: str, count: int) -> list[str]:
    """Texts of about those lengths, BOS and EOS counted, of words of the licence."""
    generator = np.random.default_rng(7)
    texts = []
    for length in lengths_of(mix, count):
        words = [str(word) for word in generator.choice(_WORDS, length)]
        (encoding,) = tokenizer.encode_batch([" ".join(words)], "", max_tokens=1 << 15)
        assert isinstance(encoding, Encoding), encoding
        share = min(1.0, length / len(encoding))
        texts.append(" ".join(words[: max(1, round(share * len(words)))]))
    return texts


def first_come_batches(encodings: Sequence[Encoding], limits: BatchLimits) -> list[list[Encoding]]:
    """Cut in the order of arrival, as the server's queue does for single-text requests."""
    batches: list[list[Encoding]] = [[]]
    for encoding in encodings:
        tokens = sum(map(len, batches[-1])) + len(encoding)
        if batches[-1] and (tokens > limits.max_tokens or len(batches[-1]) >= limits.max_seqs):
            batches.append([])
        batches[-1].append(encoding)
    return batches


def checkpoint(name: str, scratch: Path) -> Path:
    """`small`: the packaged model. A size of tests.checkpoints: a random one, written once.
    Anything else: a folder."""
    if name == "small":
        return SMALL
    if name not in ("golden", "wide", "trunk"):
        return Path(name)
    folder = scratch / name
    if not (folder / "tokenizer.json").exists():
        write_checkpoint(folder, name)
    return folder.resolve()
