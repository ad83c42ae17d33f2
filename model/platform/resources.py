"""What this machine lets us use: processor cores and memory. Torch-free, Linux first."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

_CGROUP = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h


def usable_cores() -> int:
    """Whole cores that this process may use: its affinity, cut by the cgroup's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cgroup_quota()
    cores = cores or 1
    return max(1, min(cores, int(quota)) if quota else cores)


def _cgroup_quota() -> float | None:
    """Cores by the CPU quota of cgroup v2 or v1; None without one."""
    try:
        limit, period = (_CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (_CGROUP / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (_CGROUP / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if limit == "max" or int(limit) <= 0:
        return None
    return int(limit) / int(period)


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping: MemAvailable, cut by the cgroup's limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, int(limit) - used)


def let_waiting_threads_sleep() -> None:
    """Have OpenMP's threads sleep where they wait long for one another, unless the user has set
    how.

    By default they spin for some 10 ms, and beside other busy programs for whole time slices; with
    sleep alone each of the hundreds of waits in a forward costs a wake-up. About half a
    millisecond of spinning is the best of both. Only what is not imported yet obeys: call it
    before torch is.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "10000"


@contextmanager
def for_good() -> Iterator[None]:
    """For imports: what they make stays, so nothing is collected meanwhile, nor is it looked at in
    later collections. Importing torch takes 0.83 in place of 0.95 s."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def has_bfloat16() -> bool:
    """Whether the processor says that it multiplies bfloat16 matrices (AMX, AVX512_BF16)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "avx512_bf16"})


def anonymous_memory() -> int:
    """RssAnon of this process in bytes: its memory without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in /proc/self/status")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next allocation, up to 1 GB.

    By default it hands large blocks back to the kernel, which zeroes each page again when it is
    next touched: 13,000 page faults in a forward of 1,000 tokens, which become none.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl and macOS have none
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def return_freed_memory() -> None:
    """Let glibc hand large blocks back to the kernel at once, for a process that holds one
    seldom. By default it learns to keep them: a server that once read a body of 32 MB would keep
    as much in each of its threads' arenas."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 8 << 20)
        libc.mallopt(_M_ARENA_MAX, 2)


class PeakMemory:
    """`with PeakMemory() as peak: …`, then `peak.bytes`: the most RssAnon seen in between.

    The kernel keeps a high-water mark for all resident memory only, mapped shards included; so
    a thread samples.
    """

    def __init__(self, interval: float = 0.002) -> None:
        self.bytes = 0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while True:
            self.bytes = max(self.bytes, anonymous_memory())
            if self._stop.wait(self._interval):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_memory())
