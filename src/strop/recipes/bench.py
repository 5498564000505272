"""`strop bench`: what this machine can do, and how near a model comes to it.

The machine: memory read and copied, matrices multiplied in each dtype, and which native kernels are in use or why the
PyTorch reference is. A model: how long it takes to open, its peak memory, and its tokens per second against two limits,

    writing   bytes read per second / bytes read per token    (every weight once, and the cache of keys and values)
    reading   operations per second / operations per token    (two for each weight in the blocks)

both with the rates that were measured beside it. Nothing is written, and everything is said with its spread: on a
machine that does other work too, figures of one run compare, and figures of two days do not.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch

from strop import kernels
from strop.errors import UsageError
from strop.evaluation.comparison import mebibytes, significant
from strop.evaluation.engines import Engine, open_engine
from strop.evaluation.probes import (
    PROBE_BYTES,
    PRODUCT_DTYPES,
    OtherWork,
    ProductDtype,
    Spread,
    memory_rates,
    product_rates,
    spread,
)
from strop.evaluation.speed import Rate, Speed
from strop.evaluation.weights_read import WeightCounts, count_weights
from strop.kernels import Choice
from strop.memory import PeakMemory, release_unused_memory, steady_allocation
from strop.planner.hardware import Machine, this_machine
from strop.progress import SILENT, Reporter

PRODUCT_SIZE: Final = 1024
STEADY: Final = 1.25
"""Upper quartile over lower: above it a rate is said to vary."""

_COMPUTED: Final[dict[torch.dtype, ProductDtype]] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class ModelBench:
    """One model on this machine.

    Attributes:
        source: What was asked for.
        format: The number format of its weights, or their dtype.
        runtime: What ran it: "transformers" or "llama.cpp".
        weights: Its weights, counted.
        cache_bytes_per_token: Bytes of keys and values that each token takes.
        load_seconds: Opening it, once, with its files as the system had them.
        peak_bytes: The most memory held while it was opened and ran, above the value before.
        speed: Tokens per second.
        read: Memory, probed before and after.
        product: The dtype whose matrix rate limits reading; None where none of those measured is used.
        write_limit: Tokens per second that memory allows.
        read_limit: Tokens per second that the matrix rate allows; None without `product`.
    """

    source: str
    format: str
    runtime: str
    weights: WeightCounts
    cache_bytes_per_token: float
    load_seconds: float
    peak_bytes: int
    speed: Speed
    read: Spread
    product: ProductDtype | None
    write_limit: float
    read_limit: float | None

    @property
    def write_share(self) -> float:
        """Tokens written per second over what memory allows."""
        return self.speed.decode.median / self.write_limit

    @property
    def read_share(self) -> float | None:
        """Tokens read per second over what the matrix rate allows."""
        return None if self.read_limit is None else self.speed.prefill.median / self.read_limit

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"write_share": self.write_share, "read_share": self.read_share}

    def rows(self) -> list[list[str]]:
        """Both rates against their limits; `HEADERS` stands above."""
        limits = (f"memory at {_rate(self.read)}", f"{self.product} products")
        return [
            _against("write", self.speed.decode, limits[0], self.write_limit, self.write_share),
            _against("read", self.speed.prefill, limits[1], self.read_limit, self.read_share),
        ]

    def lines(self) -> list[str]:
        """The rest in words."""
        counted = self.weights
        found = [
            f"{self.source}: {self.format}, in {self.runtime}; opened in {self.load_seconds:.2g} s (once), peak memory "
            f"{mebibytes(self.peak_bytes)} MiB",
            f"weights {counted.held_bytes / 1e6:,.1f} MB; a token reads {counted.read_bytes / 1e6:,.1f} MB of them, "
            f"and {self.cache_bytes_per_token:,.0f} bytes for each token before it",
        ]
        if counted.held_bytes < PROBE_BYTES:
            found.append(
                f"that is less than the {PROBE_BYTES / 1e6:,.0f} MB that the probe reads: caches may hold the weights, "
                "and writing can pass the limit"
            )
        return found

    HEADERS = ("", "tokens/s", "slowest to fastest", "at the limit", "share", "limited by")


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        processor: Its name, as the system gives it.
        machine: Memory, cores, threads, accelerators.
        device: What was probed.
        kernels: Which native kernels are in use, and why.
        read: Memory read.
        copy: Memory copied; bytes read and written both count.
        products: Matrix products by dtype.
        refused: Dtypes that the device does not multiply, with the reason.
        other_cores: Cores' worth of work that other processes did meanwhile.
        model: The model, where one was given.
    """

    processor: str
    machine: Machine
    device: str
    kernels: Choice
    read: Spread
    copy: Spread
    products: dict[ProductDtype, Spread]
    refused: dict[ProductDtype, str]
    other_cores: float
    model: ModelBench | None = None

    HEADERS = ("", "median", "middle half", "slowest to fastest", "runs")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; rates in bytes, operations and tokens per second."""
        library = self.kernels.library
        return asdict(self) | {
            "machine": self.machine.to_dict(),
            "kernels": asdict(self.kernels) | {"library": None if library is None else str(library)},
            "model": None if self.model is None else self.model.to_dict(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }

    def rows(self) -> list[list[str]]:
        """The machine's rates; `HEADERS` stands above."""
        named = [("memory read", self.read), ("memory copied", self.copy)]
        named += [(f"{dtype} product", found) for dtype, found in self.products.items()]
        return [[name, *_cells(found)] for name, found in named]

    def lines(self) -> list[str]:
        """What stands beside the table."""
        found = [
            f"{self.processor}: {self.machine.cores} cores, {self.machine.threads} threads used; other processes kept "
            f"{self.other_cores:.1f} cores busy",
            f"kernels: {self.kernels.name} ({self.kernels.reason})",
        ]
        found += [f"{dtype}: not measured on {self.device}: {why}" for dtype, why in self.refused.items()]
        varied = [row[0] for row, each in zip(self.rows(), self._spreads(), strict=True) if _varies(each)]
        if varied:
            found.append(f"these vary by more than {STEADY:g} times, so hold for this run only: {', '.join(varied)}")
        return found

    def _spreads(self) -> Sequence[Spread]:
        return [self.read, self.copy, *self.products.values()]


