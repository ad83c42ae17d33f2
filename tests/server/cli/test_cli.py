"""The command line: nonsense in every option of every command, closed pipes, full disks, words."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType

import pytest

from server import cli, configuration
from server.cli import command_line
from server.settings import Settings
from tests.siblings import write_sibling

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parents[3]
COMMANDS: dict[str, argparse.ArgumentParser] = {}
for found in command_line.parser()._actions:
    if isinstance(found, argparse._SubParsersAction):
        COMMANDS = dict(found.choices)


@pytest.fixture(scope="module", autouse=True)
def the_parser_is_made_once() -> Iterator[None]:
    """Two thousand calls would take seven milliseconds more each: it has three hundred options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "parser", cache(command_line.parser))
        yield


NUMBERS = ["x", "-1", "nan", "inf", "-inf", "1e999", "9" * 30, "9" * 5000, "1,5", "½"]
WORDS = ["nonsense", "-1", "NaN", "float 32"]
READ = [
    *("empty-folder", "missing", "file/below", "loop", "./missing", "mem", "fifo", "binary", "wide")
]
"""What is named in place of a file that is read; see `places`."""
WRITTEN = ["missing/below", "file/below", "loop/below", "/proc/below"]
TOO_LONG = "x" * 5000
ON_ONE_DEVICE = (
    *("encode", "verify", "gpu-check", "train"),
    *("mine", "synthesize", "evaluate", "prune"),
)
READ_PATHS = {
    *("serve --api-key-file", "serve --tls-certificate", "serve --tls-key"),
    *("serve --tiktoken-ranks", "encode --tiktoken-ranks"),
    *(f"{name} --config" for name in ("serve", *ON_ONE_DEVICE)),
    *(f"{name} --model" for name in ("serve", *ON_ONE_DEVICE) if name not in ("train", "prune")),
    *(
        "encode FILE",
        "encode --examples",
        "verify --golden",
        "train SETTINGS",
        "train --base",
        "mine FILE",
    ),
    *(f"evaluate --{name}" for name in ("sts", "retrieval", "classification", "clustering")),
    "export MODEL",
    "download MODEL",
    *("prune MODEL", "prune --texts"),
    *("mine --teacher", "evaluate --teacher", "evaluate --against", "evaluate --projection"),
    *("synthesize --teacher", "synthesize --chat-api-key-file"),
}
WRITTEN_PATHS = {
    *(
        "serve --uds",
        "encode --output",
        "train --out",
        "mine --out",
        "evaluate --items",
        "evaluate --report",
    ),
    *("gpu-check --out", "export --output", "synthesize --out", "prune --out"),
}
URLS = ["nonsense", "file:///etc/passwd", "http://", "http://[", "http://a b/"]
KEYS = ["a key", "a\nb", "schlüssel"]
NAMED = {  # neither numbers nor paths, and yet not every text will do
    "serve --host": ["a" * 64, "a b", "203.0.113.1", "256.256.256.256", "no.such.host.invalid"],
    "serve --root-path": ["api", "/api/", "/a b"],
    "serve --cors-origin": ["example.org", "https://example.org/path"],
    "serve --api-key": ["a key", "a,b", "x", "schlüssel"],
    "serve --devices": ["gpu", "cuda:x", "auto,cpu", "cuda:99999999999999999999"],
    "encode --task": WORDS,
    "encode --devices": ["gpu", "cuda:x", "cuda:4000", "cpu:0", "cpu,auto"],
    **{
        f"{name} --device": ["gpu", "cuda:x", "cuda:4000", "cpu:0"]
        for name in ON_ONE_DEVICE
        if name != "encode"
    },
    **{
        f"{name} --{option}": values
        for name in ("mine", "synthesize", "evaluate")
        for option, values in (("url", URLS), ("api-key", KEYS), ("api-key-file", READ))
    },
    "serve --otlp-endpoint": URLS,
    "synthesize --chat-url": URLS,
    "synthesize --chat-api-key": KEYS,
    "synthesize --kinds": ["x", "short,", "short,short", "Short", "short long"],
    "synthesize --languages": [",", "English,", "English,English", "5", "-", "a" * 50],
}
ANY = re.compile(
    r"encode --(prompt|instruction|field|id-field)|(serve|encode) --(query-instruction|runner)|"
    r"serve --served-model-name|[\w-]+ --revision|evaluate --(mteb|results)|"
    r"synthesize --chat-model"
)
"""Options that take every text, or whose text is looked at by another program (mteb, the hub)."""


