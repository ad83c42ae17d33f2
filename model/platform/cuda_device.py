"""Whether this torch can use a GPU of this machine, and if not, why: the driver and the
architectures that torch is built for.

Knows nothing of models; whether a device has memory enough shows when it is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from model.errors import UnsupportedError

DRIVER_FILE = Path("/proc/driver/nvidia/version")
_DRIVER_NEEDED = {11: 450, 12: 525, 13: 580}
"""The oldest driver's major version for a CUDA's (CUDA's release notes, "CUDA Toolkit and Minimum
Required Driver Version for CUDA Minor Version Compatibility")."""
_OLDER_TORCH = (
    "install torch for an older CUDA (pip install torch --index-url "
    "https://download.pytorch.org/whl/cu126)"
)


def why_no_cuda() -> str:
    """A sentence for when torch sees no CUDA device."""
    driver = driver_version()
    if not torch.version.cuda:
        there = f"; the NVIDIA driver {driver} is there" if driver else ""
        return f"no CUDA device is visible; this torch is a CPU build{there}"
    if driver is None:
        return "no CUDA device is visible"
    needed = _DRIVER_NEEDED.get(int(torch.version.cuda.partition(".")[0]))
    if needed and int(driver.partition(".")[0]) < needed:
        return (
            f"the NVIDIA driver is {driver}, and this torch (CUDA {torch.version.cuda}) needs "
            f"{needed} or later: update the driver, or {_OLDER_TORCH}"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    return f"no CUDA device is visible{why}, though the NVIDIA driver {driver} is there"


def driver_version() -> str | None:
    """As in 580.65.06; None where no NVIDIA driver is loaded."""
    try:
        text = DRIVER_FILE.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def check_architecture(device: torch.device) -> None:
    """Raise UnsupportedError when this torch has no code for the GPU: without that its first
    kernel fails."""
    capability = torch.cuda.get_device_capability(device)
    built_for = torch.cuda.get_arch_list()
    if runs_on(built_for, capability):
        return
    oldest = min(minimum for _, minimum, _ in _parsed(built_for))
    instead = _OLDER_TORCH if capability < oldest else "install a newer torch"
    raise UnsupportedError(
        f"{device} ({torch.cuda.get_device_name(device)}) has compute capability "
        f"{_dotted(capability)}, and this torch (CUDA {torch.version.cuda}) is built for "
        f"{', '.join(built_for)}: {instead}"
    )


def runs_on(built_for: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for `built_for` (sm_80, sm_90a, compute_120 …) runs on a GPU of `capability`.

    Machine code runs on its own major version from its minor one up, with an "a" on exactly its
    own; compute_… is compiled when it is loaded, for that capability and all later ones. Where
    nothing of the kind is listed, as for AMD's cards, that is taken for yes.
    """
    known = list(_parsed(built_for))
    return not known or any(_fits(*architecture, capability) for architecture in known)


def _fits(kind: str, built: tuple[int, int], suffix: str, capability: tuple[int, int]) -> bool:
    if suffix == "a":
        return built == capability
    if kind == "compute" and not suffix:
        return built <= capability
    return built[0] == capability[0] and built[1] <= capability[1]


def _parsed(built_for: Sequence[str]) -> Iterator[tuple[str, tuple[int, int], str]]:
    """`sm_90a` -> ("sm", (9, 0), "a"), leaving out what is no architecture of NVIDIA's."""
    for name in built_for:
        if found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name):
            yield found[1], (int(found[2]), int(found[3])), found[4]


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
