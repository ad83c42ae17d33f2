"""Which devices the workers run on, and how each is told of its own.

A GPU is known by its UUID: when another is lost, numbers shift. `nvidia-smi` is asked once, at the
start, and for `auto` also torch, in a process of its own, since the front never imports it. Where
nvidia-smi tells nothing, numbers have to do. Knows options and environments, and no worker.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from model.batch import RunnerOptions, default_batch_tokens
from server.errors import SettingsError

logger = logging.getLogger("nv_embed.devices")

_MASK = "CUDA_VISIBLE_DEVICES"
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""The name that every torch takes which we do, then older ones."""
_SECRETS = frozenset(
    (
        *("NV_EMBED_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"),
        *("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"),
    )
)
"""Variables that no child has a use for: none asks for keys, downloads or sends traces."""
_PROBE_S = 120.0
_LIST_S = 60.0
"""Without its persistence daemon the driver wakes each GPU first."""
_LISTED = re.compile(r"\s*(GPU|MIG) .*\(UUID: (\1-[0-9A-Za-z/-]+)\)\s*")


# Pure


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a MIG slice that was named by itself."""

    uuid: str
    slices: tuple[str, ...] = ()  # UUIDs of its MIG slices; then it cannot be used as a whole

    @property
    def usable(self) -> tuple[str, ...]:
        return self.slices or (self.uuid,)


def parse_list(text: str) -> list[Gpu]:
    """What `nvidia-smi -L` has printed, in its order. Lines of another form, which tell of a GPU
    that does not answer, are left out, as CUDA leaves that out."""
    gpus: list[Gpu] = []
    for line in text.splitlines():
        found = _LISTED.fullmatch(line)
        if found is None:
            continue
        if found[1] == "GPU":
            gpus.append(Gpu(found[2]))
        elif gpus:
            gpus[-1] = dataclasses.replace(gpus[-1], slices=(*gpus[-1].slices, found[2]))
    return gpus


def visible(gpus: Sequence[Gpu], mask: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order and by CUDA's rules: numbers or the
    beginnings of UUIDs; what follows one that is unknown is not seen, and nothing with doubles."""
    if mask is None:
        return list(gpus)
    found: list[Gpu] = []
    for word in mask.split(","):
        gpu = _masked(word.strip(), gpus)
        if gpu is None:
            break
        found.append(gpu)
    return found if len(set(found)) == len(found) else []


def _masked(word: str, gpus: Sequence[Gpu]) -> Gpu | None:
    if re.fullmatch(r"\d+", word):
        return gpus[int(word)] if int(word) < len(gpus) else None
    matches = [gpu for gpu in _each(gpus) if word and gpu.uuid.startswith(word)]
    return matches[0] if len(matches) == 1 else None


def _each(gpus: Iterable[Gpu]) -> Iterable[Gpu]:
    for gpu in gpus:
        yield gpu
        yield from map(Gpu, gpu.slices)


def by_uuid(name: str, gpus: Sequence[Gpu]) -> str:
    """One of --devices as `cuda:UUID` among the visible GPUs; a GPU in slices stands for its first,
    as with CUDA. Raises SettingsError when there is no such one."""
    if name == "cpu":
        return name
    wanted = name.partition(":")[2] or "0"
    gpu = _masked(wanted, gpus) if wanted.isdigit() else None
    for other in _each(gpus):
        gpu = other if other.uuid == wanted else gpu
    if gpu is None:
        known = ", ".join(f"cuda:{uuid}" for gpu in gpus for uuid in gpu.usable)
        raise SettingsError(f"--devices {name}: there is no such GPU; visible are {known}")
    return f"cuda:{gpu.usable[0]}"


def in_child(device: str, environment: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """-> (what its worker calls a device, the environment in which it does so)."""
    environment = dict(environment)
    if device.startswith("cuda") and not environment.keys() & set(_ALLOCATOR):
        # Each batch has another size: segments of fixed sizes would be left with holes.
        environment[_ALLOCATOR[0]] = "expandable_segments:True"
    if (uuid := uuid_of(device)) is None:
        return device, environment
    return "cuda:0", {**environment, _MASK: uuid}


def uuid_of(device: str) -> str | None:
    """Of a device that is known by one."""
    name = device.partition(":")[2]
    return name if name.startswith(("GPU-", "MIG-")) else None


def worker_options(
    base: RunnerOptions, devices: Sequence[str], cores: int, max_batch_tokens: int | None
) -> list[RunnerOptions]:
    """One RunnerOptions per worker: its device, its share of the cores, its batch size."""
    cpu_workers = sum(device == "cpu" for device in devices)
    share = max(1, cores // max(1, cpu_workers))
    return [
        dataclasses.replace(
            base,
            device=device,
            threads=base.threads or (share if device == "cpu" else None),
            max_batch_tokens=max_batch_tokens or default_batch_tokens(device),
        )
        for device in devices
    ]


# Asking


def child_environment() -> dict[str, str]:
    """Our own without its secrets."""
    return {name: value for name, value in os.environ.items() if name not in _SECRETS}


def choose(names: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """A device for each worker: `cpu`, `cuda:UUID`, or `cuda:N` where no UUIDs are known.

    Raises SettingsError for a GPU that is not visible.
    """
    if list(names) == ["auto"]:
        count = count_cuda_devices(environment)
        gpus = visible(list_gpus(environment), environment.get(_MASK)) if count else []
        uuids = [uuid for gpu in gpus for uuid in gpu.usable]
        return [f"cuda:{which}" for which in uuids or range(count)] or ["cpu"]
    if all(name == "cpu" for name in names) or not (listed := list_gpus(environment)):
        return list(names)
    gpus = visible(listed, environment.get(_MASK))
    return [by_uuid(name, gpus) for name in names]


def list_gpus(environment: Mapping[str, str]) -> list[Gpu]:
    """All that nvidia-smi lists; none when it cannot be asked."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "-L"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=_LIST_S,
            env=dict(environment),
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.debug("nvidia-smi cannot be asked: %s", error)
        return []
    return parse_list(answer.stdout)  # a GPU that does not answer makes it fail, behind the others


def count_cuda_devices(environment: Mapping[str, str]) -> int:
    """How many CUDA devices torch sees. Without NVIDIA's driver the answer is 0 at once."""
    if not any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/dxg", "/dev/nvmap")):
        return 0
    command = [sys.executable, "-P", "-c", "import torch; print(torch.cuda.device_count())"]
    try:
        answer = subprocess.run(  # noqa: S603
            command,
            capture_output=True,
            text=True,
            check=True,
            timeout=_PROBE_S,
            env=dict(environment),
        )
        count = int(answer.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        logger.warning("asking torch for CUDA devices failed: %s %s", error, _errors_of(error))
        count = 0
    if not count:
        logger.warning("NVIDIA's driver is here, and torch sees no CUDA device: using the CPU")
    return count


def _errors_of(error: Exception) -> str:
    return error.stderr or "" if isinstance(error, subprocess.CalledProcessError) else ""