def name_of(action: argparse.Action) -> str:
    longest = max(action.option_strings, key=len, default="")
    return longest or str(action.metavar or action.dest)


def cases() -> Iterator[tuple[str, argparse.Action, str]]:
    for command, parser in COMMANDS.items():
        for action in parser._actions:
            if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
                continue
            for value in ["", " ", *nonsense(f"{command} {name_of(action)}", action)]:
                yield command, action, value


def nonsense(which: str, action: argparse.Action) -> list[str]:
    field = Settings.model_fields.get(action.dest)
    if which in NAMED:
        return NAMED[which]
    if which in READ_PATHS:
        return [*READ, TOO_LONG]
    if which in WRITTEN_PATHS:
        made_with_those_above = which in ("train --out", "gpu-check --out", "prune --out")
        return [*(WRITTEN[1:] if made_with_those_above else WRITTEN), TOO_LONG]
    if action.choices or (field and configuration.choices_of(field)):
        return WORDS
    if action.type not in (None, Path) or (field and configuration.is_number(field)):
        return NUMBERS
    assert ANY.fullmatch(which), f"{which}: say above what is nonsense for this option"
    return []


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that are not what an option asks for. Root may read and write anywhere,
    so what nobody can read is a process's memory, and what nobody can write is /proc."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty-folder").mkdir()
    (folder / "file").write_text("text\n")
    (folder / "loop").symlink_to("loop")
    (folder / "mem").symlink_to("/proc/self/mem")
    os.mkfifo(folder / "fifo")
    (folder / "binary").write_bytes(bytes(range(256)) * 4)
    (folder / "wide").write_bytes("ein Text\n".encode("utf-16"))
    return folder


@pytest.fixture(scope="module")
def calls(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], dict[str, list[str]]]]:
    """Of each command a call that is right, but for a server's port, which is taken."""
    folder = tmp_path_factory.mktemp("calls")
    (folder / "texts.txt").write_text("one\ntwo\n")
    (folder / "sts.jsonl").write_text('{"first": "a", "second": "b", "score": 1}\n' * 3)
    (folder / "texts.jsonl").write_text('{"text": "a"}\n')
    (folder / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n' * 3)
    exported = str(write_sibling(folder / "sfr", "sfr-embedding-2"))
    run = {"model": str(golden_checkpoint), "data": {"pairs.jsonl": 1}, "steps": 1}
    (folder / "run.json").write_text(json.dumps(run))
    model = {"--model": [str(golden_checkpoint)], "--offline": [], "--threads": ["1"]}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])

        def call(command: str) -> dict[str, list[str]]:
            shutil.rmtree(folder / "out", ignore_errors=True)
            (folder / "out").mkdir()
            return {
                "serve": {**model, "--port": [port]},
                "encode": {
                    "FILE": [str(folder / "texts.txt")],
                    "--output": [str(folder / "out/x.npy")],
                    **model,
                },
                "verify": {**model},
                "gpu-check": {"--out": [str(folder / "out")], **model},
                "train": {
                    "SETTINGS": [str(folder / "run.json")],
                    "--out": [str(folder / "out/run")],
                    "--threads": ["1"],
                },
                "mine": {
                    "FILE": [str(folder / "pairs.jsonl")],
                    "--out": [str(folder / "out/mined.jsonl")],
                    **model,
                },
                "synthesize": {
                    "--out": [str(folder / "out/examples.jsonl")],
                    "--chat-url": ["http://localhost:1"],
                    **model,
                },
                "evaluate": {"--sts": [str(folder / "sts.jsonl")], **model},
                "download": {"MODEL": [str(golden_checkpoint)], "--offline": []},
                "export": {
                    "MODEL": [exported],
                    "--to": ["sentence-transformers"],
                    "--output": [str(folder / "out/exported")],
                },
                "prune": {
                    "MODEL": [str(golden_checkpoint)],
                    "--texts": [str(folder / "texts.jsonl")],
                    "--layers": ["1"],
                    "--out": [str(folder / "out/pruned")],
                    "--threads": ["1"],
                },
                "openapi": {},
            }[command]

        yield call


