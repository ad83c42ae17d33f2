"""Targets for every word of a text, beside the one for the whole of it.

    python -m model.training.words texts.jsonl VECTORS WORDS [--teacher FOLDER]

The teacher's vector is the mean of its last states, and so is the learner's of what its pooler
makes of its own. So the mean over a word of the one is a target for the mean over the same word of
the other: a dozen of them in a text, whatever pieces the two tokenizers cut. A word is what
stands between spaces.

VECTORS gets what `teacher` writes, from the same forwards; WORDS numbered shards too, `00000.npy`
float16 [words, W] and `00000.counts` int32, how many of them each text has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import console
from model.batch import Encoding
from model.tokenizer import BOS_ID, EOS_ID
from model.training.examples import DataError, read_texts
from model.training.teacher import Projection, Teacher, missing_shards, save_shard

_WORD_START = "\u2581"
"""What a SentencePiece vocabulary writes for the space in front of a word."""
_TOKENS_A_PASS = 4096


class WordTargets:
    """The teacher's states of the words of `texts`, projected, and where the learner's are."""

    def __init__(self, folder: Path, projection: Projection, pieces: dict[str, int]) -> None:
        """pieces: the learner's vocabulary. Raises DataError."""
        self._matrix = torch.from_numpy(projection.matrix)
        self._begins = np.zeros(max(pieces.values()) + 1, dtype=bool)
        self._begins[[i for piece, i in pieces.items() if piece.startswith(_WORD_START)]] = True
        self._begins[[BOS_ID, EOS_ID]] = True  # runs of their own
        self._shards: list[NDArray[np.float16]] = []
        self._spans: list[tuple[int, int, int]] = []  # of each text: shard, first word, behind it
        for path in sorted(folder.glob("[0-9]*.npy")):
            try:
                rows = np.load(path, mmap_mode="r", allow_pickle=False)
                with path.with_suffix(".counts").open("rb") as file:
                    ends = np.cumsum(np.load(file, allow_pickle=False)).tolist()
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{path} cannot be read: {error}") from None
            shard = len(self._shards)
            self._spans += [(shard, *pair) for pair in pairwise([0, *ends])]
            self._shards.append(rows)
        if not self._shards:
            raise DataError(f"{folder} holds no states of words (00000.npy, …)")

    def runs(self, encodings: Sequence[Encoding]) -> tuple[list[int], NDArray[np.int64]]:
        """The pooled rows of all encodings cut before each word: how long each run is, and which
        encoding it is of."""
        ids = np.concatenate([e.ids[e.pool_start :] for e in encodings])
        sizes = [len(e) - e.pool_start for e in encodings]
        begins = self._begins[ids]
        begins[np.cumsum([0, *sizes[:-1]])] = True
        lengths = np.diff([*np.flatnonzero(begins), len(ids)])
        return lengths.tolist(), np.repeat(np.arange(len(sizes)), sizes)[begins]

    def of(
        self,
        texts: Sequence[str],
        rows: Sequence[int | None],
        encodings: Sequence[Encoding],
        owners: NDArray[np.int64],
    ) -> tuple[Tensor, Tensor]:
        """(places [M] among the runs, targets [M, D]) of the words that both models read whole.

        rows: which of the teacher's texts each text is, None: of none. A text that stands behind
        an instruction has no targets, and one of which both do not see the same words.
        """
        places: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
        targets: list[NDArray[np.float16]] = [np.empty((0, len(self._matrix)), dtype=np.float16)]
        first = np.searchsorted(owners, np.arange(len(encodings) + 1))
        for at, (text, row, encoding) in enumerate(zip(texts, rows, encodings, strict=True)):
            if row is None or row >= len(self._spans) or encoding.pool_start:
                continue
            shard, begin, end = self._spans[row]
            spaced, taught = len(text.split()), end - begin
            cut = encoding.is_cut
            words = int(first[at + 1] - first[at]) - 1 - (not cut)  # without BOS and EOS
            if cut or words == spaced:
                whole = max(0, min(words - cut, taught - (taught < spaced)))
                places.append(np.arange(whole) + first[at] + 1)
                targets.append(self._shards[shard][begin : begin + whole])
        states = torch.from_numpy(np.concatenate(targets).astype(np.float32))
        return torch.from_numpy(np.concatenate(places)), states @ self._matrix