def bench(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str = "cpu",
    seconds: float = 1.0,
    reporter: Reporter = SILENT,
) -> Bench:
    """Measure this machine, and a model on it.

    Args:
        model: A folder, run, adapter, hub id, "demo" or GGUF file; None for the machine alone.
        device: What is probed, and where the model runs.
        seconds: Of each probe; there are five, and two more with a model.
        reporter: Told the probes.

    Raises:
        UsageError: `seconds` is not above 0, or the device is not there.
        MissingInputError, ModelError: as `strop.load`.
    """
    if not seconds > 0:
        raise UsageError(f"seconds is {seconds:g}; needed a number above 0, the time of each probe")
    _require(device)
    with OtherWork() as others:
        reporter.start("probe the machine", 2 + len(PRODUCT_DTYPES), "probes")
        read = spread(memory_rates("read", seconds=seconds, device=device), "bytes")
        reporter.advance(1)
        copy = spread(memory_rates("copy", seconds=seconds, device=device), "bytes")
        reporter.advance(2)
        products: dict[ProductDtype, Spread] = {}
        refused: dict[ProductDtype, str] = {}
        for done, dtype in enumerate(PRODUCT_DTYPES, start=3):
            try:
                rates = product_rates(dtype, size=PRODUCT_SIZE, seconds=seconds, device=device)
                products[dtype] = spread(rates, "operations")
            except RuntimeError as error:  # NotImplementedError is one
                refused[dtype] = str(error).splitlines()[0]
            reporter.advance(done)
        reporter.finish()
        measured = None if model is None else _on_this_machine(model, products, device, seconds, reporter)
    return Bench(
        processor=_processor(device),
        machine=this_machine(),
        device=device,
        kernels=kernels.in_use(),
        read=read,
        copy=copy,
        products=products,
        refused=refused,
        other_cores=others.cores,
        model=measured,
    )


def _on_this_machine(
    model: str | os.PathLike[str],
    products: dict[ProductDtype, Spread],
    device: str,
    seconds: float,
    reporter: Reporter,
) -> ModelBench:
    reporter.start(f"open and time {model}", None, "runs")
    release_unused_memory()
    with PeakMemory() as opening, steady_allocation():
        started = time.perf_counter()
        engine = open_engine(model, device=device)
        load_seconds = time.perf_counter() - started
    rates = memory_rates("read", seconds=seconds / 2, device=device)
    with PeakMemory(opening.baseline_bytes) as running:
        speed = engine.speed()
    rates += memory_rates("read", seconds=seconds / 2, device=device)
    reporter.finish()
    counted, read = count_weights(engine), spread(rates, "bytes")
    cache = engine.cache_bytes(None)
    held = speed.prefill.tokens + speed.decode.tokens / 2  # tokens in the cache, on average while writing
    product = _product(engine, products)
    return ModelBench(
        source=str(model),
        format=engine.format,
        runtime="llama.cpp" if engine.network is None else "transformers",
        weights=counted,
        cache_bytes_per_token=cache,
        load_seconds=load_seconds,
        peak_bytes=max(opening.peak_bytes, running.peak_bytes),
        speed=speed,
        read=read,
        product=product,
        write_limit=read.median / (counted.read_bytes + cache * held),
        read_limit=None if product is None else products[product].median / (2 * max(counted.multiplied, 1)),
    )


def _product(engine: Engine, products: dict[ProductDtype, Spread]) -> ProductDtype | None:
    """The dtype that a prompt is multiplied in: the model's; llama.cpp takes what it likes, so the fastest."""
    if engine.network is None:
        return max(products, key=lambda dtype: products[dtype].median, default=None)
    found = _COMPUTED.get(engine.network.dtype)
    return found if found in products else None


def _require(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise UsageError(f"device {device!r}: {str(error).splitlines()[0]}; there is cpu") from None


def _processor(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            named = dict(line.split(":", 1) for line in lines if ":" in line)
        return {key.strip(): value.strip() for key, value in named.items()}["model name"]
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def _varies(found: Spread) -> bool:
    return found.upper > STEADY * found.lower


def _rate(found: Spread) -> str:
    """A rate as people read it."""
    return f"{significant(found.median / 1e9)} {'GB/s' if found.unit == 'bytes' else 'GOP/s'}"


def _cells(found: Spread) -> list[str]:
    lower, upper, slowest, fastest = (
        significant(value / 1e9) for value in (found.lower, found.upper, found.slowest, found.fastest)
    )
    return [_rate(found), f"{lower} to {upper}", f"{slowest} to {fastest}", str(found.runs)]


def _against(name: str, rate: Rate, limit: str, at_limit: float | None, share: float | None) -> list[str]:
    known = ["-", "-", "-"] if at_limit is None or share is None else [significant(at_limit), f"{share:.0%}", limit]
    return [name, significant(rate.median), f"{significant(rate.slowest)} to {significant(rate.fastest)}", *known]
