"""What this machine has: memory, cores, accelerators, disk, and how fast it multiplies matrices.

Sizes are in bytes. Memory is what this process may still use: where a container sets a limit, the limit counts and
not the machine. Nothing is written and nothing is allocated on an accelerator, except by `measure_matmul`, which
multiplies small matrices for a fraction of a second.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from strop.errors import UsageError, nearest
from strop.evaluation.probes import product_rates

Dtype = Literal["float32", "bfloat16"]

PEAK_FLOPS: dict[str, float] = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX-3090": 71e12,
    "RTX-4090": 165e12,
}
"""Dense bf16 products with fp32 sums, floating-point operations per second, as the vendor's data sheets print them.

Real products reach less (an H200 was measured at 790e12): a time from these figures is a floor below the floor.
"""

_CGROUP_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Accelerator:
    """One GPU, with its memory in bytes."""

    name: str
    kind: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """What a plan is weighed against. `threads` is how many threads torch computes with."""

    memory_bytes: int
    available_bytes: int
    cores: int
    threads: int
    disk_free_bytes: int
    accelerators: tuple[Accelerator, ...]

    @property
    def training_device(self) -> str:
        """Where training would run: the accelerator with the most free memory, else the processor."""
        return self._largest().name if self.accelerators else "CPU"

    @property
    def training_bytes(self) -> int:
        """The memory that training may use on that device."""
        return self._largest().free_bytes if self.accelerators else self.available_bytes

    def _largest(self) -> Accelerator:
        return max(self.accelerators, key=lambda gpu: gpu.free_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures under their own names."""
        return asdict(self) | {
            "accelerators": [asdict(gpu) for gpu in self.accelerators],
            "training_device": self.training_device,
            "training_bytes": self.training_bytes,
        }


def this_machine(folder: str | Path = ".") -> Machine:
    """Read what is there now; disk space is that of the file system of `folder`."""
    import psutil

    memory = psutil.virtual_memory()
    limit, left = _container_memory()
    return Machine(
        memory_bytes=min(memory.total, limit) if limit else memory.total,
        available_bytes=min(memory.available, left) if limit else memory.available,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        disk_free_bytes=psutil.disk_usage(str(folder)).free,
        accelerators=_accelerators(),
    )


def _container_memory() -> tuple[int, int]:
    """Return the container's limit and what is left of it; zeros where there is none."""
    for limit_file, used_file in _CGROUP_LIMITS:
        try:
            limit, used = Path(limit_file).read_text().strip(), Path(used_file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit() and used.isdigit() and int(limit) < 2**60:  # an absent limit reads "max" or nearly 2^63
            return int(limit), max(int(limit) - int(used), 0)
    return 0, 0


def _accelerators() -> tuple[Accelerator, ...]:
    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found.append(Accelerator(torch.cuda.get_device_name(index), "cuda", total, free))
    return tuple(found)


@dataclass(frozen=True)
class Rate:
    """How fast a device multiplies matrices: floating-point operations a second, and where the figure comes from."""

    device: str
    dtype: Dtype
    flops: float
    measured: bool


def named_rate(device: str) -> Rate:
    """Return the printed bf16 peak of a device by its name (`H200`, `RTX-4090`).

    Raises:
        UsageError: the device is not in the table.
    """
    key = device.strip().upper().replace(" ", "-")
    if key not in PEAK_FLOPS:
        raise UsageError(
            f"no figures for the device {device!r}{nearest(key, PEAK_FLOPS)}; known: {', '.join(sorted(PEAK_FLOPS))}."
        )
    return Rate(key, "bfloat16", PEAK_FLOPS[key], measured=False)


def measure_matmul(dtype: Dtype = "bfloat16", *, size: int = 1024, seconds: float = 0.15) -> Rate:
    """Multiply two [size, size] matrices for about `seconds` on the training device and return the median rate.

    The figure is that of large products alone: what surrounds them in a training step comes on top.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rates = product_rates(dtype, size=size, seconds=seconds, device=device)
    name = torch.cuda.get_device_name(0) if device == "cuda" else "this CPU"
    return Rate(name, dtype, median(rates), measured=True)


def fastest_rate(*, seconds: float = 0.15) -> Rate:
    """Measure fp32 and bf16 products and return the faster: not every CPU has units for bf16."""
    return max(
        (measure_matmul("bfloat16", seconds=seconds), measure_matmul("float32", seconds=seconds)),
        key=lambda rate: rate.flops,
    )
