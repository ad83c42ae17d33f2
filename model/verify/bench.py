"""What the steps of one process share: the checkpoint, one loaded model, and clocks.

A variant is a precision by the name that the report gives it, with "-fused" behind it where the
kernels of model.fused run. Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model import cuda_graphs
from model.batch import Encoding, RunnerOptions
from model.errors import UnsupportedError
from model.hub import ModelSource
from model.runner import ModelRunner, resolve_device
from model.tokenizer import BOS_ID, EOS_ID
from model.verify.authors import Embed
from model.verify.subject import Loaded, Subject, layers_of, subject_of

FUSED = "triton"
"""The kernels of model.fused that are judged."""
_QUANTIZED = ("int8", "float8")
_FUSED = "-fused"


class Bench:
    """Made anew in each process."""

    def __init__(self, job: Mapping[str, Any], import_s: float) -> None:
        """job: model_id, path, revision, family, device, attention, base (the 16-bit dtype that the
        card serves in), work (a folder for what one process leaves to another)."""
        self.job, self.import_s = job, import_s
        self.source = ModelSource(
            job["model_id"],
            Path(job["path"]),
            job.get("revision"),
            None,
            job.get("family", "auto"),
        )
        self.config = self.source.config()
        self.work = Path(job["work"])
        self._loaded: tuple[str, ModelRunner] | None = None
        self._recorded: Embed | None = None  # of the loaded runner

    @property
    def device(self) -> torch.device:
        """Raises UnsupportedError where there is none."""
        return resolve_device(self.job["device"])

    def subject(self, variant: str) -> Subject:
        """Raises UnsupportedError for a precision that this device does not have."""
        dtype, quantization = self._precision(variant)
        return subject_of(
            self.source,
            device=self.job["device"],
            dtype=dtype,
            quantization=quantization,
            attention="auto" if dtype == "float32" else self.job["attention"],
        )

    def _precision(self, variant: str) -> tuple[str, str]:
        """Its dtype and quantization."""
        name = precision_of(variant)
        return (self.job["base"], name) if name in _QUANTIZED else (name, "none")

    def runner(self, variant: str, **options: int) -> ModelRunner:
        """The runner that serves `variant`, loaded at its first use; the last one goes."""
        if self._loaded is None or self._loaded[0] != variant:
            self.drop()
            dtype, quantization = self._precision(variant)
            runner = ModelRunner(
                RunnerOptions(
                    str(self.source.path),
                    device=self.job["device"],
                    dtype=dtype,
                    quantization=quantization,
                    attention=self.job["attention"],
                    fused_kernels=FUSED if variant.endswith(_FUSED) else "plain",
                    family=self.source.family,
                    **options,  # type: ignore[arg-type]
                )
            )
            self._loaded = variant, runner
        return self._loaded[1]

    def loaded(self, variant: str) -> tuple[Subject, Loaded]:
        """The same model with its kernel, for the checks."""
        subject, model = self.subject(variant), self.runner(variant).model
        layers = layers_of(subject, subject.dtype, subject.quantization)
        return subject, Loaded(model, subject.kernel(subject.dtype)[1], subject.device, layers)

    def records(self, variant: str) -> bool:
        """Whether a server of `variant` can record forwards here."""
        subject = self.subject(variant)
        try:
            cuda_graphs.check(subject.device, subject.kernel(subject.dtype)[0], "none")
        except UnsupportedError:
            return False
        return True

    def recorded(self, variant: str) -> Embed:
        """The recorded forward of few tokens. Raises UnsupportedError where there is none."""
        subject, working = self.loaded(variant)
        if self._recorded is None:
            self._recorded = _recording_of(subject, working)
        return self._recorded

    def drop(self) -> None:
        """Give the model's memory back."""
        self._loaded = self._recorded = None
        gc.collect()
        torch.cuda.empty_cache()

    def device_works(self) -> bool:
        """Whether this process can still use its device, after an error that may have been its."""
        try:
            torch.ones(1, device=self.device).add_(1).cpu()
        except Exception:
            return False
        return True

    def texts(self, length: int, tokens: int, seed: int = 0) -> list[Encoding]:
        """About `tokens` tokens in texts of `length`: random ids between BOS and EOS."""
        draw = np.random.default_rng([seed, length])

        def text() -> Encoding:
            ids = draw.integers(3, self.config.vocab_size, length, dtype=np.int32)
            ids[0], ids[-1] = BOS_ID, EOS_ID
            return Encoding(ids)

        return [text() for _ in range(max(1, tokens // length))]

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def memory(self) -> dict[str, int]:
        """Bytes, each since the last call's end."""
        peaks = {
            "allocated_bytes": torch.cuda.max_memory_allocated(self.device),
            "reserved_bytes": torch.cuda.max_memory_reserved(self.device),
        }
        torch.cuda.reset_peak_memory_stats(self.device)
        return peaks

    @contextlib.contextmanager
    def stage(self, stages: dict[str, Any], name: str) -> Iterator[None]:
        """Put the seconds and the memory of what is within into stages[name]."""
        started = time.perf_counter()
        yield
        self.synchronize()
        stages[name] = {"seconds": time.perf_counter() - started, **self.memory()}

    def seconds_of(self, run: Callable[[], object], least_s: float) -> float:
        """Of one call on the device: so many between two waits for it that `least_s` pass."""
        run()
        self.synchronize()
        count, elapsed = 1, 0.0
        while True:
            started = time.perf_counter()
            for _ in range(count):
                run()
            self.synchronize()
            elapsed = time.perf_counter() - started
            if elapsed >= least_s:
                return elapsed / count
            count = max(2 * count, min(10 * count, int(1.2 * count * least_s / max(elapsed, 1e-9))))


def precision_of(variant: str) -> str:
    return variant.removesuffix(_FUSED)


def _recording_of(subject: Subject, working: Loaded) -> Embed:
    cuda_graphs.check(subject.device, subject.kernel(subject.dtype)[0], subject.quantization)
    with torch.inference_mode():
        recorded = working.recorded()

    @torch.inference_mode()
    def embed(encodings: Sequence[Encoding]) -> NDArray[np.float32]:
        rows = recorded(encodings)
        assert rows is not None, "too many tokens for a recording"
        return rows.cpu().numpy()

    return embed


def walls(run: Callable[[], object], seconds: float, least: int = 3) -> NDArray[np.float64]:
    """The wall times of calls that wait for the device, `least` or as many as `seconds` hold."""
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < least or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return np.array(times)


def in_ms(times: NDArray[np.float64], *percentiles: int) -> dict[str, float]:
    """{"p50_ms": …} and the number of times."""
    points = {f"p{p}_ms": 1e3 * float(np.percentile(times, p)) for p in percentiles}
    return {**points, "runs": len(times)}
