"""What happens when a batch does not fit into memory."""

from __future__ import annotations

import platform
import subprocess
import sys
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from model.batch import BatchLimits, Encoding, RunnerOptions
from model.encoder import Encoder
from model.errors import NoMemoryError
from model.fitting import FittingRunner, is_out_of_memory, loses_device
from model.tokenizer import NVEmbedTokenizer
from tests.server.runners import MARK, Hashing, vector_of


class Narrow(Hashing):
    """It has memory for 20 tokens at once."""

    room = 20

    def __init__(self) -> None:
        super().__init__(RunnerOptions(path=""))
        self.tried: list[list[int]] = []

    def embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        self.tried.append([len(encoding) for encoding in encodings])
        if sum(map(len, encodings)) > self.room:
            raise MemoryError
        return super().embed(encodings)


class GreedyOnMark(Hashing):
    def row(self, encoding: Encoding) -> np.ndarray:
        if MARK in encoding.ids:
            raise MemoryError
        return super().row(encoding)


def test_a_batch_that_does_not_fit_is_halved_and_the_budget_kept() -> None:
    runner = Narrow()
    fitting = FittingRunner(runner)
    inputs = [Encoding(np.full(8, number, dtype=np.int32)) for number in range(6)]
    for _ in range(2):
        rows, too_large = fitting.embed(inputs)
        assert too_large == []
        np.testing.assert_array_equal(rows, np.stack([vector_of(e.ids) for e in inputs]))
    assert runner.tried[0] == [8] * 6
    assert fitting.budget == 12
    second_time = runner.tried[runner.tried.index([8], 3) :]
    assert [8] * 6 not in second_time


def test_an_input_that_does_not_fit_alone_is_named() -> None:
    inputs = [Encoding(np.full(n, n, dtype=np.int32)) for n in (8, 30, 9)]
    rows, too_large = FittingRunner(Narrow()).embed(inputs)
    assert too_large == [1]
    for index in (0, 2):
        np.testing.assert_array_equal(rows[index], vector_of(inputs[index].ids))


def test_an_input_that_takes_too_much_memory_leaves_the_others_their_batches() -> None:
    fitting = FittingRunner(GreedyOnMark(RunnerOptions(path="")))
    inputs = [Encoding(np.full(8, number, dtype=np.int32)) for number in range(6)]
    fitting.embed(inputs)
    poison = Encoding(np.array([1, MARK, 2], dtype=np.int32))
    _, too_large = fitting.embed([*inputs, poison])
    assert too_large == [6]
    assert fitting.budget == 48


def test_less_room_than_before_is_learnt_and_kept() -> None:
    runner = Narrow()
    fitting = FittingRunner(runner)
    fitting.embed([Encoding(np.full(2, number, dtype=np.int32)) for number in range(6)])
    inputs = [Encoding(np.full(8, number, dtype=np.int32)) for number in range(6)]
    fitting._most_done = 48  # as if these had fitted once, before another program took memory
    for _ in range(2):
        rows, too_large = fitting.embed(inputs)
        assert too_large == []
        np.testing.assert_array_equal(rows, np.stack([vector_of(e.ids) for e in inputs]))
    failed = [part for part in runner.tried if sum(part) > runner.room]
    fitting.embed(inputs)
    assert [part for part in runner.tried if sum(part) > runner.room] == failed


def no_memory_on_the_cpu() -> Exception:
    """What torch itself raises."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    return caught.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (no_memory_on_the_cpu(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("std::bad_alloc"), True),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("could not create a primitive"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_a_lack_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def accelerator_error(code: object, text: str = "CUDA error: …") -> Exception:
    """As torch raises it on a GPU: the driver's number is an attribute of the instance."""
    error = torch.AcceleratorError(text)
    error.error_code = code
    return error


@pytest.mark.parametrize(
    ("error", "memory", "device"),
    [
        (accelerator_error(2), True, False),
        (accelerator_error(2, "CUDA-Fehler"), True, False),
        (accelerator_error(700), False, True),
        (accelerator_error(710, "CUDA error: device-side assert triggered"), False, True),
        (accelerator_error(None), False, True),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), False, True),
        (type("Narrower", (torch.AcceleratorError,), {})("CUDA error"), False, True),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            True,
            False,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED"), False, False),
        (ValueError("a fault of ours"), False, False),
    ],
)
def test_what_an_error_on_a_gpu_means(error: Exception, memory: bool, device: bool) -> None:
    assert (is_out_of_memory(error), loses_device(error)) == (memory, device)


class Holding(Narrow):
    """A forward that does not fit holds its activations when it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[weakref.ref[np.ndarray]] = []

    def embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        activations = np.zeros(1 << 20, dtype=np.uint8)
        self.held.append(weakref.ref(activations))
        return super().embed(encodings)


def test_memory_is_handed_back_when_the_failed_forward_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = Holding()
    alive: list[int] = []

    def empty_cache() -> None:
        alive.append(sum(ref() is not None for ref in runner.held))

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    inputs = [Encoding(np.full(n, n, dtype=np.int32)) for n in (8, 8, 8, 30)]
    assert FittingRunner(runner).embed(inputs)[1] == [3]
    assert alive == [0, 0], "of all four, and of the one that never fits"


class NarrowTorch(Narrow):
    """It fails as torch's CPU allocator does."""

    def embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        try:
            return super().embed(encodings)
        except MemoryError:
            torch.empty(1 << 50)
            raise AssertionError from None


def test_offline_runs_halve_as_well(tokenizer: NVEmbedTokenizer) -> None:
    runner = NarrowTorch()
    encoder = Encoder.of(tokenizer, runner, BatchLimits(100, 64), max_tokens=4096)
    inputs = [f"{number}" for number in range(12)]
    vectors = encoder.encode(inputs, progress=False)
    expected = [tokenizer.encode(text, max_tokens=4096).ids for text in inputs]
    np.testing.assert_array_equal(vectors, np.stack([vector_of(ids) for ids in expected]))
    assert sum(runner.tried[0]) > runner.room
    with pytest.raises(NoMemoryError, match="even alone") as caught:
        encoder.encode(["one", "word " * 30, "two"], progress=False)
    assert caught.value.rows == (1,)


_FAULTS = """
import resource
import numpy as np
from model.batch import Encoding
from model.encoder import Encoder
encoder = Encoder(device="cpu", dtype="float32", threads=1)
batch = [Encoding(np.full(1000, 7, dtype=np.int32))]
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    encoder.embed(batch)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))  # now and then the heap grows
"""


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_offline_runs_keep_what_they_free() -> None:
    """Untold, glibc hands it back: 3,500 page faults in each such forward."""
    command = [sys.executable, "-c", _FAULTS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 200, done.stdout
