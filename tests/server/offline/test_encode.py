"""`nv-embed encode`: files in, files out."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from model.config import ModelConfig
from model.prompts import written
from server import cli
from server.offline import call
from tests.checkpoints import golden_cases
from tests.model.test_siblings import usable
from tests.siblings import SIBLINGS, write_sibling
from tests.siblings import golden_cases as golden_cases_of

pytestmark = pytest.mark.whole

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
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["passages.npy", "passages.npy.manifest.json", "passages.txt"]


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


def test_parquet_to_parquet_and_to_shards(golden_checkpoint: Path, tmp_path: Path) -> None:
    case = CASES["passages"]
    file, output, folder = tmp_path / "in.parquet", tmp_path / "out.parquet", tmp_path / "shards"
    parquet.write_table(pyarrow.table({"body": case["texts"]}), file)
    options = (file, "--field", "body", "--shard-size", "1")
    assert encode(golden_checkpoint, *options, "-o", output) == 0
    table = parquet.read_table(output)
    assert table.column("index").to_pylist() == [0, 1]
    got = table.column("embedding").to_pylist()
    np.testing.assert_allclose(got, case["embeddings"], rtol=0, atol=1e-5)
    assert encode(golden_checkpoint, *options, "-o", folder, "--format", "jsonl") == 0
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["manifest.json", "part-00000-00000.jsonl", "part-00000-00001.jsonl"]
    assert json.loads((folder / names[2]).read_text())["index"] == 1


def test_an_unknown_column_is_named(
    golden_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "in.parquet")
    assert encode(golden_checkpoint, tmp_path / "in.parquet") == 1
    assert "has no column 'text' (--field names it); it has body" in capsys.readouterr().err


def test_an_openai_batch_file(golden_checkpoint: Path, tmp_path: Path) -> None:
    queries, passages = CASES["readme queries"], CASES["passages"]
    bodies = [
        {"model": "golden-embed-query", "input": queries["texts"][0]},
        {"model": "golden-embed", "input": passages["texts"], "encoding_format": "float"},
        {"model": "golden-embed", "input": passages["token_ids"], "token_ids": "model"},
        {"model": "another", "input": "x"},
        {"model": "golden-embed", "input": ""},
    ]
    file = tmp_path / "batch.jsonl"
    common = {"method": "POST", "url": "/v1/embeddings"}
    lines = [{"custom_id": f"c{i}", **common, "body": body} for i, body in enumerate(bodies)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert encode(golden_checkpoint, file, "--openai-batch", "--shard-size", "2") == 0
    raw = (tmp_path / "batch.answers.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in raw]
    assert [answer["custom_id"] for answer in answers] == ["c0", "c1", "c2", "c3", "c4"]
    statuses = [answer["response"]["status_code"] for answer in answers]
    assert statuses == [200, 200, 200, 404, 400]
    got = [
        [item["embedding"] for item in answer["response"]["body"]["data"]] for answer in answers[:3]
    ]
    np.testing.assert_allclose(got[0][0], queries["embeddings"][0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got[1], passages["embeddings"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got[2], passages["embeddings"], rtol=0, atol=1e-5)
    assert answers[3]["response"]["body"]["error"]["code"] == "model_not_found"
    usage = answers[1]["response"]["body"]["usage"]
    assert usage["prompt_tokens"] == sum(map(len, passages["token_ids"]))


def test_a_line_that_is_no_batch_request_is_named(
    golden_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line, message in (
        ({"url": "/v1/embeddings"}, "line 1: no custom_id"),
        ({"custom_id": "a", "url": "/v1/chat"}, "only /v1/embeddings is served"),
    ):
        (tmp_path / "b.jsonl").write_text(json.dumps(line))
        assert encode(golden_checkpoint, tmp_path / "b.jsonl", "--openai-batch") == 1
        assert message in capsys.readouterr().err


def test_resume_goes_on_with_the_same_only(
    golden_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "a.txt", tmp_path / "a.npy"
    lines = [f"line {number}" for number in range(7)]
    file.write_text("\n".join(lines))
    options = (file, "-o", output, "--shard-size", "3")
    assert encode(golden_checkpoint, *options) == 0
    whole = output.read_bytes()
    # As if it had been killed after the first shard.
    manifest = tmp_path / "a.npy.manifest.json"
    unfinished = {k: v for k, v in json.loads(manifest.read_text()).items() if k != "complete"}
    manifest.write_text(json.dumps(unfinished))
    parts = tmp_path / "a.npy.parts"
    parts.mkdir()
    first = np.load(output)[:3]
    np.save(parts / "part-00000-00000.npy", first)
    output.unlink()
    assert encode(golden_checkpoint, *options) == 1
    assert "go on with --resume" in capsys.readouterr().err
    assert encode(golden_checkpoint, *options, "--prompt", "other ", "--resume") == 1
    assert "another prefix" in capsys.readouterr().err
    assert encode(golden_checkpoint, *options, "--resume") == 0
    assert output.read_bytes() == whole
    assert not parts.exists()
    output.unlink()  # complete: nothing is computed again, not even the model is loaded
    assert encode(golden_checkpoint, *options, "--resume") == 0
    assert not output.exists()


def test_examples_stand_before_queries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authors' vectors, and a run that does not go on with other examples."""
    monkeypatch.chdir(tmp_path)
    model = write_sibling(tmp_path / "icl", "bge-en-icl")
    cases = {case["name"]: case for case in golden_cases_of("bge-en-icl")}
    for number, name in enumerate(("few-shot queries", "few-shot, one example")):
        case = cases[name]
        chosen = [index for index in usable("bge-en-icl", case) if case["texts"][index]]
        texts = [case["texts"][index] for index in chosen]
        Path("in.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
        Path("examples.json").write_text(json.dumps(case["examples"]))
        options = ["in.jsonl", "-o", f"{number}.npy", "--examples", "examples.json"]
        options += ["--instruction", case["task"], "--max-input-tokens", "512", "--truncate", "end"]
        assert encode(model, *options) == 0
        expected = [case["embeddings"][index] for index in chosen]
        np.testing.assert_allclose(np.load(f"{number}.npy"), expected, rtol=0, atol=1e-5)
    assert encode(model, *options, "--resume") == 0
    Path("examples.json").write_text(json.dumps(case["examples"] * 2))
    for changed in (options, [*options[:3], *options[5:]]):  # other ones, and none
        assert encode(model, *changed, "--resume") == 1
        assert "with another examples: the vectors would not" in capsys.readouterr().err
    assert encode(model, *options, "--input-type", "passage") == 2
    assert "examples are for queries, and these are passages" in capsys.readouterr().err


EXAMPLE = '{"instruct": "i", "query": "q", "response": "r"}'


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (f"[{EXAMPLE}]", [], "a nv-embed model takes no examples"),
        (f"[{EXAMPLE}]", ["--prompt", "x "], "--examples and --prompt: write the examples into"),
        (f"[{EXAMPLE}]", ["--openai-batch"], "--examples and --openai-batch: each request says"),
        (f"[{EXAMPLE},\n oops]", [], "x.jsonl cannot be read: Expecting value: line 2 column 2"),
        ("[", [], "x.jsonl cannot be read: Expecting value: line 1 column 2"),
        (EXAMPLE, [], "x.jsonl: examples: Input should be a valid list"),
        (f'[{EXAMPLE}, "q"]', [], "x.jsonl: examples[1]: an object is needed"),
        (f'[{EXAMPLE}, {{"instruct": "i", "query": "q"}}]', [], "the field 'examples[1].response'"),
        ('[{"instruct": "i", "query": 3, "response": "r"}]', [], "examples[0].query: Input should"),
        (f"[{', '.join([EXAMPLE] * 65)}]", [], "examples: List should have at most 64 items"),
        ("[]", [], "x.jsonl holds no example"),
        ("null", [], "x.jsonl holds no example"),
        (None, [], "x.jsonl cannot be read: No such file or directory"),
        (b"[\n\xff]", [], "x.jsonl, line 2: not UTF-8"),
        (f"[{EXAMPLE}]", ["-o", "x.jsonl"], "--output x.jsonl is the file of --examples"),
    ],
)
def test_examples_that_cannot_be_are_refused(
    golden_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: str | bytes | None,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('"one"\n')
    if content is not None:
        Path("x.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(tmp_path.iterdir())
    assert encode(golden_checkpoint, "a.jsonl", "--examples", "x.jsonl", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1, said
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_is_looked_for_once(
    golden_checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(golden_checkpoint)
    (tmp_path / "a.txt").write_text("one\n")
    monkeypatch.chdir(tmp_path)
    assert encode(Path("owner/name"), "a.txt", "-o", "a.npy") == 0
    for handler in logging.getLogger().handlers:
        handler.flush()
    assert capfd.readouterr().err.count("not the hub's owner/name") == 1


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
def test_a_bad_line_is_named_and_no_output_appears(
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
    assert not list(tmp_path.glob("*.npy"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "there is no file missing.txt"),
        (["FILE", "-o", "out.csv"], "write to .npy, .jsonl, .parquet, or to a folder"),
        (["JSONL", "-o", "JSONL"], "a.jsonl is the input file"),
        (["FILE", "--part", "1/2"], "--part needs a folder as --output, which the parts share"),
        (["FILE", "-o", "x/", "--part", "3/2"], "must be I/N with I from 1 to N, not '3/2'"),
        (["-", "-o", "x/", "--part", "1/2"], "each part would have to read all of a pipe"),
        (["FILE", "--keep", "id"], "--id-field and --keep need --format parquet or jsonl"),
        (["FILE", "-o", "x.parquet", "--keep", "id"], "--keep names a field, and"),
        (["JSONL", "-o", "x.parquet", "--keep", "index"], "the output has a column of that name"),
        (["FILE", "-o", "x.npy", "--compression", "zstd"], "--compression zstd: .npy has none"),
        (["FILE", "-o", "x.jsonl", "--compression", "gzip"], "name the --output x.jsonl.gz"),
        (["FILE", "JSONL"], "name the --output: only that of one local file has a default"),
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


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({}, "<|embed|>\n"),
        ({"prompt": ""}, ""),
        ({"task": ""}, ""),
        ({"prompt": "verbatim "}, "verbatim "),
        ({"instruction": "Do it"}, "<|user|>\nDo it\n<|embed|>\n"),
    ],
    ids=str,
)
def test_an_empty_prompt_is_no_default(fields: dict[str, str], prefix: str) -> None:
    """Where passages have a prefix, bare texts can still be had."""
    unsaid = dict.fromkeys(("prompt", "instruction", "task", "input_type"))
    settings = {"query_instruction": "Find answers", "default_input_type": "none"}
    arguments = argparse.Namespace(**{**unsaid, **settings, **fields})
    config = ModelConfig.from_dict(SIBLINGS["gritlm"].config, "gritlm")
    assert written(call.prompt_of(arguments, config).prefix) == prefix
