"""`nv-embed synthesize` against a chat endpoint that misbehaves: killed, resumed, refused; what an
answer holds; the way back from a query; a model trained on what comes out."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from model.families import Side
from model.training import answers, chat, synthesis
from model.training.chat import Answer, ChatModel
from model.training.examples import DataError, Example, read_examples
from model.training.round_trip import verdicts
from model.training.synthesis import MalformedError, SynthesisSettings, parse_example, parse_tasks
from model.training.synthesis_prompts import KINDS
from model.user_files import locked
from server import cli
from server.cli import synthesize as command
from tests.model.training.chat_server import MALFORMED, number_of, serving

ROOT = Path(__file__).parents[3]
FEW = ["--tasks", "12", "--examples-per-task", "3"]


def call(out: Path, url: str, *more: str) -> list[str]:
    return ["synthesize", "-o", str(out), "--chat-url", url, "--no-filter", *more]


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])  # type: ignore[no-any-return]


def kept(out: Path) -> dict[int, str]:
    """Number of the prompt -> the whole line, of each answer that a run has kept."""
    path = out.with_name(f"{out.name}.answers")
    lines = path.read_bytes().split(b"\n")[1:-1] if path.exists() else []
    found = [(int(re.search(rb"<think>(\d+)", line)[1]), line.decode()) for line in lines]  # type: ignore[index]
    assert len(dict(found)) == len(found), "an answer stands there twice"
    return dict(found)


@pytest.mark.process
def test_killed_at_random_and_resumed_nothing_is_lost_or_asked_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [*FEW, "--tasks", "25", "--concurrency", "4", "--seed", "5"]
    with serving() as (url, seen):
        assert cli.main(call(tmp_path / "whole.jsonl", url, *more)) == 0
        whole = last_line(capsys)
        number = sum(seen.served.values())
    out, rng, kills = tmp_path / "out.jsonl", random.Random(), 0
    with serving(pause_s=0.01) as (url, seen):
        while True:
            before = kept(out)
            asked = dict(seen.served)
            running = subprocess.Popen(
                [sys.executable, "-P", "-m", "server.cli", *call(out, url, *more)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            if kills < 4:
                enough = sum(seen.served.values()) + rng.randint(1, number // 5)
                while sum(seen.served.values()) < enough and running.poll() is None:
                    time.sleep(0.001)
                time.sleep(rng.random() * 0.02)
                running.kill()
            printed, said = running.communicate(timeout=30)
            again = {p: n - asked.get(p, 0) for p, n in seen.served.items() if n > asked.get(p, 0)}
            assert not {number_of(prompt) for prompt in again} & before.keys(), "asked again"
            assert before.items() <= kept(out).items(), "lost"
            if running.returncode == 0:
                break
            assert running.returncode == -9, said
            kills += 1
    assert kills == 4
    assert kept(out).keys() == {number_of(prompt) for prompt in seen.served}
    # What was in flight at a kill, and nothing else, was asked twice.
    assert sum(seen.served.values()) - len(kept(out)) <= kills * 4
    assert sorted(kept(out).values()) == sorted(kept(tmp_path / "whole.jsonl").values())
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    counts = json.loads(printed.splitlines()[-1])
    assert {**counts, "out": whole["out"]} == whole
    assert counts["answers"] == number
    queries = [synthesis.normalised(example.query) for example in read_examples(out)]
    assert len(set(queries)) == len(queries) == counts["examples"] > 50


@pytest.mark.process
@pytest.mark.usefixtures("signals_as_usual")
@pytest.mark.parametrize("patient", [True, False], ids=["once", "twice"])
def test_ctrl_c_keeps_what_comes_and_does_not_wait_for_ever(tmp_path: Path, patient: bool) -> None:
    """Once: what is on its way is waited for, and kept. Twice: nothing is."""
    out = tmp_path / "out.jsonl"
    with serving(pause_s=1.5 if patient else 60.0) as (url, seen):
        command = [sys.executable, "-P", "-m", "server.cli", *call(out, url, "--tasks", "40")]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as running:
            assert running.stderr is not None
            while not seen.asked:
                time.sleep(0.01)
            time.sleep(0.2)
            running.send_signal(signal.SIGINT)
            lines = iter(running.stderr.readline, "")
            said = next(line for line in lines if "stopping" in line)
            assert re.search(r"stopping: \d+ answers are on their way and get 30 s", said)
            if not patient:
                running.send_signal(signal.SIGINT)
            assert running.wait(20) == 130
            assert "Traceback" not in running.stderr.read()
        assert kept(out).keys() == {number_of(prompt) for prompt in seen.served}
        assert bool(seen.served) is patient
        assert sum(seen.asked.values()) <= 10  # nothing was begun afterwards


@pytest.mark.process
def test_what_went_wrong_is_said_before_the_others_are_waited_for(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with serving(pause_s=2.0, refuses_after=3) as (url, seen):
        command = [sys.executable, "-P", "-m", "server.cli", *call(out, url, "--tasks", "80")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    first, _, last = done.stderr.partition("stopping: ")
    assert "wants a valid key" in first.splitlines()[-1]
    assert "wants a valid key" in last
    assert kept(out).keys() == {number_of(prompt) for prompt in seen.served}
    assert 0 < len(seen.served) <= 3


def test_what_is_counted_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    with serving() as (url, seen):
        assert cli.main(call(out, url, *FEW, "--max-retries", "1")) == 0
        counts = last_line(capsys)
        served = sum(seen.served.values())
        assert cli.main(call(out, url, *FEW, "--max-retries", "1")) == 0
        assert last_line(capsys) == counts
        assert sum(seen.served.values()) == served  # nothing is asked that is there
    texts = [json.loads(line)["text"] for line in kept(out).values()]
    for reason, text in MALFORMED.items():
        number = sum(found.endswith(f"</think>{text}") for found in texts)
        assert counts["malformed"].get(reason, 0) == number, reason  # type: ignore[attr-defined]
    assert sum(counts["malformed"].values()) > 5  # type: ignore[attr-defined]
    assert counts["tasks"] == {"short": 12, "long": 12}
    dropped = counts["given_up"] + counts["duplicate_queries"]  # type: ignore[operator]
    assert counts["examples"] + dropped == 2 * 12 * 3
    assert counts["duplicate_queries"] > 0  # type: ignore[operator]
    assert counts["prompt_tokens"] == 3 * counts["answers"] == 3 * len(texts)
    tasks = {synthesis.normalised(example.task) for example in read_examples(out)}
    assert len(tasks) <= 24


def test_the_recipe_trains_on_what_stands_the_round_trip(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bare = tmp_path / "out.jsonl", tmp_path / "bare.jsonl"
    model = ["--model", str(tiny_checkpoint), "--threads", "1", "--keep-top", "3"]
    with serving() as (url, _):
        assert cli.main(call(bare, url, *FEW, "--kinds", "short,match")) == 0
        everything = last_line(capsys)
        (tmp_path / "out.jsonl.answers").write_bytes((tmp_path / "bare.jsonl.answers").read_bytes())
        words = call(out, url, *FEW, "--kinds", "short,match", *model)
        words.remove("--no-filter")
        assert cli.main(words) == 0
        counts = last_line(capsys)
    dropped = sum(counts["round_trip"].values())  # type: ignore[attr-defined]
    assert dropped > 0
    assert counts["examples"] == everything["examples"] - dropped > 0  # type: ignore[operator]
    examples = read_examples(out)
    assert set(examples) < set(read_examples(bare))
    assert {example.symmetric for example in examples} == {False, True}
    settings = {"model": str(tiny_checkpoint), "data": {"out.jsonl": 1}, "stage": 2, "steps": 2}
    settings |= {"pairs_per_step": 4, "max_negatives": 2, "dtype": "float32"}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    run = tmp_path / "run"
    assert cli.main(["train", str(tmp_path / "run.json"), "-o", str(run), "--threads", "1"]) == 0
    losses = [json.loads(x)["loss"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)


def test_a_torn_line_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    with answers.opened(path, {"model": "m"}) as store:
        store.add("a", Answer("one \ud83d", "stop", 3, 4))
        store.add("b", Answer("two", "length"))
    raw = path.read_bytes()
    header, first, second = raw.splitlines(keepends=True)
    for cut in range(len(raw)):
        path.write_bytes(raw[:cut])
        with answers.opened(path, {"model": "m"}) as store:
            whole = raw[:cut].count(b"\n") - 1
            assert list(store.known) == ["a", "b"][: max(0, whole)]
            store.add("c", Answer("three", "stop"))
        with answers.opened(path, {"model": "m"}) as store:
            assert list(store.known)[-1] == "c"
            assert store.known["c"] == Answer("three", "stop")
    path.write_bytes(header + first[:-9] + b"\n" + second)
    with pytest.raises(DataError, match="line 2: not an answer: remove the line"):
        answers.opened(path, {"model": "m"}).__enter__()
    path.write_text("somebody's notes")
    with pytest.raises(DataError, match="not of this command"):
        answers.opened(path, {"model": "m"}).__enter__()
    assert path.read_text() == "somebody's notes"


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as fits is written; what follows must not begin inside it."""
    path = tmp_path / "answers"
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from model.training import answers\n"
        "from model.training.chat import Answer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with answers.opened(Path(sys.argv[1]), {'model': 'm'}) as store:\n"
        "    store.add('a', Answer('one', 'stop'))\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))\n"
        "    try:\n"
        "        store.add('b', Answer('x' * 1000, 'stop'))\n"
        "    except OSError as error:\n"
        "        print(error.strerror)\n"
        "    store.add('c', Answer('three', 'stop'))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-P", "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.stdout == "File too large\n", ended.stderr
    with answers.opened(path, {"model": "m"}) as store:
        assert list(store.known) == ["a", "c"]


