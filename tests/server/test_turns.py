"""A thread beside the event loop takes a step for each turn of the loop."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from model.tokenizer import NVEmbedTokenizer, Truncation
from server.engine.inputs import InputTokenizer
from server.engine.interface import EmbedJob, EncodingOptions
from server.engine.tokenizing import Tokenizing
from server.turns import Turns
from tests.server.fakes import in_process


@pytest.mark.anyio
async def test_a_step_for_each_turn() -> None:
    turns, steps = Turns(), 0

    def work() -> None:
        nonlocal steps
        for _ in range(20):
            turns.wait()
            steps += 1

    running = asyncio.get_running_loop().run_in_executor(None, work)
    while not running.done():
        before = steps
        time.sleep(0.002)  # noqa: ASYNC251 the loop has much to do in this turn
        assert steps - before <= 1
        await asyncio.sleep(0)
    assert steps == 20
    await running


def test_a_loop_that_has_stopped_holds_nobody_for_ever() -> None:
    async def made() -> Turns:
        return Turns()

    loop = asyncio.new_event_loop()
    turns = loop.run_until_complete(made())
    begin = time.monotonic()
    turns.wait()
    assert time.monotonic() - begin < 10
    loop.close()
    with pytest.raises(RuntimeError):
        turns.wait()


def test_many_short_texts_are_tokenized_in_steps(golden_checkpoint: Path) -> None:
    tokenizer = NVEmbedTokenizer.from_dir(golden_checkpoint)
    asked = 0

    def abandoned() -> bool:
        nonlocal asked
        asked += 1
        return False

    texts = [f"text {number}" for number in range(2048)]
    inputs = InputTokenizer(tokenizer, 512, Truncation.NONE)
    encodings = inputs.tokenize(texts, EncodingOptions(), abandoned)
    assert asked >= 2048 // 64
    assert [e.ids.tolist() for e in encodings] == [
        tokenizer.encode(text, max_tokens=512).ids.tolist() for text in texts
    ]


async def turns_until(future: asyncio.Future[object]) -> int:
    """How many turns of a loop that has something to do in each of them."""
    turns = 0
    while not future.done():
        time.sleep(0.002)  # noqa: ASYNC251 as above
        turns += 1
        await asyncio.sleep(0)
    return turns


@pytest.mark.anyio
async def test_tokenizing_takes_turns(golden_checkpoint: Path) -> None:
    inputs = InputTokenizer(NVEmbedTokenizer.from_dir(golden_checkpoint), 512, Truncation.NONE)
    tokenizing = Tokenizing(inputs)
    job = EmbedJob([f"text {number}" for number in range(2048)])
    running = asyncio.ensure_future(tokenizing.on_thread(job, tokenizing.expected_work(job)))
    assert await turns_until(running) >= 2048 // 64
    assert len(await running) == 2048
    tokenizing.close()


def test_a_large_body_takes_turns(golden_checkpoint: Path) -> None:
    size = 16 * 2**20
    with in_process(golden_checkpoint) as server:
        answered: asyncio.Future[object] = server.loop.create_future()
        counting = asyncio.run_coroutine_threadsafe(turns_until(answered), server.loop)
        assert server.embed(input="x", user="u" * size).status_code == 200
        server.call(lambda: answered.set_result(None))
        assert counting.result(60) >= size // 2**16
