"""What a request may cost before and after it is admitted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.tokenizer import NVEmbedTokenizer, Truncation
from server.engine.inputs import AbandonedError, InputTokenizer
from server.engine.interface import EncodingOptions
from server.errors import InvalidRequestError
from server.settings import MAX_REQUEST_TOKENS
from tests.server.processes import ServerProcess, serving

LONG = "a sentence of some words, " * 30  # more than is tokenized on the event loop


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.fixture(scope="module")
def held_server(
    golden_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, Path]]:
    """(a server, a file while whose existence its batches wait)."""
    folder = tmp_path_factory.mktemp("admission")
    options = ("--runner", "tests.server.runners:Held", "--max-queued-tokens", "300000")
    env = {"FAKE_HELD": str(folder / "held")}
    with serving(golden_checkpoint, *options, log=folder / "log", env=env) as server:
        yield server, folder / "held"


@pytest.mark.process
def test_a_full_queue_refuses_whole_requests(held_server: tuple[ServerProcess, Path]) -> None:
    """All or nothing, counted in tokens, /tokenize as well; clients hear when to come back."""
    server, held = held_server
    full = ["word " * 1000] * 250  # equal ones run once, and are counted all
    with ThreadPoolExecutor(3) as clients:
        held.touch()
        try:
            waiting = [clients.submit(server.embed, input="first")]
            server.wait_for_metric("nv_embed_running_requests", 1)
            waiting.append(clients.submit(server.embed, input=full))
            server.wait_until(lambda: server.metric("nv_embed_queued_tokens") > 200_000, "full")
            refusals = [
                server.embed(input=["word " * 1000] * 60),
                server.client.post("/tokenize", json={"input": full}),
            ]
            for refused in refusals:
                assert refused.status_code == 429
                assert error_of(refused)["code"] == "rate_limit_exceeded"
                assert 1 <= int(refused.headers["retry-after"]) <= 60
                assert int(refused.headers["retry-after-ms"]) >= 1000
            assert server.metric("nv_embed_rejected_requests_total") == 2
            assert server.client.post("/tokenize", json={"input": LONG}).status_code == 200
            waiting.append(clients.submit(server.embed, input="x"))
        finally:
            held.unlink()
        for answer in waiting:
            assert answer.result().status_code == 200, "there was room for it"
    server.wait_for_metric("nv_embed_queued_tokens", 0)


@pytest.mark.process
def test_no_key_takes_more_of_the_queue_than_its_share(
    golden_checkpoint: Path, tmp_path: Path
) -> None:
    held = tmp_path / "held"
    options = ("--runner", "tests.server.runners:Held", "--max-queued-tokens", "300000")
    options += ("--max-key-share", "0.5", "--api-key-file", str(tmp_path / "keys"))
    (tmp_path / "keys").write_text("bulk:key-of-bulk\nsearch:key-of-search\n")
    env = {"FAKE_HELD": str(held)}
    bulk = {"authorization": "Bearer key-of-bulk"}
    search = {"authorization": "Bearer key-of-search"}
    path = "/v1/embeddings"
    # Expected to be 63,000 tokens; each time the same, yet of equal inputs only one is computed.
    part = {"input": [f"{number} " + "word " * 1000 for number in range(40)]}
    with serving(golden_checkpoint, *options, log=tmp_path / "log", env=env) as server:
        with ThreadPoolExecutor(4) as clients:
            held.touch()
            try:
                ask = partial(server.client.post, path, json=part, headers=bulk)
                waiting = [clients.submit(ask) for _ in range(2)]
                server.wait_until(lambda: server.metric("nv_embed_queued_tokens") > 75_000, "full")
                refused = ask()
                assert refused.status_code == 429
                assert "your key's share of the queue" in error_of(refused)["message"]
                assert int(refused.headers["retry-after"]) >= 1
                waiting += [
                    clients.submit(server.client.post, path, json=part, headers=search),
                    clients.submit(server.client.post, path, json={"input": "x"}, headers=search),
                ]
                server.wait_until(lambda: server.metric("nv_embed_queued_tokens") > 115_000, "in")
            finally:
                held.unlink()
            for answer in waiting:
                assert answer.result().status_code == 200
        assert ask().status_code == 200, "what was answered is given back"


@pytest.mark.process
def test_an_expired_deadline_is_a_504(held_server: tuple[ServerProcess, Path]) -> None:
    """The SDK's own time-out passes while another batch runs."""
    server, held = held_server
    with ThreadPoolExecutor(1) as other:
        held.touch()
        try:
            first = other.submit(server.embed, input="another first")
            server.wait_for_metric("nv_embed_running_requests", 1)
            answer = server.client.post(
                "/v1/embeddings",
                json={"model": "golden-embed", "input": "second"},
                headers={"x-stainless-read-timeout": "0.2"},
            )
        finally:
            held.unlink()
        assert first.result().status_code == 200
    assert answer.status_code == 504
    assert answer.headers["x-should-retry"] == "false"
    assert error_of(answer)["code"] == "deadline_exceeded"
    assert server.metric("nv_embed_expired_requests_total") == 1


def test_work_that_nobody_waits_for_ends_early(tokenizer: NVEmbedTokenizer) -> None:
    inputs = InputTokenizer(tokenizer, 32_768, Truncation.NONE)
    asked: list[float] = []

    def abandoned() -> bool:
        asked.append(time.monotonic())
        return len(asked) > 2

    with pytest.raises(AbandonedError):
        inputs.tokenize(["some words " * 100] * 2048, EncodingOptions(), abandoned)
    assert len(asked) == 3


def test_a_request_of_too_many_tokens_is_not_tokenized_to_its_end(
    tokenizer: NVEmbedTokenizer,
) -> None:
    asked: list[int] = []
    inputs = InputTokenizer(tokenizer, 32_768, Truncation.NONE)
    texts = ["x y z a b c d e f g " * 50] * 2048  # 2 million tokens, or a sixteenth of that
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_REQUEST_TOKENS} tokens"):
        inputs.tokenize(texts, EncodingOptions(), lambda: bool(asked.append(1)))
    assert 0 < len(asked) < 16, "of 32 parts"


LONG_TEXTS = {
    "words": "word " * 60_000,
    "emoji": "🙂" * 100_000,
    "ligatures": "\ufdfa" * 100_000,
    "spaces": " " * 300_000,
    "marks": "e\u0301" * 100_000,
}


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
@pytest.mark.parametrize("as_instruction", [False, True])
def test_a_long_text_does_not_keep_the_interpreter(
    tokenizer: NVEmbedTokenizer, text: str, as_instruction: bool
) -> None:
    """Another thread goes on. A busy machine may stop that one as well, but not each time; the
    interpreter's lock would."""

    def work() -> None:
        if as_instruction:
            tokenizer.pool_start(text)
        else:
            tokenizer.encode(text, max_tokens=32_768, truncate=Truncation.END)

    stops = []
    for _ in range(10):
        stops.append(longest_stop_beside(work))
        if stops[-1] < 0.5:
            return
    raise AssertionError(f"stopped for these parts of the work: {stops}")


def longest_stop_beside(work: Callable[[], None]) -> float:
    """The longest time for which this thread stood still, as a part of what `work` took."""
    thread = threading.Thread(target=work)
    begin = last = time.monotonic()
    longest = 0.0
    thread.start()
    while thread.is_alive():
        time.sleep(0.0005)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    return longest / (time.monotonic() - begin)