def test_a_run_of_other_settings_and_a_second_run_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    with serving() as (url, seen):
        assert cli.main(call(out, url, "--tasks", "2", "--chat-model", "fake")) == 2
        assert "--chat-model is 'fake'; known there: fake-chat" in capsys.readouterr().err
        assert cli.main(call(out, url, "--tasks", "2")) == 0  # nothing was kept of the other model
        number = sum(seen.served.values())
        capsys.readouterr()
        assert cli.main(call(out, url, "--tasks", "3", "--languages", "German")) == 2
        said = capsys.readouterr().err
        assert "(tasks: 2 there, 3 now; languages: ['English'] there, ['German'] now)" in said
        with locked(tmp_path / ".out.jsonl.lock", out):
            assert cli.main(call(out, url, "--tasks", "2")) == 2
        assert "another run is writing" in capsys.readouterr().err
        (tmp_path / "mine.jsonl").write_text("mine")
        assert cli.main(call(tmp_path / "mine.jsonl", url)) == 2
        assert "exists, and mine.jsonl.answers does not" in capsys.readouterr().err
        assert sum(seen.served.values()) == number
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


def test_a_server_that_cannot_be_asked_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "keys").write_text("from-the-file\n")
    with serving(key="from-the-file") as (url, _):
        monkeypatch.setenv("NV_EMBED_API_KEY", "of-the-embedding-server")
        assert cli.main(call(out, url, "--tasks", "1")) == 2
        said = capsys.readouterr().err
        assert "wants a valid key: --chat-api-key, or NV_EMBED_CHAT_API_KEY" in said
        assert said.count("\n") == 1
        keys = ["--chat-api-key-file", str(tmp_path / "keys")]
        assert cli.main(call(out, url, "--tasks", "1", *keys)) == 0
        monkeypatch.setenv("NV_EMBED_CHAT_API_KEY", "from-the-file")
        assert cli.main(call(out, url, "--tasks", "1")) == 0
        assert "from-the-file" not in "".join(capsys.readouterr())
        assert "from-the-file" not in (tmp_path / "out.jsonl.answers").read_text()
    with serving(do_POST=lambda self: self._answer({"choices": [{"message": {}}]})) as (url, _):
        assert cli.main(call(tmp_path / "dumb.jsonl", url, "--tasks", "1")) == 2
        assert "fake-chat named no task in 8 answers (8 x empty answer)" in capsys.readouterr().err
    assert cli.main(call(tmp_path / "other.jsonl", url)) == 2  # it has gone
    assert re.search(r"does not answer as a server: .*refused", capsys.readouterr().err)
    assert not (tmp_path / "other.jsonl.answers").exists()


