"""What each program of examples/ is run with and what it must print, wherever it runs.

Knows not by which Python: the gate's (tests/test_examples.py), or one of an environment that holds
nothing but what the page says to install (test_clean.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.server.processes import ROOT

EXAMPLES = ROOT / "examples"
PAGE = (EXAMPLES / "README.md").read_text()
PROGRAMS = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh"))
ANSWER = "The canteen opens at noon."
Check = Callable[[list[str], Path], None]
"""Of the lines that it printed and the folder it wrote to."""


@dataclass(frozen=True, slots=True)
class Case:
    """arguments: FOLDER stands for one of the test's own."""

    arguments: tuple[str, ...]
    check: Check
    needs_server: bool = True


def prints(*expected: str) -> Check:
    def check(lines: list[str], folder: Path) -> None:
        assert lines == list(expected)

    return check


def ranks_the_answer_first(lines: list[str], folder: Path) -> None:
    scores = [float(line.split()[0]) for line in lines]
    assert len(lines) == 3
    assert scores == sorted(scores, reverse=True)
    assert lines[0].endswith(f"  {ANSWER}")


def finds_the_paragraph(lines: list[str], folder: Path) -> None:
    assert len(lines) == 3
    assert re.fullmatch(r"0\.\d+  canteen\.txt: Lunch is served from noon .*", lines[0]), lines


def finds_the_pairs(lines: list[str], folder: Path) -> None:
    pairs = [tuple(map(int, re.findall(r"row (\d+): ", line))) for line in lines]
    assert set(pairs) == {(8, 10), (7, 9), (1, 4), (2, 5)}, lines


def groups_the_topics(lines: list[str], folder: Path) -> None:
    """The file holds four lines each of sport, cooking and space, in that order."""
    notes = (EXAMPLES / "notes.txt").read_text().splitlines()
    groups = [set(part.splitlines()[1:]) for part in "\n".join(lines).split("group ")[1:]]
    found = {frozenset(line.strip() for line in group) for group in groups}
    assert found == {frozenset(notes[start : start + 4]) for start in (0, 4, 8)}
    assert (folder / "clusters.png").read_bytes().startswith(b"\x89PNG")


def writes_a_row_for_each_line(lines: list[str], folder: Path) -> None:
    assert lines == ["3 rows in texts.npy", "(3, 256)"]
    rows = np.load(folder / "texts.npy")
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


CONTEXT = prints(*f"Answer from this: {ANSWER}\nQuestion: when is lunch served?".split("\n"))
CASES = {
    "openai_client.py": Case((), prints(ANSWER)),
    "semantic_search.py": Case(("FOLDER/texts", "when can I eat?"), finds_the_paragraph),
    "duplicates.py": Case(("examples/questions.csv", "question"), finds_the_pairs),
    "clusters.py": Case(("examples/notes.txt", "3", "FOLDER/clusters.png"), groups_the_topics),
    "langchain_retrieval.py": Case(
        (), prints(f"Human: Answer from this: {ANSWER}", "Question: when is lunch served?")
    ),
    "llama_index_retrieval.py": Case((), CONTEXT),
    "pgvector_store.py": Case((), ranks_the_answer_first),
    "lancedb_store.py": Case(("FOLDER/lance",), ranks_the_answer_first),
    "bulk_encode.sh": Case(("FOLDER",), writes_a_row_for_each_line, needs_server=False),
    "batch_file.sh": Case(
        ("FOLDER",),
        prints("2 rows in answers.jsonl", "q1 200 1", "p1 200 2"),
        needs_server=False,
    ),
}


def packages_of(name: str) -> list[str]:
    """What the page says to install for a program, as the words behind `pip install`."""
    (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| [{name}]("))
    installs = re.search(r"\| `pip install ([^`]+)` \|$", row)
    return [word.strip('"') for word in installs[1].split()] if installs else []
