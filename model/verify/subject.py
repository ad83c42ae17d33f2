"""What is verified, and with which parts: the checkpoint, loaded in one precision or another.

A Subject says what is verified and with which parts: whoever calls may put another tokenizer or
attention kernel into it. Knows no check.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import cuda_graphs, fused
from model.attention.kernels import AttentionKernel, choose_kernel
from model.batch import Encoding
from model.config import ModelConfig
from model.embedder import Embedder
from model.errors import UnsupportedError
from model.families import Side
from model.hub import ModelSource
from model.packing import PackedBatch
from model.platform import products, resources
from model.platform.products import Products
from model.prompts import Prompt
from model.runner import packer, resolve_device, resolve_dtype
from model.tokenizer import NVEmbedTokenizer
from model.verify.authors_models import AUTHORS_MODELS, AuthorsModel
from model.verify.outcome import Check, at_least, at_most, difference, smallest_cosine
from model.weights.loader import empty_model, load_model

TASK = "Given a question, retrieve passages that answer the question"
SAMPLES: tuple[tuple[Side, str], ...] = (
    ("passage", "x"),
    ("passage", "Freestyle wrestling allows throws as long as the grip on the opponent is legal."),
    ("passage", "def fold(keys, queries):\n    return keys @ queries / math.sqrt(len(queries))"),
    ("passage", "東京都は日本の首都です。人口は約千四百万人、世界最大の都市圏の中心である。"),
    ("passage", "The committee met twice, in May and in June, and agreed on nothing. " * 12),
    ("query", "are judo throws allowed in wrestling?"),
    ("query", "how long does it take to become a radiology technician, and what does it cost?"),
    ("query", "naïve café 🙂"),
)
"""What the machine's own parts are compared on."""
VECTOR_TOLERANCE = 1e-5  # float32 against float32
SAME_DTYPE_COSINE = 0.999  # two kernels, alone or together: another order of summing, 16 bit


@dataclass(frozen=True, slots=True)
class Subject:
    """What is verified: a checkpoint, and the parts that run it."""

    source: ModelSource
    config: ModelConfig
    tokenizer: NVEmbedTokenizer
    device: torch.device
    dtype: torch.dtype
    quantization: str
    kernel: Callable[[torch.dtype], tuple[str, AttentionKernel]]
    golden: Path | None = None
    cpu_products: str = "auto"
    fused_kernels: str = "plain"
    measure_seconds: float = 3.0

    @property
    def authors(self) -> AuthorsModel:
        """What the authors of its family compute."""
        return AUTHORS_MODELS[self.config.family.name]


def subject_of(
    source: ModelSource,
    *,
    device: str,
    dtype: str,
    quantization: str,
    attention: str,
    golden: Path | None = None,
    cpu_products: str = "auto",
    fused_kernels: str = "plain",
) -> Subject:
    """The checkpoint at `source` with the parts that serve it. Raises ModelError for what cannot
    run."""
    config = source.config()
    where = resolve_device(device)
    working = resolve_dtype(dtype, where, config, cpu_products)
    choose_kernel(attention, where, working)  # refuses what cannot run

    def kernel(wanted: torch.dtype) -> tuple[str, AttentionKernel]:
        try:
            return choose_kernel(attention, where, wanted)
        except UnsupportedError:  # a 16-bit kernel, asked for the float32 comparison
            return choose_kernel("auto", where, wanted)

    tokenizer = NVEmbedTokenizer.from_dir(source.path, config.family.name)
    shape = config.widest_product
    products.choose(where, working, quantization, shape, cpu_products)  # refuses likewise
    fused.choose(fused_kernels, where)
    return Subject(
        source,
        config,
        tokenizer,
        where,
        working,
        quantization,
        kernel,
        golden,
        cpu_products,
        fused_kernels,
    )