def test_a_lost_server_is_waited_for_and_a_filtered_prompt_is_an_answer() -> None:
    waits: list[float] = []
    with serving() as (url, _):
        ask = ChatModel(url, sleep=waits.append)
    with pytest.raises(chat.RemoteError, match="refused"):
        ask("x")  # gone for good
    assert waits == [1, 2, 4, 8, 16, 32, 60]
    said = {"error": {"message": "no", "code": "content_filter"}}
    with serving(do_POST=lambda self: self._answer(said, 400)) as (url, _):
        assert ChatModel(url)("x").finish == "refusal"
    said = {"error": {"message": "bad temperature", "code": None}}
    with serving(do_POST=lambda self: self._answer(said, 400)) as (url, _):
        ask = ChatModel(url)
        with pytest.raises(chat.RemoteError, match="answered 400: bad temperature"):
            ask("x")
    with serving(do_POST=lambda self: self._answer({"choices": []})) as (url, _):
        with pytest.raises(chat.RemoteError, match="not answer with a chat completion"):
            ChatModel(url)("x")
        stopped = ChatModel(url)
        stopped.stop()
        with pytest.raises(chat.StoppedError):
            stopped("x")


@pytest.mark.parametrize("reason", MALFORMED)
def test_a_malformed_answer_has_its_reason(reason: str) -> None:
    finish = "length" if reason == "cut off" else "stop"
    with pytest.raises(MalformedError, match=f"^{reason}$"):
        parse_example(Answer(MALFORMED[reason], finish))


