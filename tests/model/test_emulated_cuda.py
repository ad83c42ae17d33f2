"""The whole runner as on a GPU, with real values, on an emulated one (`emulated_cuda`).

Held against the CPU's float32, so that what is compared was not computed by the same branch. The
table of faults at the end plants what these checks are for, one fault a row, and shows that they
find it. What no emulation can show is named in `emulated_cuda`: nothing asynchronous, no kernel's
numerics or speed, no fragmentation, no driver. That takes a card: `make gpu-check`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import logging
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import cuda_graphs, fused, packing, poolers, rotary
from model.attention import kernels
from model.batch import Encoding, RunnerOptions
from model.errors import UnsupportedError
from model.fitting import FittingRunner
from model.linear import quantization
from model.runner import ModelRunner
from tests.model import emulated_kernels, fused_stand_in
from tests.model.emulated_cuda import GUARD_TABLE, device_guard, emulated
from tests.model.emulated_device import CUDA, Graph
from tests.model.emulated_kernels import Kernel, RefusedError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
needs_varlen = pytest.mark.skipif(
    importlib.util.find_spec("torch.nn.attention.varlen") is None,
    reason="this torch has no varlen_attn",
)


def encoding(length: int, pool_start: int = 0) -> Encoding:
    return Encoding((np.arange(length, dtype=np.int32) * 7 + length) % 90 + 3, pool_start)


BATCHES = [
    [encoding(40, 13), encoding(5, 1), encoding(17)],
    [encoding(9)],
    [encoding(1)],
    [encoding(64, 63), encoding(64, 10)],  # fills a recording, and leaves filler in its pool
    [encoding(7, 6), encoding(9, 8)],  # one pooled row each
    [encoding(3)] * cuda_graphs.MAX_SEQS,
    [encoding(200, 20), encoding(90)],  # too large for a recording
]


def options(path: Path, **changed: Any) -> RunnerOptions:
    plain = {"device": "cuda", "max_batch_tokens": 256, "max_input_tokens": 300}
    return RunnerOptions(str(path), **{**plain, **changed})


@pytest.fixture(scope="module")
def expected(golden_checkpoint: Path) -> list[np.ndarray]:
    """The vectors of BATCHES in float32 on the CPU."""
    runner = ModelRunner(options(golden_checkpoint, device="cpu", dtype="float32"))
    return [runner.embed(batch) for batch in BATCHES]


def cosines(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(others, axis=1)
    return (rows * others).sum(axis=1) / lengths  # type: ignore[no-any-return]


Check = Callable[..., None]


@pytest.fixture
def check(
    golden_checkpoint: Path, expected: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> Check:
    """Runs BATCHES on an emulated GPU: the vectors are right, the host waits once a forward, and
    attention leaves no row unwritten."""
    flash = emulated_kernels.KERNELS["_flash_attention_forward"]

    def run_whole(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        assert flash.run is not None
        out: tuple[Tensor, ...] = flash.run(*args, **kwargs)
        assert not out[0].isnan().any(), "attention left rows unwritten"
        return out

    whole = Kernel(flash.check, run_whole)
    monkeypatch.setitem(emulated_kernels.KERNELS, "_flash_attention_forward", whole)
    # A recording that fails is to end the test.
    monkeypatch.setattr(cuda_graphs, "record_or_warn", cuda_graphs.GraphedForward)

    def run(
        least: float, runs: str | None = None, capability: tuple[int, int] = (9, 0), **changed: Any
    ) -> None:
        with emulated(capability) as gpu:
            runner = ModelRunner(options(golden_checkpoint, **changed))
            runner.warm_up()
            info = runner.info
            assert info.cuda_graphs == changed.get("cuda_graphs", False)
            assert info.fused_kernels == changed.get("fused_kernels", "plain")
            assert runs in (None, f"{info.dtype} {info.attention}"), info
            for batch, vectors in zip(BATCHES, expected, strict=True):
                gpu.waits.clear()
                rows = runner.embed(batch)
                assert gpu.waits == ["a copy to the host"]
                found = cosines(rows, vectors)
                assert (found >= least).all(), f"cosines {found} of {batch}"
            runner.close()

    return run


# -- the runner ------------------------------------------------------------------------------


@needs_varlen
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize(("how", "least"), [("none", 0.9995), ("float8", 0.98)])
def test_the_runner(check: Check, how: str, least: float, graphs: bool) -> None:
    check(least, "bfloat16 varlen", quantization=how, cuda_graphs=graphs)


@needs_varlen
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize(("how", "least"), [("none", 0.9995), ("float8", 0.98)])
def test_the_runner_with_fused_kernels(
    check: Check, how: str, least: float, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: Counter[str] = Counter()

    def launch(kernel: str, programs: int, *args: Any, **constants: Any) -> None:
        launched[kernel] += 1
        fused_stand_in.launch(kernel, programs, *args, **constants)

    monkeypatch.setitem(fused.LAUNCHES, "triton", (lambda: launch, lambda device: None))
    check(least, "bfloat16 varlen", quantization=how, cuda_graphs=graphs, fused_kernels="triton")
    eight_bit = {"to_float8"} if how == "float8" else set()
    assert launched.keys() == {"add_norm", "silu_up", "rotate"} | eight_bit


@pytest.mark.parametrize(
    ("capability", "changed", "runs"),
    [
        ((7, 5), {}, "float16 padded"),  # a T4 has no bfloat16 units
        ((7, 5), {"dtype": "bfloat16"}, "bfloat16 padded"),  # asked for, it gets it
        ((9, 0), {"dtype": "float32"}, "float32 padded"),
        ((9, 0), {"attention": "sdpa"}, "bfloat16 sdpa"),
        ((9, 0), {"attention": "padded"}, "bfloat16 padded"),
    ],
)
def test_other_cards_and_kernels(
    check: Check,
    capability: tuple[int, int],
    changed: dict[str, Any],
    runs: str,
) -> None:
    check(0.9995 if "bfloat16" in runs else 0.99999, runs, capability, **changed)


def test_float8_is_refused_before_ada(golden_checkpoint: Path) -> None:
    with emulated((8, 6)), pytest.raises(UnsupportedError, match=r"capability 8\.9"):
        ModelRunner(options(golden_checkpoint, quantization="float8"))


@needs_varlen
def test_a_recording_that_fails_is_told_of_and_done_without(
    golden_checkpoint: Path,
    expected: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def failing(graph: Graph, **_: Any) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    with emulated() as gpu:
        runner = ModelRunner(options(golden_checkpoint, cuda_graphs=True))
        assert runner.info.cuda_graphs
        monkeypatch.setattr(torch.cuda, "graph", failing)
        with caplog.at_level(logging.WARNING):
            runner.warm_up()
        assert "serving without them: CUDA error: operation not permitted" in caplog.text
        assert not runner.info.cuda_graphs
        assert cosines(runner.embed(BATCHES[0]), expected[0]).min() > 0.9995
        assert gpu.launches["graph"] == 0


@needs_varlen
@pytest.mark.parametrize(
    ("capability", "changed", "recorded"),
    [
        ((9, 0), {}, True),
        ((7, 5), {}, False),
        ((9, 0), {"attention": "sdpa"}, False),
        ((9, 0), {"cuda_graphs": False}, False),
    ],
)
def test_graphs_where_they_can_be_recorded(
    golden_checkpoint: Path, capability: tuple[int, int], changed: dict[str, Any], recorded: bool
) -> None:
    with emulated(capability):
        runner = ModelRunner(options(golden_checkpoint, **{"cuda_graphs": "auto", **changed}))
        assert runner.info.cuda_graphs is recorded
        runner.close()


def test_a_lack_of_memory_halves_batches(
    golden_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [encoding(64, n) for n in range(8)]
    long = encoding(600)
    with emulated() as gpu:
        runner = ModelRunner(options(golden_checkpoint))
        vectors = runner.embed(batch)  # 512 tokens
        resting, gpu.peak = gpu.used, gpu.used
        runner.embed(batch[:5])  # 320
        gpu.memory = gpu.peak
        held: list[int] = []
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(gpu.used))
        fitting = FittingRunner(runner)
        rows, too_large = fitting.embed([*batch, long])
        assert too_large == [8]
        assert cosines(rows[:8], vectors).min() > 0.9999
        assert fitting.budget is not None
        assert 256 <= fitting.budget < 512
        assert gpu.used == resting
        assert set(held) == {resting}, "a failed forward is held while its memory is handed back"


def test_what_loading_cannot_hold_is_out_of_memory(golden_checkpoint: Path) -> None:
    with emulated(memory=3_000_000), pytest.raises(torch.OutOfMemoryError):
        ModelRunner(options(golden_checkpoint))


# -- the emulation itself --------------------------------------------------------------------


def test_the_private_table_is_where_it_was() -> None:
    """The emulation borrows a device guard from it: when torch renames it, here is the name."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    assert hasattr(library, GUARD_TABLE), f"c10 has no {GUARD_TABLE}: see emulated_cuda"
    table = (ctypes.c_void_p * 15).in_dll(library, GUARD_TABLE)
    before = table[1]
    with device_guard():
        assert table[1] == table[14]
    assert table[1] == before


