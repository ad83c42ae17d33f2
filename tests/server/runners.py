"""Runners that stand in for the model inside a real worker (`--runner tests.server.runners:NAME`).

A vector is computed from its ids, so that a test can tell whether each answer belongs to its
question. What they shall do besides is in the environment, which workers inherit:

FAKE_BATCH_LOG   a file that gets a line of JSON for each batch: pid, and `key_of` of each input
FAKE_SECONDS     how long a batch takes
FAKE_RATE        inputs a second (Paced)
FAKE_HELD        a file; while it exists, batches wait (Held)
FAKE_ONCE        a folder; whoever makes trouble only once does so while it holds a file with the
                 name of the options' path, and removes that
FAKE_SAYS        what to send to the front, in hexadecimal, by the options' path (Rambling)
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np

from model.batch import Encoding, RunnerInfo, RunnerOptions
from model.config import ModelConfig
from model.errors import UnsupportedError
from model.fingerprint import fingerprint, require

if TYPE_CHECKING:
    from model.runner import ModelRunner

WIDTH = 64
MARK = 31999
"""The id on which the troublesome runners make trouble; no text in the tests has it by chance."""


def key_of(ids: Sequence[int]) -> int:
    """A number that identifies an input."""
    return zlib.crc32(np.asarray(ids, dtype="<i4").tobytes())


def vector_of(ids: Sequence[int]) -> np.ndarray:
    """The vector that stands for these ids, float32 [WIDTH]."""
    vector = np.random.default_rng(key_of(ids)).standard_normal(WIDTH)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class Hashing:
    """The well-behaved one."""

    def __init__(self, options: RunnerOptions) -> None:
        self.info = RunnerInfo(
            options.device,
            "fake",
            "float32",
            "none",
            "fake",
            WIDTH,
            fused_kernels=options.fused_kernels,
        )
        self._seconds = float(os.environ.get("FAKE_SECONDS", "0"))
        self._log = os.environ.get("FAKE_BATCH_LOG")

    def embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        if self._log is not None:
            keys = [key_of(encoding.ids) for encoding in encodings]
            with Path(self._log).open("a") as log:
                log.write(json.dumps({"pid": os.getpid(), "keys": keys}) + "\n")
        time.sleep(self._seconds)
        return np.stack([self.row(encoding) for encoding in encodings])

    def row(self, encoding: Encoding) -> np.ndarray:
        return vector_of(encoding.ids)

    def warm_up(self) -> None: ...

    def close(self) -> None: ...


class Held(Hashing):
    """It waits for whoever tests."""

    def embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        while Path(os.environ["FAKE_HELD"]).exists():
            time.sleep(0.01)
        return super().embed(encodings)


class Paced(Hashing):
    """A device of a known speed, whatever the size of its batches."""

    def embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        time.sleep(len(encodings) / float(os.environ["FAKE_RATE"]))
        return super().embed(encodings)


class Null(Hashing):
    """It computes nothing."""

    def embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        return np.zeros((len(encodings), WIDTH), dtype=np.float32)


class Wide(Hashing):
    """As wide as the checkpoint's config says: its vectors are WIDTH values, repeated."""

    def __init__(self, options: RunnerOptions) -> None:
        super().__init__(options)
        self._width = ModelConfig.from_dir(Path(options.path)).hidden_size
        self.info = RunnerInfo(options.device, "fake", "float32", "none", "fake", self._width)

    def row(self, encoding: Encoding) -> np.ndarray:
        times = self._width // WIDTH
        return np.tile(super().row(encoding), times) / np.float32(np.sqrt(times))


class Failing(Hashing):
    """A batch with the mark raises."""

    def row(self, encoding: Encoding) -> np.ndarray:
        if MARK in encoding.ids:
            raise RuntimeError("the mark was seen")
        return super().row(encoding)


class NotANumber(Hashing):
    """An input with the mark gets NaN."""

    def row(self, encoding: Encoding) -> np.ndarray:
        return super().row(encoding) * (np.nan if MARK in encoding.ids else 1)


class Dying(Hashing):
    """An input with the mark kills the process."""

    def row(self, encoding: Encoding) -> np.ndarray:
        if MARK in encoding.ids:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().row(encoding)


class Hanging(Hashing):
    """An input with the mark is never answered."""

    def row(self, encoding: Encoding) -> np.ndarray:
        if MARK in encoding.ids:
            time.sleep(3600)
        return super().row(encoding)


class Cramped(Hashing):
    """It has memory for 64 tokens at once."""

    def embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        if sum(map(len, encodings)) > 64:
            raise MemoryError
        return super().embed(encodings)


class Greedy(Hashing):
    """Its process may have 64 MB more than it starts with; an input with the mark takes 1 GB."""

    def __init__(self, options: RunnerOptions) -> None:
        super().__init__(options)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + 64 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def row(self, encoding: Encoding) -> np.ndarray:
        if MARK in encoding.ids:
            np.ones(2**30, dtype=np.uint8)
        return super().row(encoding)


class LosesItsDevice(Hashing):
    """It cannot start while the file FAKE_DEVICE_LOST exists."""

    def __init__(self, options: RunnerOptions) -> None:
        if Path(os.environ["FAKE_DEVICE_LOST"]).exists():
            raise UnsupportedError("the device is gone")
        super().__init__(options)


