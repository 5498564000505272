"""How fast this machine is now: reading and copying memory, multiplying matrices. A median with its spread.

Each probe runs once to warm up and then for a while; what else the machine does falls on it and shows in the spread.
Rates are per second of wall-clock time, bytes in powers of ten. Memory is probed with arrays that are far larger than a
core's own caches (a cache that is shared by many cores can still hold them, and the rate is then that cache's).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from strop.kernels import int8
from strop.numerics.int8_matmul import int8_matmul

ProductDtype = Literal["float32", "bfloat16", "int8"]
PRODUCT_DTYPES: Final[tuple[ProductDtype, ...]] = ("float32", "bfloat16", "int8")

PROBE_BYTES: Final = 256 << 20
"""Of the array that is read or copied."""

_ROW: Final = 1024
_FEWEST: Final = 5


@dataclass(frozen=True)
class Spread:
    """A rate over several runs, in `unit` per second.

    Attributes:
        median: The middle run.
        lower: The quartile below it.
        upper: The quartile above it.
        slowest: The slowest run.
        fastest: The fastest run.
        runs: Runs that counted.
        unit: "bytes" or "operations" (a multiplication and an addition are two).
    """

    median: float
    lower: float
    upper: float
    slowest: float
    fastest: float
    runs: int
    unit: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def spread(rates: list[float], unit: str) -> Spread:
    """The rates of two runs or more in short."""
    lower, _, upper = statistics.quantiles(rates, n=4, method="inclusive")
    return Spread(statistics.median(rates), lower, upper, min(rates), max(rates), len(rates), unit)


def product_rates(dtype: ProductDtype, *, size: int = 1024, seconds: float = 0.15, device: str = "cpu") -> list[float]:
    """Multiply two [size, size] matrices again and again; operations per second of each run.

    float32 and bfloat16 are `torch.mm`'s; int8 is that of strop's own kernel where it has one, else `torch._int_mm`'s,
    with int32 sums.
    """
    generator = torch.Generator(device=device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device) for _ in range(2))
    multiply: Callable[[Tensor, Tensor], Tensor] = torch.mm
    if dtype == "int8":
        left, right = (each.mul(30).clamp(-127, 127).to(torch.int8) for each in (left, right))
        own = int8.sums(left, right) is not None
        multiply = int8_matmul if own else torch._int_mm  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    elif dtype == "bfloat16":
        left, right = left.bfloat16(), right.bfloat16()
    return _rates(lambda: multiply(left, right), 2 * size**3, seconds, device)


def memory_rates(
    kind: Literal["read", "copy"], *, size_bytes: int = PROBE_BYTES, seconds: float = 0.5, device: str = "cpu"
) -> list[float]:
    """Go through memory again and again; bytes per second of each run.

    "read" multiplies a float32 matrix with a vector, which reads each number once, as writing a token does with
    weights; "copy" reads and writes, and both count.
    """
    source = torch.ones(size_bytes // 4 // _ROW, _ROW, device=device)
    if kind == "read":
        vector = torch.ones(_ROW, device=device)
        return _rates(lambda: torch.mv(source, vector), source.nbytes, seconds, device)
    target = torch.empty_like(source)
    return _rates(lambda: target.copy_(source), 2 * source.nbytes, seconds, device)


def _rates(work: Callable[[], object], amount: float, seconds: float, device: str) -> list[float]:
    """`amount` over the time of each run, after one that does not count (it may make code and take fresh memory)."""
    found: list[float] = []
    with torch.inference_mode():
        _timed(work, device)
        end = time.perf_counter() + seconds
        while len(found) < _FEWEST or time.perf_counter() < end:
            found.append(amount / _timed(work, device))
    return found


def _timed(work: Callable[[], object], device: str) -> float:
    settle(device)
    started = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - started


def settle(device: str | torch.device) -> None:
    """Wait for work that an accelerator was handed but has not done."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class OtherWork:
    """Context manager that finds how busy other processes kept this machine while its block ran.

    Attributes:
        cores: Cores' worth of work of other processes, on average.
    """

    def __init__(self) -> None:
        self.cores = 0.0

    def __enter__(self) -> OtherWork:
        self._wall, self._busy, self._own = time.perf_counter(), _busy_seconds(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall = max(time.perf_counter() - self._wall, 1e-9)
        own = time.process_time() - self._own
        self.cores = max(0.0, (_busy_seconds() - self._busy - own) / wall)


def _busy_seconds() -> float:
    """Seconds that all cores together have worked since the system started."""
    import psutil

    times = psutil.cpu_times()._asdict()
    # On Linux a guest's time is counted in the user's too; a stolen second was not this machine's to work in.
    idle = ("idle", "iowait", "steal", "guest", "guest_nice")
    return float(sum(value for name, value in times.items() if name not in idle))