def word_loss(words: Tensor, places: Tensor, targets: Tensor) -> Tensor:
    """Mean cosine distance of the learner's words at `places` [M] to `targets` [M, D]."""
    found = words.index_select(0, places.to(words.device))
    return (1 - F.cosine_similarity(found, targets.to(words.device), dim=-1)).mean()


def of_whole_texts(words: Tensor, lengths: Sequence[int], owners: NDArray[np.int64]) -> Tensor:
    """Vectors [N, D] of length 1 of the texts' rows, from the means [W, D] of the runs of each."""
    sums = words * torch.tensor(lengths, device=words.device)[:, None]
    places = torch.from_numpy(owners).to(words.device)
    zeros = words.new_zeros(int(owners[-1]) + 1, words.shape[1])
    return F.normalize(zeros.index_add(0, places, sums), dim=-1)


class WordTeacher:
    """texts -> vectors float32 [N, W] of length 1, and of each text its words' states [n, W]."""

    def __init__(self, teacher: Teacher) -> None:
        module, *_ = teacher.network
        self._network, self._tokenizer = module.auto_model, teacher.network.tokenizer
        self._most = teacher.network.max_seq_length

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], list[NDArray[np.float32]]]:
        read = self._tokenizer(
            [text.split() for text in texts],
            is_split_into_words=True,
            truncation=True,
            max_length=self._most,
        )
        order = sorted(range(len(texts)), key=lambda place: len(read["input_ids"][place]))
        vectors = np.empty((len(texts), self._network.config.hidden_size), dtype=np.float32)
        words = [np.empty((0, 0), dtype=np.float32)] * len(texts)
        while order:
            longest = len(read["input_ids"][order[-1]])
            places = [order.pop() for _ in range(min(len(order), _TOKENS_A_PASS // longest))]
            ids = [torch.tensor(read["input_ids"][place]) for place in places]
            padded = pad_sequence(ids, batch_first=True)
            mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
            states = self._network(input_ids=padded, attention_mask=mask).last_hidden_state
            for place, rows, row in zip(places, states.float(), ids, strict=True):
                rows = rows[: len(row)]
                vectors[place] = F.normalize(rows.mean(0), dim=0).numpy()
                word_of = read.word_ids(place)  # None: of the teacher's own marks
                inside = [at for at, word in enumerate(word_of) if word is not None]
                index = torch.tensor([word_of[at] for at in inside], dtype=torch.long)
                count = int(index.max()) + 1 if inside else 0
                sums = torch.zeros(count, rows.shape[1]).index_add_(0, index, rows[inside])
                sizes = index.bincount(minlength=count).clamp(min=1)  # of a lone accent it has none
                words[place] = (sums / sizes[:, None]).numpy()
        return vectors, words


def main() -> None:
    parser = argparse.ArgumentParser(description="The teacher's states of texts and their words.")
    parser.add_argument("texts", type=Path)
    parser.add_argument("vectors", type=Path, help="as `teacher` writes them")
    parser.add_argument("words", type=Path)
    parser.add_argument("--teacher", help="folder of a sentence-transformers model of mean pooling")
    parser.add_argument("--last-text", type=int, help="the first so many texts only")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    texts = read_texts(arguments.texts)[: arguments.last_text]
    for folder in (arguments.vectors, arguments.words):
        folder.mkdir(parents=True, exist_ok=True)
    teacher = WordTeacher(Teacher(arguments.teacher))
    for path, some in missing_shards(texts, arguments.vectors):
        vectors, words = teacher.encode(some)
        counts = np.array([len(rows) for rows in words], dtype=np.int32)
        of_words = arguments.words / path.name
        save_shard(of_words.with_suffix(".counts"), counts)
        save_shard(of_words, np.concatenate(words).astype(np.float16))
        save_shard(path, vectors.astype(np.float16))  # last: then all are there


if __name__ == "__main__":
    sys.exit(console.run("words", main))