class OfItsCheckpoint(Hashing):
    """Its vectors are those of the weights on disk when it started, which it compares as the real
    runner does."""

    def __init__(self, options: RunnerOptions) -> None:
        super().__init__(options)
        assert options.fingerprint is not None
        require(Path(options.path), options.fingerprint)
        self._weights = int(fingerprint(Path(options.path))[:7], 16)

    def row(self, encoding: Encoding) -> np.ndarray:
        return vector_of([*encoding.ids, self._weights])


class Refusing(Hashing):
    """It can never start."""

    def __init__(self, options: RunnerOptions) -> None:
        raise UnsupportedError("this runner refuses to start")


def _once(path: str) -> bool:
    """Whether the trouble is still to be made."""
    try:
        Path(os.environ["FAKE_ONCE"], path).unlink()
    except FileNotFoundError:
        return False
    return True


def _ramble(path: str) -> None:
    """Send something, where the worker's own frames go, and no more."""
    socket = int(sys.argv[1])
    os.write(socket, bytes.fromhex(json.loads(os.environ["FAKE_SAYS"])[path]))
    time.sleep(3600)


class Choosing(Hashing):
    """It chooses by chance, unless it is told what was chosen; that fails once."""

    def __init__(self, options: RunnerOptions) -> None:
        super().__init__(options)
        if options.products and _once(options.path):
            raise UnsupportedError("what was chosen cannot be had any more")
        chosen = options.products or {"float32": f"chance {os.getpid()}"}
        dtype = "float32" if options.dtype == "auto" else options.dtype
        self.info = dataclasses.replace(self.info, dtype=dtype, products=chosen)


class StoppedWhileLoading(Hashing):
    """Once."""

    def __init__(self, options: RunnerOptions) -> None:
        if _once(options.path):
            os.kill(os.getpid(), signal.SIGSTOP)
        super().__init__(options)


class Rambling(Hashing):
    """It sends FAKE_SAYS in place of its greeting, once."""

    def __init__(self, options: RunnerOptions) -> None:
        if _once(options.path):
            _ramble(options.path)
        super().__init__(options)


class WithoutThreads(Hashing):
    """Once."""

    def __init__(self, options: RunnerOptions) -> None:
        if _once(options.path):
            raise RuntimeError("can't start new thread")
        super().__init__(options)


class Troubled(Hashing):
    """The mark makes trouble, once."""

    def __init__(self, options: RunnerOptions) -> None:
        super().__init__(options)
        self._path = options.path

    def embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        if any(MARK in encoding.ids for encoding in encodings) and _once(self._path):
            self.trouble()
        return super().embed(encodings)

    def trouble(self) -> None: ...


class RamblingOnMark(Troubled):
    """It sends FAKE_SAYS in place of an answer."""

    def trouble(self) -> None:
        _ramble(self._path)


class AnswersTwice(Troubled):
    """From then on."""

    def trouble(self) -> None:
        from server.engine import worker

        send = worker._Connection.send
        worker._Connection.send = lambda self, data: send(self, data + data)


class HangsOnce(Troubled):
    def trouble(self) -> None:
        time.sleep(3600)


class Narrow(Hashing):
    """Its vectors are shorter than the checkpoint's."""

    def __init__(self, options: RunnerOptions) -> None:
        super().__init__(options)
        self.info = RunnerInfo(options.device, "fake", "float32", "none", "fake", WIDTH // 2)


def without_private_operations(options: RunnerOptions) -> ModelRunner:
    """The model on a torch that has none of the operations that are private to it."""
    import torch

    from model.runner import ModelRunner

    torch.ops = SimpleNamespace()
    return ModelRunner(options)


class Starting(Hashing):
    """Each start takes a line from the file of the options' path in the folder FAKE_STARTS: `exit
    N`, `signal N`, `no thread`, or what to raise; without lines it is well."""

    def __init__(self, options: RunnerOptions) -> None:
        file = Path(os.environ["FAKE_STARTS"], options.path)
        line, *rest = file.read_text().splitlines() or [""]
        file.write_text("\n".join(rest))
        verb, _, number = line.partition(" ")
        if verb == "exit":
            os._exit(int(number))
        if verb == "signal":
            os.kill(os.getpid(), int(number))
        if line:
            raise RuntimeError("can't start new thread" if line == "no thread" else line)
        super().__init__(options)


class Visible(Hashing):
    """It tells what CUDA would see, and finds no device unless the file FAKE_GPUS lists it."""

    def __init__(self, options: RunnerOptions) -> None:
        super().__init__(options)
        mask = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        if mask not in Path(os.environ["FAKE_GPUS"]).read_text().split():
            raise UnsupportedError(f"{options.device}: no CUDA device is visible")
        seen = {"mask": mask, "allocator": os.environ.get("PYTORCH_ALLOC_CONF")}
        self.info = RunnerInfo(options.device, json.dumps(seen), "float32", "none", "fake", WIDTH)


class FailingOnCuda(Failing):
    """A GPU that the mark hits; whether it answers after that is in FAKE_GPU: well or dead."""

    def __init__(self, options: RunnerOptions) -> None:
        super().__init__(options)
        self.info = RunnerInfo("cuda:0", "fake", "float32", "none", "fake", WIDTH)
        sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(synchronize=self._wait))

    def _wait(self, device: str) -> None:
        assert device == "cuda:0"
        if os.environ["FAKE_GPU"] == "dead":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class TooLarge(Hashing):
    """Its model does not fit."""

    def warm_up(self) -> None:
        raise MemoryError
