"""CUDA graphs: the forward of a small batch is recorded once for each size and replayed.

With few tokens a GPU waits for Python, which launches some hundred kernels one after another; a
graph is one launch. A recording has fixed shapes and addresses, so a batch is laid into buffers of
the next larger size: empty sequences behind the last one, then one of filler rows up to the end,
so that each row is some sequence's and nothing stays unwritten (FlashAttention 2 forgives NaN left
in memory, its successors need not); and as the longest sequence the whole buffer. Kernels that read
lengths on the host cannot be recorded, nor can LLM.int8, which looks for outliers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.batch import Encoding
from model.errors import UnsupportedError
from model.families import Pooled
from model.packing import PackedBatch, Segments, pack

logger = logging.getLogger("nv_embed.cuda_graphs")

SIZES = (16, 32, 64, 128, 256)
"""Tokens of the recordings: beyond, the GPU has more to do than Python. None is 1: with 1 as the
longest sequence FlashAttention lays rows out in a way that fails for empty ones."""
MAX_SEQS = 16
RECORDABLE = ("flash-attn", "varlen")

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Takes what to run; gives what runs the same again and returns the same tensor, overwritten."""


def check(device: torch.device, kernel: str, quantization: str) -> None:
    """Raise UnsupportedError, with the reason, where nothing can be recorded."""
    if device.type != "cuda":
        raise UnsupportedError(f"CUDA graphs need a GPU, not {device}")
    if kernel not in RECORDABLE:
        raise UnsupportedError(
            f"CUDA graphs need attention {' or '.join(RECORDABLE)}: not {kernel}"
        )
    if quantization == "int8":
        raise UnsupportedError("CUDA graphs cannot hold LLM.int8: take float8")


def wanted(
    graphs: bool | Literal["auto"], device: torch.device, kernel: str, quantization: str
) -> bool:
    """Whether to record: "auto" where it can be. Raises UnsupportedError where it was asked for
    and cannot be."""
    try:
        check(device, kernel, quantization)
    except UnsupportedError:
        if graphs is True:
            raise
        return False
    return bool(graphs)


def record_or_warn(
    forward: Callable[[PackedBatch], Tensor], device: torch.device, *, pooled: Pooled = "text"
) -> GraphedForward | None:
    """None, with a warning that has the reason, when the recording fails: the same batches run
    without, a little later."""
    try:
        return GraphedForward(forward, device, pooled=pooled)
    except RuntimeError as error:  # torch's, lack of memory included
        # What ended the recording; ending it has failed, too, and says no more than that.
        reason = error.__context__ or error
        logger.warning("CUDA graphs cannot be recorded, serving without them: %s", reason)
    return None


@dataclass(frozen=True, slots=True, eq=False)
class _Recording:
    host: Tensor  # int32, laid out as `_parts`
    device: Tensor  # the same there, which the recorded kernels read
    replay: Callable[[], Tensor]  # -> [MAX_SEQS + 1, D], the filler's vector last


class GraphedForward:
    """`forward` of batches up to the largest of SIZES, recorded when this is made."""

    def __init__(
        self,
        forward: Callable[[PackedBatch], Tensor],
        device: torch.device,
        record: Record | None = None,
        *,
        pooled: Pooled = "text",
    ) -> None:
        """pooled: which rows of each sequence the family pools."""
        self._pooled = pooled
        record = record or recorder(device)
        self._recordings: dict[int, _Recording] = {}
        for size in reversed(SIZES):  # the largest first: the others fit into its memory
            host = _buffer(size)
            host = host.pin_memory() if device.type == "cuda" else host
            there = host.to(device, copy=True)
            batch = _batch_in(there, size)
            self._recordings[size] = _Recording(
                host,
                there,
                record(lambda batch=batch: forward(batch)),  # type: ignore[misc]
            )

    def __call__(self, encodings: Sequence[Encoding]) -> Tensor | None:
        """[N, D], to be read before the next call; None for a batch that is too large, or has
        spans."""
        tokens = sum(map(len, encodings))
        if tokens > SIZES[-1] or len(encodings) > MAX_SEQS:
            return None
        if any(encoding.span is not None for encoding in encodings):
            return None
        size = next(size for size in SIZES if tokens <= size)
        recording = self._recordings[size]
        batch = pack(encodings, torch.device("cpu"), pooled=self._pooled)
        _lay(batch, recording.host, size)
        recording.device.copy_(recording.host, non_blocking=True)
        return recording.replay()[: len(encodings)]


def _parts(size: int) -> list[int]:
    """Ids, positions, pooled rows, bounds of the sequences and of their pooled rows, in each the
    filler's as one more."""
    return [size, size, size, MAX_SEQS + 2, MAX_SEQS + 2]


def _buffer(size: int) -> Tensor:
    """On the host, with nothing in it but filler."""
    buffer = torch.zeros(sum(_parts(size)), dtype=torch.int32)
    for bounds in torch.split(buffer, _parts(size))[3:]:
        bounds[-1] = size
    return buffer


def _batch_in(buffer: Tensor, size: int) -> PackedBatch:
    ids, positions, pool_rows, bounds, pooled = torch.split(buffer, _parts(size))
    lengths = (0,) * (MAX_SEQS + 1)  # nobody reads them: they change from replay to replay
    return PackedBatch(
        ids,
        positions,
        Segments(lengths, bounds, size),
        pool_rows,
        Segments(lengths, pooled, size),
    )


def _lay(batch: PackedBatch, host: Tensor, size: int) -> None:
    """Write `batch` into a buffer of `size`: filler is id 0 at position 0, and what is pooled
    beyond the last sequence is row 0 again. Both belong to the sequence behind MAX_SEQS."""
    rows = np.arange(batch.num_tokens) if batch.pool_rows is None else batch.pool_rows.numpy()
    parts = [batch.input_ids.numpy(), batch.positions.numpy(), rows]
    bounds = [batch.seqs.cu_seqlens.numpy(), batch.pooled.cu_seqlens.numpy()]
    modes = ["constant"] * 3 + ["edge"] * 2
    targets = [target.numpy() for target in torch.split(host, _parts(size))]
    targets[3:] = [target[:-1] for target in targets[3:]]  # the filler always ends at the end
    for target, values, mode in zip(targets, parts + bounds, modes, strict=True):
        target[:] = np.pad(values, (0, len(target) - len(values)), mode=mode)  # type: ignore[call-overload]


def recorder(device: torch.device) -> Record:
    """Records on `device`, all recordings in one pool of memory."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # memory is kept by stream

    def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with torch.cuda.device(device):  # or torch would wake the first one
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # what the first use makes must not be made in the recording
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    return record