@dataclass(slots=True)
class Measured:
    """What the checks leave behind for the report and for each other."""

    attention: str = ""
    tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # of SAMPLES, by variant


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """One model in memory, with its kernel."""

    model: Embedder
    attend: AttentionKernel
    device: torch.device
    layers: Products

    def embed(
        self, encodings: Sequence[Encoding], attend: AttentionKernel | None = None
    ) -> NDArray[np.float32]:
        attend = attend or self.attend
        with torch.inference_mode():
            rows = self.model(self.pack(encodings, attend), attend)
        return rows.cpu().numpy()  # type: ignore[no-any-return]

    def pack(
        self, encodings: Sequence[Encoding], attend: AttentionKernel | None = None
    ) -> PackedBatch:
        """A batch as the runner makes it."""
        attend = attend or self.attend
        make = packer(self.model.config, self.device, self.layers.dtype, self.layers, attend)
        return make(encodings)

    def recorded(self) -> cuda_graphs.GraphedForward:
        """The forward as it is recorded. To be made and called in inference mode."""
        return cuda_graphs.GraphedForward(
            lambda batch: self.model(batch, self.attend),
            self.device,
            pooled=self.model.config.family.pooled,
        )

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        with torch.inference_mode():
            return self.model.backbone(batch, self.attend)  # type: ignore[no-any-return]


def load(
    subject: Subject,
    dtype: torch.dtype,
    quantization: str,
    layers: Products | None = None,
    fused_kernels: str = "plain",
) -> Loaded:
    weights = "" if quantization == "none" else f" with {quantization} weights"
    say(f"loading in {dtype_name(dtype)}{weights}")
    layers = layers or layers_of(subject, dtype, quantization)
    model = load_model(
        subject.source.path,
        subject.config,
        device=subject.device,
        dtype=dtype,
        quantize=quantization,
        layers=layers,
        operations=fused.choose(fused_kernels, subject.device),
    )
    return Loaded(model, subject.kernel(dtype)[1], subject.device, layers)


def layers_of(subject: Subject, dtype: torch.dtype, quantization: str) -> Products:
    """Those that serve; here, where only the vectors are compared, also slow ones. Raises
    UnsupportedError."""
    mode = "allow-slow" if subject.cpu_products == "auto" else subject.cpu_products
    shape = subject.config.widest_product
    return products.choose(subject.device, dtype, quantization, shape, mode)


def variant_name(dtype: torch.dtype, quantization: str) -> str:
    return dtype_name(dtype) if quantization == "none" else quantization


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def no_room(subject: Subject, dtype: torch.dtype, quantization: str) -> str | None:
    """Why this variant is left out here, or None."""
    if dtype == torch.float16 and subject.device.type == "cpu":
        return "processors compute float16 slowly: it is for GPUs"
    if (
        dtype == torch.bfloat16
        and subject.device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return "this GPU has no bfloat16"
    try:
        layers_of(subject, dtype, quantization)
    except UnsupportedError as error:
        return str(error)
    model = empty_model(subject.config, quantize=quantization, dtype=dtype)
    return too_large(sum(p.nbytes for p in model.parameters()), subject.device)


def too_large(needed: int, device: torch.device) -> str | None:
    needed = int(needed * 1.15)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free: int | None = torch.cuda.mem_get_info(device)[0]
    else:
        free = resources.available_memory()
    if free is None or needed <= free:
        return None
    return f"it needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"


class _CudaPeak:
    """As resources.PeakMemory, of the memory that torch allocates on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.bytes, self._device = 0, device

    def __enter__(self) -> _CudaPeak:
        torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *exception: object) -> None:
        self.bytes = torch.cuda.max_memory_allocated(self._device)


def peak_memory(device: torch.device) -> resources.PeakMemory | _CudaPeak:
    return _CudaPeak(device) if device.type == "cuda" else resources.PeakMemory(interval=0.02)


def sample_encodings(subject: Subject) -> list[Encoding]:
    return [
        subject.tokenizer.encode(text, prompt_of(subject, side), max_tokens=4096)
        for side, text in SAMPLES
    ]


def prompt_of(subject: Subject, side: Side, task: str = TASK) -> Prompt:
    """As the family writes it; queries with the task, where it takes one."""
    family = subject.config.family
    return family.prompt(side, task if side == "query" and family.template is not None else "")


def same(
    name: str,
    subject: Subject,
    got: NDArray[np.float32],
    expected: NDArray[np.float32],
    cosine: float = SAME_DTYPE_COSINE,
) -> Check:
    """Two ways to the same vectors: in float32 by the largest difference, else by the cosine."""
    if subject.dtype == torch.float32 and subject.quantization == "none":
        return at_most(name, difference(got, expected), VECTOR_TOLERANCE, "largest difference")
    return at_least(name, smallest_cosine(got, expected), cosine, "smallest cosine")


def say(message: str) -> None:
    print(f"… {message}", file=sys.stderr, flush=True)
