"""A real server whose model is exchanged on disk again and again: no answer is ever the other
model's.

Only in the long form (`make chaos`): each round starts workers that load torch.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.server.engine.test_checkpoint_changes import CHANGED, SHARD, change_weights
from tests.server.processes import serving

pytestmark = pytest.mark.skipif(
    os.environ.get("CHAOS") != "full", reason="minutes long: make chaos runs it"
)
ROUNDS = 8


def test_weights_exchanged_at_random_under_load(golden_checkpoint: Path, tmp_path: Path) -> None:
    folder, kept, dice = tmp_path / "golden", tmp_path / "kept", random.Random(31)
    shutil.copytree(golden_checkpoint, folder)
    shutil.copyfile(folder / SHARD, kept)
    options = ("--devices", "cpu,cpu", "--cache-bytes", "0", "--no-access-log")
    with serving(folder, *options, log=tmp_path / "log") as server:
        server.wait_for_metric("nv_embed_workers_ready", 2)
        [expected] = server.vectors(input="the same text")
        answers = 0

        async def exchange() -> None:
            for _ in range(ROUNDS):
                change_weights(folder)
                await asyncio.sleep(dice.uniform(0, 2))
                if await asyncio.to_thread(server.metric, "nv_embed_workers_ready") == 2:
                    os.kill(dice.choice(server.worker_pids()), signal.SIGKILL)
                await asyncio.sleep(dice.uniform(0, 6))
                shutil.copyfile(kept, folder / "new")
                (folder / "new").rename(folder / SHARD)
                await asyncio.sleep(dice.uniform(0, 6))

        async def ask(exchanging: asyncio.Task[None]) -> None:
            nonlocal answers
            while not exchanging.done():
                answer = await asyncio.to_thread(server.embed, input="the same text")
                assert answer.status_code in (200, 503), answer.text
                if answer.status_code == 200:
                    got = answer.json()["data"][0]["embedding"]
                    np.testing.assert_allclose(got, expected, atol=1e-6)
                    answers += 1
                await asyncio.sleep(0.02)

        async def run() -> None:
            exchanging = asyncio.create_task(exchange())
            await ask(exchanging)
            await exchanging

        asyncio.run(run())
        assert answers > 100
        assert server.says(CHANGED), server.log
        server.wait_for_metric("nv_embed_workers_ready", 2)


def test_the_only_worker_finds_another_model(golden_checkpoint: Path, tmp_path: Path) -> None:
    """Nobody is served rather than served by another model, until the files are back."""
    folder = Path(shutil.copytree(golden_checkpoint, tmp_path / "golden"))
    kept = (folder / "config.json").read_text()
    with serving(folder, log=tmp_path / "log") as server:
        raw = json.loads(kept)
        raw["text_config"]["rope_theta"] = 20_000.0
        (folder / "config.json").write_text(json.dumps(raw))
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        server.wait_until(lambda: CHANGED in server.log, "refused")
        refused = server.embed(input="x")
        assert refused.status_code == 503
        (folder / "config.json").write_text(kept)
        server.wait_ready()
        assert server.embed(input="x").status_code == 200
