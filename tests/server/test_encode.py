"""`nv-embed encode`: files in, files out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from server import cli
from tests.checkpoints import golden_cases

CASES = {case["name"]: case for case in golden_cases()}
QUERY_PREFIX = CASES["readme queries"]["instruction"]


def encode(model: Path, *arguments: object) -> int:
    options = ["--model", str(model), "--device", "cpu", "--dtype", "float32"]
    return cli.main(["encode", *map(str, arguments), *options])


def test_text_to_npy(golden_checkpoint: Path, tmp_path: Path) -> None:
    case = CASES["passages"]
    file = tmp_path / "passages.txt"
    file.write_text("\n".join(case["texts"]))
    assert encode(golden_checkpoint, file) == 0
    vectors = np.load(tmp_path / "passages.npy")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, case["embeddings"], rtol=0, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["passages.npy", "passages.txt"]


@pytest.mark.parametrize(
    "how", [("--task", "NQ"), ("--input-type", "query"), ("--prompt", QUERY_PREFIX)]
)
def test_json_lines_to_json_lines(
    golden_checkpoint: Path, tmp_path: Path, how: tuple[str, str]
) -> None:
    case = CASES["readme queries"]
    file, output = tmp_path / "queries.jsonl", tmp_path / "out.jsonl"
    first, second = case["texts"]
    file.write_text(json.dumps({"id": 7, "question": first}) + "\n" + json.dumps(second) + "\n")
    assert encode(golden_checkpoint, file, "-o", output, "--field", "question", *how) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1]
    got = [line["embedding"] for line in lines]
    np.testing.assert_allclose(got, case["embeddings"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "one\n\nthree\n", "a.txt, line 2: the text is empty"),
        ("a.txt", "", "a.txt holds no text"),
        ("a.txt", "ok\ncaf\udce9\n", "a.txt, line 2: not UTF-8: convert the file first"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2: no field 'text' (--field names it)"),
        ("a.jsonl", '{"text": 5}\n', "line 1: expected a string"),
        ("a.jsonl", "{\n", "line 1: "),
        ("a.txt", "ok\n" + "word " * 40_000, "a.txt, line 2: the input has 40003 tokens"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_left_behind(
    golden_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: str,
    message: str,
) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert encode(golden_checkpoint, tmp_path / name) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "there is no file missing.txt"),
        (["FILE", "-o", "out.csv"], "write to .npy or .jsonl"),
        (["JSONL", "-o", "JSONL"], "a.jsonl is the input file"),
        (["FILE", "--devices", "cpu"], "unrecognized argument --devices; did you mean --device?"),
        (["FILE", "--task", "nope"], "unknown task 'nope'"),
        (["FILE", "-o", "/no/such/folder/x.npy"], "there is no folder"),
    ],
)
def test_mistakes(
    golden_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    files = {"FILE": tmp_path / "a.txt", "JSONL": tmp_path / "a.jsonl"}
    for file in files.values():
        file.write_text('"x"\n')
    arguments = [str(files.get(a, a)) for a in arguments]
    assert encode(golden_checkpoint, *arguments) == 2
    assert message in capsys.readouterr().err
