"""ModelRunner: one model on one device. list[Encoding] in, float32 rows out.

Its surface is three methods, so that anything can stand behind the server in its place
(`--runner module:factory`, a callable that takes RunnerOptions).
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from model import cuda_graphs, fused
from model.attention.cpu import sdpa_by_length
from model.attention.kernels import AttentionKernel, choose_kernel, planner_of
from model.batch import Encoding, RunnerInfo, RunnerOptions
from model.config import ModelConfig
from model.errors import UnsupportedError
from model.fingerprint import Unchanged
from model.packing import PackedBatch, pack
from model.platform import products, resources
from model.platform.cuda_device import check_architecture, driver_version, why_no_cuda
from model.platform.products import Products
from model.weights.loader import load_model
from model.weights.names import expected_shapes

logger = logging.getLogger("nv_embed.runner")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Runner(Protocol):
    """What an engine worker needs of a model."""

    info: RunnerInfo

    def embed(self, encodings: Sequence[Encoding]) -> NDArray[np.float32]:
        """-> [N, D], one row per encoding, in their order. Rows may be non-finite: check."""
        ...

    def warm_up(self) -> float | None:
        """Get ready. Returns tokens a second, as far as that shows; None: it does not."""
        ...

    def close(self) -> None: ...


class ModelRunner:
    """The real runner: a checkpoint, loaded onto `options.device`."""

    def __init__(self, options: RunnerOptions) -> None:
        """Raises CheckpointError or UnsupportedError when it cannot run."""
        if options.threads:
            torch.set_num_threads(options.threads)
        self._options = options
        unchanged = Unchanged(Path(options.path), options.fingerprint)
        self.config = ModelConfig.from_dir(Path(options.path), options.family)
        self.device = resolve_device(options.device)
        self.dtype = resolve_dtype(options.dtype, self.device, self.config, options.cpu_products)
        kernel, self._attend = choose_kernel(options.attention, self.device, self.dtype)
        graphs = cuda_graphs.wanted(options.cuda_graphs, self.device, kernel, options.quantization)
        self._graphs: cuda_graphs.GraphedForward | None = None
        kernels = fused.choose(options.fused_kernels, self.device)
        layers = products.choose(
            self.device,
            self.dtype,
            options.quantization,
            self.config.widest_product,
            options.cpu_products,
            options.products,
        )
        for probe in layers.probes:
            logger.info("products: %s", probe)
        self._pack = packer(self.config, self.device, self.dtype, layers, self._attend)
        self.model = load_model(
            Path(options.path),
            self.config,
            device=self.device,
            dtype=self.dtype,
            quantize=options.quantization,
            layers=layers,
            operations=kernels,
        )
        unchanged.check()
        self.info = RunnerInfo(
            device=str(self.device),
            device_name=device_name(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            quantization=options.quantization + layers.steps,
            attention=kernel,
            width=self.config.hidden_size,
            cuda_graphs=graphs,
            fused_kernels=options.fused_kernels,
            products=layers.names,
        )
        if self.device.type == "cpu":  # not before: what loading needs once is not worth keeping
            resources.keep_freed_memory()

    @torch.inference_mode()
    def embed(self, encodings: Sequence[Encoding]) -> NDArray[np.float32]:
        rows = self._graphs(encodings) if self._graphs is not None else None
        if rows is None:
            rows = self._forward(self._pack(encodings))
        return rows.cpu().numpy()

    def _forward(self, batch: PackedBatch) -> torch.Tensor:
        return self.model(batch, self._attend)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def warm_up(self) -> float:
        """CUDA: graphs, then the longest sequence, then a full batch, so that memory is claimed
        and kernels are chosen before the first request. CPU: one short batch.

        Raises UnsupportedError when the vectors are not finite."""
        if self.device.type != "cuda":
            return self._timed([_ramp(8)])
        options = self._options
        if self.info.cuda_graphs:  # first: recording hands free memory back
            self._graphs = cuda_graphs.record_or_warn(
                self._forward, self.device, pooled=self.config.family.pooled
            )
            self.info = dataclasses.replace(self.info, cuda_graphs=self._graphs is not None)
        self._warm([_ramp(options.max_input_tokens)])
        seqs = min(options.max_batch_seqs, max(1, options.max_batch_tokens // 32))
        return self._timed([_ramp(options.max_batch_tokens // seqs)] * seqs)

    def _timed(self, encodings: Sequence[Encoding]) -> float:
        """Tokens a second of a batch, at its second run. Raises UnsupportedError."""
        self._warm(encodings)
        started = time.perf_counter()
        self.embed(encodings)
        return sum(map(len, encodings)) / (time.perf_counter() - started)

    def _warm(self, encodings: Sequence[Encoding]) -> None:
        """The weights are finite (the loader looks), but what they give may be too large for the
        dtype."""
        if not np.isfinite(self.embed(encodings)).all():
            raise UnsupportedError(
                f"this model's vectors are NaN or infinite in {self.info.dtype}: its weights are "
                "damaged, or too large for that precision (--dtype, --quantization)"
            )

    def close(self) -> None:
        del self.model


def packer(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    layers: Products,
    attend: AttentionKernel,
) -> Callable[[Sequence[Encoding]], PackedBatch]:
    """Makes batches as the family pools, laid out as these layers and this kernel like them."""
    return partial(
        pack,
        device=device,
        pooled=config.family.pooled,
        filler=wants_filler(device, layers, attend),
        planner=planner_of(attend, dtype, causal=config.causal, window=config.window),
    )


def wants_filler(device: torch.device, layers: Products, attend: AttentionKernel) -> bool:
    """Whether batches run faster with filler. oneDNN compiles its products for each number of
    rows that it meets: 13 ms in a forward of 20, and 0.3 MB each."""
    return device.type == "cpu" and layers.compiles_rows and attend is sdpa_by_length


def _ramp(length: int) -> Encoding:
    return Encoding(np.ones(length, dtype=np.int32))


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that exists and that torch has code for."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and driver_version():
            logger.warning("running on the CPU: %s", why_no_cuda())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnsupportedError(f"unknown device {name!r}; known: cpu, cuda, cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UnsupportedError(f"device {name!r} is not supported; known: cpu, cuda, cuda:N")
    if not torch.cuda.is_available():
        raise UnsupportedError(f"{name}: {why_no_cuda()}")
    index = device.index or 0
    if index >= torch.cuda.device_count():
        raise UnsupportedError(f"{name}: only {torch.cuda.device_count()} CUDA device(s) visible")
    device = torch.device("cuda", index)
    check_architecture(device)
    return device


def resolve_dtype(
    name: str, device: torch.device, config: ModelConfig, cpu_products: str = "auto"
) -> torch.dtype:
    """The working dtype. `auto`: on CUDA bfloat16, or float16 on cards without bfloat16's units
    (before Ampere); bfloat16 on CPUs where its products are faster than float32's, else float32 if
    it fits."""
    if name in DTYPES:
        if name == "float16" and device.type == "cpu":
            logger.warning("processors compute float16 slowly: it is for GPUs")
        return DTYPES[name]
    if name != "auto":
        raise UnsupportedError(f"unknown dtype {name!r}; known: auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if ampere else torch.float16
    if products.fastest_dtype(config.widest_product, cpu_products) == torch.bfloat16:
        return torch.bfloat16
    needed = 4 * sum(int(np.prod(shape)) for shape in expected_shapes(config).values())
    free = resources.available_memory()
    if free is not None and needed > free:
        logger.warning(
            "float32 weights need %.1f GB and %.1f GB are free: using bfloat16, which is slower on "
            "this processor",
            needed / 1e9,
            free / 1e9,
        )
        return torch.bfloat16
    return torch.float32


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
