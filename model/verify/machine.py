"""What a report says of the machine and its software. No serial number, host name or path."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from model.platform import resources
from model.runner import device_name, resolve_dtype
from model.verify.bench import Bench
from model.verify.subject import dtype_name

_FIELDS = (
    *("name", "uuid", "driver_version", "memory.total", "memory.used", "power.limit"),
    *("clocks.current.sm", "clocks.max.sm", "clocks.current.memory", "clocks.max.memory"),
    *("temperature.gpu", "ecc.mode.current", "pcie.link.gen.current", "pcie.link.width.current"),
    *("mig.mode.current", "compute_mode", "persistence_mode"),
)
_OLD_FIELDS = ("name", "uuid", "driver_version", "memory.total")
AT_WORK = ("clocks.current.sm", "clocks.current.memory", "power.draw", "temperature.gpu")
"""What to ask for just after a measure: why a card is slow."""
_PACKAGES = (
    *("nv-embed-server", "torch", "triton", "transformers", "tokenizers", "safetensors", "numpy"),
    *("bitsandbytes", "flash-attn", "flash-attn-4"),
)
_PREFIXES = ("PYTORCH_", "CUDA_", "NVIDIA_VISIBLE", "OMP_")


def device(bench: Bench) -> dict[str, Any]:
    """Of the device that is checked. Raises UnsupportedError where torch finds none."""
    there = bench.device
    return {
        "name": device_name(there),
        "capability": list(torch.cuda.get_device_capability(there)),
        "multiprocessors": _or_why(
            lambda: torch.cuda.get_device_properties(there).multi_processor_count
        ),
        "memory_bytes": _or_why(lambda: torch.cuda.mem_get_info(there)[1]),
        "free_bytes": _or_why(lambda: torch.cuda.mem_get_info(there)[0]),
        "devices": torch.cuda.device_count(),
        "architectures_of_torch": _or_why(torch.cuda.get_arch_list),
        "serves_in": dtype_name(resolve_dtype("auto", there, bench.config)),
    }


def system(bench: Bench) -> dict[str, Any]:
    """Of the machine around it: also where no device is found."""
    return {
        "nvidia_smi": nvidia_smi(),
        "driver": _or_why(lambda: Path("/proc/driver/nvidia/version").read_text().splitlines()[0]),
        "processor": _or_why(_processor),
        "cores": resources.usable_cores(),
        "available_memory_bytes": resources.available_memory(),
        "container": any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def software(bench: Bench) -> dict[str, Any]:
    return {
        "commit": _or_why(_commit),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": _or_why(torch.backends.cudnn.version),
        "cublas": {
            name: version
            for name in ("nvidia-cublas", "nvidia-cublas-cu12", "nvidia-cublas-cu13")
            if (version := _version(name))
        },
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)
        },
        "model": {"width": bench.config.hidden_size, "layers": bench.config.num_hidden_layers},
    }


def nvidia_smi(fields: Sequence[str] = _FIELDS) -> list[dict[str, str]] | str:
    """What it says of each device, or why it says nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "there is no nvidia-smi"
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)  # noqa: S603
    except subprocess.CalledProcessError as error:
        if set(fields) > set(_OLD_FIELDS):  # an older one refuses all for one that it lacks
            return nvidia_smi(_OLD_FIELDS)
        return f"nvidia-smi failed: {(error.stderr or error.stdout).strip()[:500]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi failed: {error}"
    rows = csv.reader(ran.stdout.splitlines(), skipinitialspace=True)
    devices = [dict(zip(fields, row, strict=False)) for row in rows if row]
    for device in devices:  # tells two cards of one report apart, and no card of the world
        if "uuid" in device:
            device["uuid"] = hashlib.sha256(device["uuid"].encode()).hexdigest()[:12]
    return devices


def _or_why(ask: Callable[[], Any]) -> Any:
    """A fact that may be missing: a report without it is still worth its while."""
    try:
        return ask()
    except Exception as error:
        return f"unknown: {error!r}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))


def _commit() -> str | None:
    """Of the checkout that this runs from; None for an installed package."""
    root = Path(__file__).parents[2]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)  # noqa: S603
    return ran.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