def test_an_answer_may_stand_among_other_words() -> None:
    row = {"query": " q ", "positive": "p", "negatives": ["n", "m"]}
    for text in ("%s", "<think>{}</think>%s", "```json\n%s\n```", "As {asked}: %s. Done.", "[%s]"):
        found = parse_example(Answer(text.replace("%s", json.dumps(row)), "stop"))
        assert found == ("q", "p", ("n", "m"))
    for text, reason in (("", "empty answer"), ("{" * 100_000, "no JSON"), ("[" * 9999, "no JSON")):
        with pytest.raises(MalformedError, match=reason):
            parse_example(Answer(text, "stop"))
    assert parse_tasks(Answer('Sure: ["a  b", "", 3, "c"]', "stop")) == ["a b", "c"]
    for text, reason in (("[]", "missing field"), (json.dumps(["x" * 301]), "too long")):
        with pytest.raises(MalformedError, match=reason):
            parse_tasks(Answer(text, "stop"))
    assert synthesis.normalised("What's  NEW?") == synthesis.normalised("what s new")
    assert synthesis.normalised("???") != synthesis.normalised("!")


def test_no_two_requests_have_the_same_prompt() -> None:
    settings = SynthesisSettings("m", tuple(KINDS), 30, 4, ("English", "Thai"), 1.0, 2, 7)
    known: dict[str, Answer] = {}
    prompts: list[str] = []
    while requests := synthesis.pending(settings, known):
        prompts += [request.prompt for request in requests]
        for request in requests:  # every first example is malformed
            text = json.dumps([f"Task {len(known)}-{place}" for place in range(10)])
            known[request.id] = Answer(text, "stop")
    assert len(set(prompts)) == len(prompts) == 3 * 3 + 3 * 30 * 4 * 3
    assert {"English", "Thai"} == set(re.findall(r"All texts are in (\w+)\.", "".join(prompts)))
    assert synthesis.found(settings, known).counts["given_up"] == 3 * 30 * 4
    assert tuple(KINDS) == command.KINDS


def test_a_task_in_other_words_of_the_same_letters_is_asked_for_once() -> None:
    settings = SynthesisSettings("m", ("short",), 12, 1, ("English",), 1.0, 1, 7)
    first = json.dumps([f"Find a {word}" for word in "abcdefgh"] + ["find a  A.", "FIND A B"])
    known = {"tasks/short/0": Answer(first, "stop"), "tasks/short/1": Answer("no", "stop")}
    assert [r.id for r in synthesis.pending(settings, known)] == ["tasks/short/2"]
    known["tasks/short/2"] = Answer(json.dumps(["Find a C!", "Find an i"]), "stop")
    known["tasks/short/3"] = Answer(json.dumps([f"Find {n}" for n in range(10)]), "stop")
    requests = synthesis.pending(settings, known)
    tasks = [re.search("learns this task: (.*)", request.prompt)[1] for request in requests]  # type: ignore[index]
    assert tasks == [f"Find a {word}" for word in "abcdefgh"] + [
        "Find an i",
        *map("Find {}".format, range(3)),
    ]
    counts = synthesis.found(settings, known)
    assert (counts.counts["duplicate_tasks"], counts.tasks) == (3, {"short": 12})
    # No more is asked for than so many answers, whatever is missing then.
    empty = {f"tasks/short/{n}": Answer("no", "stop") for n in range(4)}
    assert synthesis.pending(settings, empty) == []


def test_the_way_back_from_a_query() -> None:
    """Vectors are angles: the nearer, the more alike."""
    angles = {"q": 0.0, "near": 0.1, "next": 0.2, "far": 0.3, "hard": 0.25}

    def embed(texts: Sequence[str], side: Side, task: str) -> NDArray[np.float32]:
        asked = ("query", "t") if texts == ["q"] * len(texts) else ("passage", "")
        assert (side, task) == asked
        found = [angles[text] for text in texts]
        return np.array([[np.cos(a), np.sin(a)] for a in found], dtype=np.float32)

    examples = [
        Example("q", "near", ("hard",), "t"),
        Example("q", "next", ("hard",), "t"),
        Example("q", "far", (), "t"),
        Example("q", "far", ("hard",), "t"),
    ]
    assert list(verdicts(examples, embed, 9)) == ["kept", "kept", "kept", "negative_nearer"]
    assert list(verdicts(examples, embed, 2))[2:] == ["not_in_top", "negative_nearer"]
    assert list(verdicts(examples[:2], embed, 1)) == ["kept", "not_in_top"]
    assert list(verdicts([], embed, 1)) == []
