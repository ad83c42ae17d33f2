"""The model card is a courtesy: nothing that stands in README.md stops a server."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from model.card import card_license, read_card, read_card_text

CARD = "---\nlicense: cc-by-nc-4.0\nlanguage:\n- en\n---\n# NV-Embed\n"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (CARD, "cc-by-nc-4.0"),
        (CARD.replace("\n", "\r\n"), "cc-by-nc-4.0"),
        ("---\n'license' : \"mit\" # so far\n---\n", "mit"),
        ("---\nmodel-index:\n- name: [\nlicense: mit\n---\n", "mit"),  # the rest may be malformed
        ("# no front matter", None),
        ("---\n[\n---\n", None),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nlicense: 2001-99-99\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.getcwd []\n---\n", None),
        ("---\nlicense: " + "[" * 50_000 + "\n---\n", None),
        ("---\nlicense:\n---\n", None),
        ("---\n" + "\n" * 500_000, None),
        ("", None),
        (None, None),
    ],
)
def test_the_licence_of_a_card(tmp_path: Path, card: str | None, expected: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card, newline="")
    assert card_license(tmp_path) == expected


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8-sig", "cc-by-nc-4.0"),
        ("latin-1", None),
        ("utf-16", None),
        ("utf-16-le", None),
        ("cp037", None),
    ],
)
def test_cards_in_other_encodings(tmp_path: Path, encoding: str, expected: str | None) -> None:
    (tmp_path / "README.md").write_bytes((CARD + "Modèle\n").encode(encoding))
    assert card_license(tmp_path) == expected


def test_what_is_no_card(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    os.mkfifo(card)
    assert card_license(tmp_path) is None
    card.unlink()
    card.mkdir()
    assert card_license(tmp_path) is None
    card.rmdir()
    for target in ("/dev/zero", "absent", "README.md"):
        card.symlink_to(target)
        assert card_license(tmp_path) is None
        card.unlink()


def test_of_a_huge_card_the_beginning_is_read(tmp_path: Path) -> None:
    with (tmp_path / "README.md").open("wb") as file:
        file.write((CARD + "a").encode() + "é".encode() * 600_000)  # cut within a character
        file.truncate(1 << 30)
    assert card_license(tmp_path) == "cc-by-nc-4.0"
    text = read_card_text(tmp_path)
    assert text is not None
    assert len(text.encode()) <= 1 << 20


EXAMPLE = """```python
query_prefix = "Instruct: "
queries = ["a", "b"]
passages = ["c", "d"]
print(scores)
# {scores}
```
"""


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ("[[1.5, 2], [3, 4]]", [[1.5, 2], [3, 4]]),
        ("[[1 2]]", None),
        ("[[1, 2], [3]]", None),
        ("[[1], 2]", None),
        ("[[[1]]]", None),
        ("[[1]][[0]]", None),
        ("[[" + "[" * 5000 + "]]", None),
    ],
)
def test_the_scores_of_an_example(scores: str, expected: list[list[float]] | None) -> None:
    example = read_card(EXAMPLE.replace("{scores}", scores))
    assert example is not None
    assert (example.queries, example.scores) == (["a", "b"], expected)


OF_TEMPLATES = """```python
def get_detailed_instruct(task_description: str, query: str) -> str:
    return {returned}
task = "T"
queries = [get_detailed_instruct(task, "a"), get_detailed_instruct(task, "b")]
documents = ["c", "d"]
# [[86.7, 36.6], [35.0, 82.1]]
```"""


@pytest.mark.parametrize(
    ("returned", "first"),
    [
        (r"f'Instruct: {task_description}\nQuery: {query}'", "Instruct: T\nQuery: a"),
        ("'Instruct: ' + task_description + '\\nQuery: ' + query", "Instruct: T\nQuery: a"),
        (r"f'Instruct: {query}\nQuery: {task_description}'", "Instruct: a\nQuery: T"),
        (r"f'<instruct>{task_description}\n<query>{query}'", None),
        (r"f'Instruct: {task_description!r}\nQuery: {query}'", None),
        (r"f'Instruct: {task_description.strip()}\nQuery: {query}'", None),
        (r"f'Instruct: {elsewhere}\nQuery: {query}'", None),
        ("get_detailed_instruct(task_description, query)", None),
    ],
)
def test_a_function_of_a_card_is_read_as_it_stands(returned: str, first: str | None) -> None:
    """By any name; templates that are not those of NV-Embed and e5-mistral are left alone."""
    for name in ("get_detailed_instruct", "with_task"):
        card = OF_TEMPLATES.replace("{returned}", returned).replace("get_detailed_instruct", name)
        example = read_card(card)
        assert (example.queries[0] if example else None) == first
    assert read_card(OF_TEMPLATES.replace("def get_detailed_instruct", "def another")) is None


def test_what_is_assigned_anew_is_no_longer_what_it_was() -> None:
    for line in (
        'passages = [f"passage: {p}" for p in passages]',
        "passages += ['c']",
        "passages, other = load()",
        "for passages in load(): pass",
    ):
        changed = EXAMPLE.replace("print", f"{line}\nprint", 1)
        assert read_card(changed) is None, line


def test_the_prefix_of_passages() -> None:
    for name in ("passage_prefix", "document_prefix"):
        example = read_card(EXAMPLE.replace("queries", f'{name} = "passage: "\nqueries', 1))
        assert example is not None
        assert example.passage_prefix == "passage: "


def test_functions_of_functions_end_soon() -> None:
    """Each level would double the work."""
    lines = ["def f0(x):\n    return f'{x}{x}'"]
    lines += [f"def f{n}(g, x):\n    return g(x) + g(x)" for n in range(1, 40)]
    calls = "x = " + "f1(f0, " * 30 + "''" + ")" * 30
    started = time.monotonic()
    assert read_card(EXAMPLE.replace("query_prefix", "\n".join([*lines, calls, "query_prefix"]), 1))
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "line",
    [
        "x = [1][5]",
        "x = {}['a']",
        "x = 'a' + 1",
        "x = " + "(" * 5000,
        "x = " + "+".join(["'a'"] * 20_000),
        "x = '\0'",
        "x = 'aaaaaaaa'\n" + "x = x + x\n" * 60,
        "x = 'aaaaaaaa'\n" + "x = f'{x}{x}'\n" * 60,
        "def f(x):\n    return f'{x}{x}'\nx = 'aaaaaaaa'\n" + "x = f(x)\n" * 60,
        "def f():\n    return f()\nx = f()",
    ],
)
def test_code_that_is_no_example(line: str) -> None:
    """Read, not run; and it neither fails nor takes all memory."""
    example = read_card(EXAMPLE.replace("query_prefix", f"{line}\nquery_prefix", 1))
    assert example is None or example.queries == ["a", "b"]
