"""How much memory this process holds, and the most it held while something ran.

"Memory" here is anonymous plus shared memory (`RssAnon + RssShmem` of `/proc/self/status`), in bytes: what the
process allocated itself. Pages of mapped files are left out, since the system can drop them at any time;
`file_mapped_bytes` tells them beside it. Where there is no `/proc` (macOS, Windows) psutil's figure stands in, file
pages included where the system does not tell them apart.

A peak is found by a thread that reads every few milliseconds: an allocation that lives shorter than that can be
missed, so the figure is a lower bound that is tight for anything that holds tensors for longer. Nothing here knows of
accelerators.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final

_STATUS: Final = Path("/proc/self/status")
_INTERVAL_SECONDS: Final = 0.005

# Parameters of glibc's mallopt(3), and its own values: blocks above the threshold are mapped one by one. By default it
# raises the threshold up to 32 MiB as such blocks are freed, and twice that is kept before anything is given back.
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
_HIGHEST_THRESHOLD_BYTES: Final = 32 << 20
_STEADY_THRESHOLD_BYTES: Final = 256 << 10


def _status_bytes(*fields: str) -> int | None:
    """Sum of the named `/proc/self/status` fields in bytes; None where the system does not offer them."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    kilobytes = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines) if name in fields}
    if len(kilobytes) < len(fields):
        return None
    return sum(int(value) for value in kilobytes.values()) * 1024


def resident_bytes() -> int:
    """Anonymous plus shared memory that this process holds now, in bytes."""
    held = _status_bytes("RssAnon", "RssShmem")
    if held is not None:
        return held
    import psutil

    info = psutil.Process().memory_info()
    # Windows tells private bytes at no cost; elsewhere they need a slow walk over all mappings, so the resident size.
    return int(getattr(info, "private", info.rss))


def file_mapped_bytes() -> int:
    """Resident pages of mapped files (weights read through a map, libraries), in bytes; 0 where it is not told."""
    return _status_bytes("RssFile") or 0


def release_unused_memory() -> None:
    """Collect garbage and give the allocator's free pages back to the system.

    Without it, memory that an earlier step freed can lie in the allocator's pools: the next step then appears to need
    less than it does, because it fills the pools before the process grows. The second half is done with glibc only.
    """
    gc.collect()
    allocator = _glibc()
    if allocator is not None:
        allocator.malloc_trim(0)


@contextlib.contextmanager
def steady_allocation() -> Iterator[None]:
    """Let freed tensors leave the process at once while the block runs, so that a peak is that of what is really held.

    Otherwise the allocator keeps what was freed and splits it, and the same work measured twice can differ by half:
    with it, by a few hundredths. Work becomes a little slower. Does nothing but on glibc; afterwards glibc's own
    highest thresholds stand, which it reaches by itself in a process that frees large blocks.
    """
    allocator = _glibc()
    if allocator is None:
        yield
        return
    allocator.mallopt(_MMAP_THRESHOLD, _STEADY_THRESHOLD_BYTES)
    allocator.mallopt(_TRIM_THRESHOLD, _STEADY_THRESHOLD_BYTES)
    try:
        yield
    finally:
        allocator.mallopt(_MMAP_THRESHOLD, _HIGHEST_THRESHOLD_BYTES)
        allocator.mallopt(_TRIM_THRESHOLD, 2 * _HIGHEST_THRESHOLD_BYTES)


def _glibc() -> ctypes.CDLL | None:
    """The C library where it is glibc."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
    except OSError:
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None


class PeakMemory:
    """Context manager that finds the most memory held while its block runs.

        with PeakMemory() as memory:
            model = open_and_score()
        memory.peak_bytes

    Args:
        baseline_bytes: What counts as zero; the value on entry where it is None.

    Attributes:
        baseline_bytes: What counts as zero, in bytes.
    """

    def __init__(self, baseline_bytes: int | None = None) -> None:
        self._asked_baseline = baseline_bytes
        self.baseline_bytes = 0
        self._highest_bytes = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def peak_bytes(self) -> int:
        """The most bytes held so far above the baseline; never negative."""
        return max(0, self._highest_bytes - self.baseline_bytes)

    def sample(self) -> int:
        """Read now, beside the thread's own readings; returns the bytes held above the baseline (may be negative)."""
        held = resident_bytes()
        with self._lock:
            self._highest_bytes = max(self._highest_bytes, held)
        return held - self.baseline_bytes

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            self.sample()

    def __enter__(self) -> PeakMemory:
        if self._thread is not None:
            raise RuntimeError("this PeakMemory is already running; make a new one for each measurement")
        held = resident_bytes()
        self.baseline_bytes = held if self._asked_baseline is None else self._asked_baseline
        self._highest_bytes = held
        self._stop.clear()
        self._thread = threading.Thread(target=self._watch, name="strop-peak-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.sample()