def test_what_a_gpu_refuses() -> None:
    with emulated(memory=10_000) as gpu:
        x = torch.ones(4, 4, device="cuda")
        with pytest.raises(RefusedError, match="cuda:0 and cpu"):
            x + torch.ones(4)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(10_000, device="cuda")
        for read in (x.sum().item, x.cpu, x.nonzero, lambda: x[x > 0], lambda: x.copy_(x.cpu())):
            gpu.waits.clear()
            read()
            assert gpu.waits, read
            with pytest.raises(RefusedError, match="capturing"), gpu.recording(Graph()):
                read()
        assert (x + torch.tensor(1.0)).device == CUDA


def test_memory_that_nobody_wrote_and_memory_given_back() -> None:
    with emulated() as gpu:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
            assert torch.empty(3, dtype=dtype, device="cuda").cpu().float().isnan().all()
        assert torch.empty(3, dtype=torch.int32, device="cuda").cpu().tolist() == [-1] * 3
        kept = torch.zeros(1024, device="cuda")
        view = kept[:10]
        assert gpu.used == 4096
        del kept
        assert gpu.used == 4096
        del view
        assert gpu.used == 0


def test_a_recording_is_replayed_on_the_same_storages() -> None:
    with emulated() as gpu:
        x = torch.ones(4, device="cuda")
        graph = Graph()
        with gpu.recording(graph):
            out = (x * 2)[1:]
            out.add_(1)
        x.fill_(5)
        assert out.cpu().tolist() == [3.0] * 3
        for _ in range(2):
            graph.replay()
            assert out.cpu().tolist() == [11.0] * 3