@pytest.fixture
def patience() -> Iterator[None]:
    """What waits for something that never comes fails, instead of waiting."""

    def out_of_patience(signum: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, out_of_patience)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("command", "action", "value"),
    [
        pytest.param(
            *(command, action, value),
            id=f"{command} {name_of(action)} {value[:20]!r}",
            marks=[pytest.mark.process] if command == "gpu-check" else [],
        )
        for command, action, value in cases()
    ],
)
@pytest.mark.usefixtures("patience")
def test_nonsense_is_one_line_and_a_status(
    command: str,
    action: argparse.Action,
    value: str,
    calls: Callable[[str], dict[str, list[str]]],
    places: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    call, name = calls(command), name_of(action)
    if f"{command} {name}" in READ_PATHS | WRITTEN_PATHS or value in READ:
        keeps_dot = value.startswith("./") or not value.strip()
        value = value if keeps_dot else str(places / value)
    for other in {"--url": ["--model"], "--teacher": ["--model"]}.get(name, []):
        call.pop(other, None)
    if name in ("--api-key", "--api-key-file") and command != "serve":
        call = {
            **{k: v for k, v in call.items() if k != "--model"},
            "--url": ["http://localhost:1"],
        }
    if name in ("--tls-certificate", "--tls-key"):
        call |= {"--tls-certificate": [value], "--tls-key": [value]}
    if name in ("--retrieval", "--classification", "--clustering"):
        call.pop("--sts")
    call[name] = [value]
    words = [command]
    for flag, given in call.items():
        words += [*([flag] if flag.startswith("-") else []), *given]
    status = cli.main(words)
    out, err = capfd.readouterr()
    said = [line for line in err.splitlines() if not re.match(r"\S+Z (INFO|WARNING) ", line)]
    assert status in (1, 2), (status, out)
    assert len(said) == 1, err
    assert said[0].startswith("nv-embed"), err
    assert "unforeseen" not in said[0]
    assert "Traceback" not in out + err
    shown = re.split(r"[\s/]", value.strip())[-1][:30]
    assert name in said[0] or shown in said[0], said[0]
    if name in ("--api-key", "--chat-api-key") and len(value) > 2:
        assert value not in said[0].replace("a key has", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_is_ascii(command: str) -> None:
    """Some terminals and logs have nothing else."""
    assert COMMANDS[command].format_help().isascii()


def run(*words: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "server.cli", *words], cwd=ROOT, timeout=60, **options
    )


@pytest.mark.process
@pytest.mark.parametrize("words", [["openapi"], ["serve", "--help"], ["--version"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_ends_it_quietly(words: list[str], unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open(writer, "wb") as output:
        ended = run(*words, stdout=output, stderr=subprocess.PIPE, env=environment)
    assert ended.stderr == b""
    assert ended.returncode == 1


@pytest.mark.process
@pytest.mark.parametrize("words", [["openapi"], ["--help"], ["serve", "--help"], ["--version"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_one_line(words: list[str], unbuffered: str) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as output:
        ended = run(*words, stdout=output, stderr=subprocess.PIPE, env=environment)
    assert ended.returncode == 1
    assert ended.stderr == b"nv-embed: No space left on device\n"


@pytest.mark.process
def test_output_that_is_closed_is_no_fault() -> None:
    program = f"exec {sys.executable} -m server.cli --version >&-"
    ended = subprocess.run(["sh", "-c", program], cwd=ROOT, capture_output=True, timeout=60)
    assert ended.returncode == 0
    assert b"Traceback" not in ended.stderr


@pytest.mark.process
def test_an_ascii_terminal_gets_help_and_the_document_stays_utf8() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = run("encode", "--help", capture_output=True, env=environment)
    assert (ended.returncode, ended.stderr) == (0, b"")
    ended = run("openapi", capture_output=True, env=environment)
    assert (ended.returncode, ended.stderr) == (0, b"")
    elsewhere = run("openapi", capture_output=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    assert ended.stdout == elsewhere.stdout


def test_a_download_says_what_is_there(
    golden_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["download", str(golden_checkpoint), "--offline"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{golden_checkpoint}\n"
    assert re.search(r"golden: 0\.\d\d GB of weights$", err, re.MULTILINE)
    assert cli.main(["download", "owner/name", "--offline"]) == 2
    assert "not in the local cache, and --offline was given" in capsys.readouterr().err


def test_no_command_is_answered_with_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    shown = capsys.readouterr().err
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serv"], "did you mean serve?"),
        (["--modle"], "unrecognized argument --modle"),
        (["encode", "x", "--formt", "npy"], "did you mean --format?"),
        (["encode", "x", "--format", "parket"], "did you mean parquet?"),
        (["serve", "--log-level", "warn"], "--log-level: must be debug, info, warning or error"),
        (["verify", "--quantization", "int-8"], "did you mean int8?"),
        (["gpu-check", "--quantization", "float8"], "gpu-check tries all of them"),
        (["gpu-check", "--dtype", "float32"], "gpu-check tries all of them"),
        (["gpu-check", "--fused-kernels", "triton"], "gpu-check tries all of them"),
        (["gpu-check", "--device", "cpu"], "`nv-embed verify` runs on a CPU"),
        (["serve", "--prot=5"], "unrecognized argument --prot=5; did you mean --port?"),
        (["mine", "x", "-o", "y", "--modl", "z", "--threshold", "0"], "--threshold: must be a num"),
    ],
)
def test_mistyped_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["encode", "verify", "evaluate"])
def test_fused_kernels_without_a_gpu_are_refused(
    command: str,
    calls: Callable[[str], dict[str, list[str]]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    call = {**calls(command), "--device": ["cpu"], "--fused-kernels": ["triton"]}
    words = [command]
    for flag, given in call.items():
        words += [*([flag] if flag.startswith("-") else []), *given]
    assert cli.main(words) in (1, 2)
    assert "fused kernels 'triton' cannot be used on cpu" in capfd.readouterr().err


def test_what_nobody_foresaw_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise LookupError("lost\nfor ever")

    monkeypatch.setattr(configuration, "load_as", broken)
    assert cli.main(["serve"]) == 1
    assert capsys.readouterr().err == (
        "nv-embed: an unforeseen LookupError: lost for ever (log level debug shows where)\n"
    )


def test_the_environment_names_the_model_of_every_command(
    golden_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that serves one model must not embed files with another."""
    (tmp_path / "t.txt").write_text("one\n")
    (tmp_path / "sts.jsonl").write_text('{"first": "a", "second": "b", "score": 1}\n' * 3)
    (tmp_path / "pairs.jsonl").write_text('{"query": "a", "positive": "b"}\n')
    words = {
        "encode": ["t.txt", "-o", "x.npy"],
        "verify": [],
        "gpu-check": [],
        "mine": ["pairs.jsonl", "-o", "y.jsonl"],
        "synthesize": ["-o", "z.jsonl", "--chat-url", "http://localhost:1"],
        "evaluate": ["--sts", "sts.jsonl"],
        "serve": [],
    }
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "server.yaml"
    config.write_text("model: /nonexistent\nport: 8000\nthreads: 1\n")
    for name, value in (("NV_EMBED_MODEL", "/nonexistent"), ("NV_EMBED_CONFIG", str(config))):
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            for command, more in words.items():
                assert cli.main([command, *more]) == 2, command
                assert not (tmp_path / "x.npy").exists()
    monkeypatch.setenv("NV_EMBED_MODEL", str(golden_checkpoint))
    monkeypatch.setenv("NV_EMBED_THREADS", "1")
    monkeypatch.setenv("NV_EMBED_DTYPE", "float32")
    assert cli.main(["encode", *words["encode"]]) == 0
    manifest = json.loads((tmp_path / "x.npy.manifest.json").read_text())
    assert manifest["model"]["id"].endswith("golden")
    assert manifest["model"]["dtype"] == "float32"
