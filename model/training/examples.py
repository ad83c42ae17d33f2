"""Training data: JSON lines, one example each, and how an example becomes prompts.

    {"query": "…", "positive": "…", "negatives": ["…"], "task": "…", "symmetric": false}
    {"text": "…"}
    {"first": "…", "second": "…", "score": 3.5, "task": "…"}

`task` is the description that stands in the instruction, "Instruct: {task}\\nQuery: "; absent or
empty means no instruction. `symmetric` puts the instruction on the positive and the negatives
too (STS). `negatives` may be absent. The second form is a text for distillation alone, the third
two texts of the same side and how alike people find them, on any scale. The keys of IGNORED may
stand there, too; any other is refused, for it may be one of these misspelt. Knows no tensors.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import user_files
from model.errors import FileError, ModelError, did_you_mean
from model.families import Side
from model.files import without_repetition


class DataError(ModelError):
    """A training or evaluation file is not what it should be; names the file and the line."""


IGNORED = ("id", "_id", "source", "meta", "metadata")
"""Keys and columns that a file may have for its owner: of what it is made, not what it says."""
_EXAMPLE = ("query", "positive", "negatives", "task", "symmetric")
_LARGEST_SCORE = 1e9
_SCORED = ("first", "second", "score", "task")


@dataclass(frozen=True, slots=True)
class Example:
    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    task: str = ""
    symmetric: bool = False

    @property
    def passage_asked(self) -> tuple[Side, str]:
        """The side of its positive and its negatives, and the task that they get described."""
        return ("query", self.task) if self.symmetric else ("passage", "")


@dataclass(frozen=True, slots=True)
class ScoredPair:
    first: str
    second: str
    score: float  # on the scale of its file; more is more alike
    task: str = ""


HELD_OUT = 100
"""One text in so many is never trained on."""


def is_held_out(text: str) -> bool:
    """Whether a text is for validation: by its hash, so alike in every file, stage and run."""
    return zlib.crc32(text.encode()) % HELD_OUT == 1


def read_examples(path: Path) -> list[Example]:
    """Every line of a JSON lines file. Raises DataError naming the first bad line."""
    return [_example(row, path, number) for number, row in read_rows(path, _EXAMPLE)]


def read_texts(path: Path) -> list[str]:
    """The `text` of every line. Raises DataError naming the first bad line."""
    rows = read_rows(path, ("text",))
    return [text_of(row, "text", f"{path}, line {number}") for number, row in rows]


def read_scored(path: Path) -> list[ScoredPair]:
    """Every line of a file of scored pairs. Raises DataError naming the first bad line."""
    return [_scored(row, f"{path}, line {number}") for number, row in read_rows(path, _SCORED)]


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A whole file, its line ends as they are. Raises DataError naming the file."""
    try:
        if encoding == "utf-8":
            return user_files.read_text(path)
        with user_files.open_regular(path) as file:
            return file.read().decode(encoding)
    except FileError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def read_lines(path: Path, encoding: str = "utf-8") -> list[str]:
    """The lines of a text file, without their ends, and without blank ones behind the last.

    Raises DataError naming the file.
    """
    text = read_text(path, encoding).replace("\r\n", "\n")
    # Not splitlines(): it also cuts at U+2028 and the like, which JSON leaves in texts.
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Before hours of work: that `path` can be written, and is none of the files that are read.

    Raises DataError.
    """
    try:
        user_files.check_output(path, inputs)
        tempfile.TemporaryFile(dir=path.parent).close()
    except FileError as error:
        raise DataError(str(error)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path} cannot be written: {why}") from None


def write_examples(path: Path, examples: Iterable[Example], made_of: Path | None = None) -> int:
    """JSON lines; the number of examples. The file appears when the last of them is written, as
    private as what it is `made_of`. Raises OSError."""
    count = 0
    with user_files.replacing(
        path, user_files.mode_like(made_of.stat().st_mode if made_of else None)
    ) as file:
        for example in examples:
            row: dict[str, Any] = {"query": example.query, "positive": example.positive}
            if example.negatives:
                row["negatives"] = list(example.negatives)
            if example.task:
                row["task"] = example.task
            if example.symmetric:
                row["symmetric"] = True
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_rows(path: Path, known: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line, which has no keys but `known` and those of IGNORED.

    Raises DataError naming the file and the line.
    """
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line, object_pairs_hook=without_repetition)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{path}, line {number}: half of a surrogate pair, as of an emoji that was cut"
            ) from None
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
        except RecursionError:
            raise DataError(f"{path}, line {number}: nested too deeply") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: not a JSON object")
        check_names("key", row, known, f"{path}, line {number}")
        yield number, row


def check_names(kind: str, found: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raises DataError for a name that is neither known nor to be ignored."""
    for name in found:
        if name not in known and name not in IGNORED:
            near = did_you_mean(name, known) or next(
                (f"; did you mean {full}?" for full in known if full.startswith(name)), ""
            )
            names = f"Known: {', '.join(known)}; ignored: {', '.join(IGNORED)}"
            raise DataError(f"{where}: unknown {kind} {name!r}{near or '.'} {names}")


def _example(row: dict[str, Any], path: Path, number: int) -> Example:
    negatives = row.get("negatives")
    negatives = [] if negatives is None else negatives
    if not isinstance(negatives, list) or not all(isinstance(n, str) and n for n in negatives):
        raise DataError(f"{path}, line {number}: negatives is not a list of texts")
    task = _task(row, f"{path}, line {number}")
    symmetric = row.get("symmetric", False)
    if not isinstance(symmetric, bool):
        raise DataError(f"{path}, line {number}: symmetric is not true or false")
    query = text_of(row, "query", f"{path}, line {number}")
    positive = text_of(row, "positive", f"{path}, line {number}")
    return Example(query, positive, tuple(negatives), task, symmetric)


def _scored(row: dict[str, Any], where: str) -> ScoredPair:
    score = row.get("score")
    if not isinstance(score, int | float) or isinstance(score, bool):
        raise DataError(f"{where}: score is {'missing' if score is None else 'not a number'}")
    if not abs(score) <= _LARGEST_SCORE:
        raise DataError(f"{where}: score is no number up to {_LARGEST_SCORE:g}")
    first, second = (text_of(row, key, where) for key in ("first", "second"))
    return ScoredPair(first, second, float(score), _task(row, where))


def _task(row: dict[str, Any], where: str) -> str:
    task = row.get("task")
    task = "" if task is None else task
    if not isinstance(task, str):
        raise DataError(f"{where}: task is not a text")
    return task


def text_of(row: dict[str, Any], key: str, where: str) -> str:
    """A text of a row that is not empty. Raises DataError."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        what = "empty" if isinstance(value, str) else "not a text"
        what = what if key in row else "missing"
        raise DataError(f"{where}: {key} is {what}")
    return value