def test_an_upload_waits_unless_it_comes_from_pinned_memory() -> None:
    with emulated() as gpu:
        host = torch.ones(4)
        for source, waits in ((host, 1), (host.pin_memory(), 0)):
            gpu.waits.clear()
            source.to("cuda", non_blocking=True)
            assert len(gpu.waits) == waits


# -- planted faults --------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def edited(owner: ModuleType, function: str, old: str, new: str) -> Plant:
    """`function` of the module `owner`, with `new` in the place of `old`."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        source = textwrap.dedent(inspect.getsource(getattr(owner, function)))
        assert old in source, f"{function} has changed: plant the fault anew"
        planted: dict[str, Any] = {}
        source = "from __future__ import annotations\n" + source.replace(old, new)
        exec(source, vars(owner), planted)  # noqa: S102
        monkeypatch.setattr(owner, function, planted[function])

    return plant


def replaced(owner: object, name: str, value: Callable[[Any], Any]) -> Plant:
    """`value` of what `name` of `owner` is."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value(getattr(owner, name)))


@dataclass(frozen=True)
class Fault:
    plant: Plant
    found: str  # the message, as a pattern
    float8: bool = False
    graphs: bool = False


FAULTS = {
    "segment_reduce reads its lengths on the host": Fault(
        edited(poolers, "_reduced", "unsafe=True", "unsafe=False"),
        r"segment_reduce checks its lengths",
    ),
    "the same in a recording": Fault(
        edited(poolers, "_reduced", "unsafe=True", "unsafe=False"),
        r"segment_reduce checks its lengths: operation not permitted",
        graphs=True,
    ),
    "a float8 weight lies row by row": Fault(
        replaced(
            quantization.Float8Linear,
            "laid_out",
            lambda _: classmethod(lambda cls, values: values.T.contiguous()),
        ),
        "second matrix must be column-major",
        float8=True,
    ),
    "a recording's max_seqlen is too small": Fault(
        edited(cuda_graphs, "_batch_in", "bounds, size)", "bounds, 16)"),
        "longer than max_seqlen",
        graphs=True,
    ),
    "bounds are int64": Fault(
        edited(packing, "_bounds", ".astype(np.int32)", ".astype(np.int64)"),
        "cu_seqlens must have dtype int32",
    ),
    "float8's scales are bfloat16": Fault(
        edited(quantization, "float8_rows", "scales.float())", "scales.bfloat16())"),
        "a scale must be float32, not torch.bfloat16",
        float8=True,
    ),
    "the angles' exponents are on the CPU": Fault(
        edited(rotary, "_frequencies", "device=device", 'device="cpu"'),
        "found cuda:0 and cpu",
    ),
    "max_seqlen is read back from the device": Fault(
        edited(packing, "_segments", "int(lengths.max())", "int(cu_seqlens.diff().max().item())"),
        "the result of _local_scalar_dense",
    ),
    "empty sequences end at 0": Fault(
        edited(cuda_graphs, "_lay", '["edge"] * 2', '["constant"] * 2'),
        "bounds that fall",
        graphs=True,
    ),
    "a recording's filler is of no sequence": Fault(
        edited(cuda_graphs, "_buffer", "bounds[-1] = size", "pass"),
        "attention left rows unwritten",
        graphs=True,
    ),
    "an upload comes from memory that is not pinned": Fault(
        edited(packing, "_upload", "host = host.pin_memory()", "pass"),
        "a copy from the host",
    ),
    "a recording's positions stay 0": Fault(
        edited(cuda_graphs, "_lay", "batch.positions.numpy()", "0 * batch.positions.numpy()"),
        "cosines",
        graphs=True,
    ),
    "a kernel's output is not put where the next one reads": Fault(
        edited(
            kernels,
            "varlen_kernel",
            "return attend(",
            "return torch.empty_like(q) if q.is_cuda else attend(",
        ),
        "NaN or infinite",
    ),
}


@needs_varlen
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_found(
    check: Check, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault.plant(monkeypatch)
    least, quantize = (0.98, "float8") if fault.float8 else (0.9995, "none")
    with pytest.raises((RefusedError, AssertionError, UnsupportedError), match=fault.found):
        check(least, quantization=quantize, cuda_graphs=fault.graphs)
