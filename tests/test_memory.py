"""Memory that the process holds: against the kernel's own figures and allocations of known size."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from strop import memory
from strop.memory import (
    PeakMemory,
    file_mapped_bytes,
    release_unused_memory,
    resident_bytes,
    steady_allocation,
)

MEBIBYTE = 1 << 20


def test_resident_bytes_grows_by_an_allocation_and_falls_again():
    release_unused_memory()
    before = resident_bytes()
    block = torch.ones(64 * MEBIBYTE, dtype=torch.uint8)
    grown = resident_bytes() - before
    del block
    release_unused_memory()
    after = resident_bytes() - before
    assert 60 * MEBIBYTE < grown < 72 * MEBIBYTE
    assert after < 8 * MEBIBYTE


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_mapped_files_are_not_counted(tmp_path: Path):
    path = tmp_path / "weights.bin"
    path.write_bytes(bytes(64 * MEBIBYTE))
    release_unused_memory()
    before, mapped_before = resident_bytes(), file_mapped_bytes()
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert sum(view[offset] for offset in range(0, len(view), 4096)) == 0
        assert resident_bytes() - before < 8 * MEBIBYTE
        assert file_mapped_bytes() - mapped_before > 56 * MEBIBYTE


def test_peak_memory_keeps_the_height_of_what_was_freed_before_the_end():
    release_unused_memory()
    with PeakMemory() as peak:
        block = torch.ones(64 * MEBIBYTE, dtype=torch.uint8)
        peak.sample()
        del block
        release_unused_memory()
        left = peak.sample()
    assert left < 16 * MEBIBYTE
    assert 60 * MEBIBYTE < peak.peak_bytes < 80 * MEBIBYTE


def test_peak_memory_sees_an_allocation_between_its_own_readings_without_being_asked():
    release_unused_memory()
    matrix = torch.ones(400, 400)
    with PeakMemory() as peak:
        block = torch.ones(64 * MEBIBYTE, dtype=torch.uint8)
        for _ in range(200):  # torch lets other threads run inside its products
            matrix = (matrix @ matrix).clamp(max=1)
        del block
        release_unused_memory()
    assert peak.peak_bytes > 60 * MEBIBYTE


def churn() -> None:
    """Allocate and free blocks of many sizes, never more than 4 at a time, as a model's layers do."""
    held: list[torch.Tensor] = []
    for step in range(400):
        held.append(torch.ones(((step * 7919) % 37 + 1) << 17, dtype=torch.uint8))
        if len(held) == 4:
            held.pop((step * 31) % 4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_steady_allocation_gives_freed_blocks_back_at_once():
    # In a process of its own: what other tests left on the heap would be counted.
    code = "from tests.test_memory import check_steady_allocation; check_steady_allocation()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def check_steady_allocation():
    release_unused_memory()
    with steady_allocation():
        before = resident_bytes()
        churn()
        left = resident_bytes() - before
        release_unused_memory()
        with PeakMemory() as peak:
            block = torch.ones(16 * MEBIBYTE, dtype=torch.uint8)
            peak.sample()
            del block
            left_of_block = peak.sample()
    assert left < 8 * MEBIBYTE  # the blocks that were churned take up to 18 at once
    assert left_of_block < 2 * MEBIBYTE
    assert peak.peak_bytes == pytest.approx(16 * MEBIBYTE, abs=MEBIBYTE)


def test_steady_allocation_ends_after_an_exception():
    with pytest.raises(ValueError, match="broke"), steady_allocation():
        raise ValueError("broke")
    churn()  # the allocator works on


def test_a_given_baseline_is_what_counts_as_zero():
    with PeakMemory(baseline_bytes=0) as peak:
        pass
    assert peak.peak_bytes == pytest.approx(resident_bytes(), rel=0.1)
    with PeakMemory(baseline_bytes=1 << 60) as peak:
        pass
    assert peak.peak_bytes == 0


def test_the_peak_stands_after_an_exception():
    peak = PeakMemory(baseline_bytes=0)
    with pytest.raises(ValueError, match="broke"), peak:
        raise ValueError("broke")
    assert peak.peak_bytes > 0


def test_a_running_measurement_is_not_entered_twice():
    with PeakMemory() as peak, pytest.raises(RuntimeError, match="already running"), peak:
        pass


def test_without_proc_psutil_stands_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "absent")
    assert resident_bytes() > 10 * MEBIBYTE
    assert file_mapped_bytes() == 0


def test_the_module_costs_nothing_to_import():
    code = "import strop.memory, sys; print(sorted({'torch', 'psutil', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
