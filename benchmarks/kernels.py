"""How fast are the native kernels beside PyTorch, bitsandbytes and the memory? `python -m benchmarks.kernels`

Each case runs in turns with the PyTorch reference, with a probe of the memory, and with bitsandbytes where it does the
same, so that what else the machine does falls on all alike. The table gives the median of a call in CPU milliseconds
(of all threads together), its quartiles, the median of the paired ratio to the reference, and the share of the probe's
rate. The probe of a rounding is a copy into fresh memory that reads and writes as many bytes together, for fresh
results are part of every time, as they are in use; that of a one-token product is the sum of as many bytes of float32,
which are only read. Products cycle through weights of 256 MB together, so that none lies in a cache. Results are
compared before anything is timed: a rounding bit for bit, a product to 1% of its largest value.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from strop import kernels
from strop.files.gguf.blocks import encode
from strop.layers.quant_linear import QuantLinear
from strop.numerics import fake_quantize, parse_scheme, quantize_tensor

ROUNDING = ("int4-g32", "int4-g32-full", "int4-g128-asym", "int3-g64", "int8", "nf4")
CODES = ("int8", "int4-g32", "int4-g128-asym", "int3-g64", "int2-g32", "nf4")
SEARCHED = ("q4_k", "q6_k")
PRODUCTS = ("int8", "int4-g32", "int4-g128-asym", "nf4")


@dataclass
class Case:
    """One call, what it moves, and a rival that does the same (None where there is none)."""

    name: str
    call: Callable[[], object]
    moved_bytes: int
    rival: Callable[[], object] | None = None
    is_product: bool = False


def trained(weight: Tensor, text: str) -> Callable[[], object]:
    """A rounding and its gradient, as a training step calls them."""
    scheme, leaf, upstream = parse_scheme(text), weight.clone().requires_grad_(), torch.ones_like(weight)

    def call() -> Tensor:
        leaf.grad = None
        fake_quantize(leaf, scheme).backward(upstream)
        assert leaf.grad is not None
        return leaf.grad

    return call


def cases(rows: int, columns: int, dtype: torch.dtype) -> list[Case]:
    weight = 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    one_pass, name = 2 * weight.nbytes, str(dtype).removeprefix("torch.")
    found: list[Case] = []
    for text in ROUNDING:
        scheme = parse_scheme(text)
        found.append(Case(f"fake {name} {text}", lambda s=scheme: fake_quantize(weight, s), one_pass))
    found.append(Case(f"fake + gradient {name} int4-g32-full", trained(weight, "int4-g32-full"), 2 * one_pass))
    for text in CODES:
        scheme = parse_scheme(text)
        held = quantize_tensor(weight, scheme)
        rivals = bitsandbytes_nf4(weight) if text == "nf4" else (None, None)
        moved = weight.nbytes + held.nbytes
        found.append(
            Case(f"quantize {name} {text}", lambda s=scheme: quantize_tensor(weight, s).codes, moved, rivals[0])
        )
        found.append(Case(f"dequantize {name} {text}", lambda h=held: h.dequantize(dtype), moved, rivals[1]))
    for text in SEARCHED:
        moved = weight.nbytes + encode(weight, text).nbytes
        found.append(Case(f"search {name} {text}", lambda t=text: torch.from_numpy(encode(weight, t)), moved))
    return found


def products(rows: int, columns: int, dtype: torch.dtype) -> list[Case]:
    """One token through quantized layers; the reference makes each weight dense first."""
    generator, name = torch.Generator().manual_seed(0), str(dtype).removeprefix("torch.")
    x = torch.randn(1, columns, generator=generator).to(dtype)
    found: list[Case] = []
    for text in PRODUCTS:
        weight = 0.02 * torch.randn(rows, columns, generator=generator)
        layer = QuantLinear(quantize_tensor(weight, parse_scheme(text)))
        bytes_each = layer.qtensor.nbytes
        layers = [copy.deepcopy(layer) for _ in range(max(1, (256 << 20) // bytes_each))]
        turns = itertools.cycle(layers)

        def call(turns: Iterator[nn.Module] = turns, count: int = len(layers)) -> Tensor:
            with torch.no_grad():
                for _ in range(count - 1):
                    next(turns)(x)
                return next(turns)(x)

        rival = bitsandbytes_linear(weight.to(dtype), x, len(layers)) if text == "nf4" else None
        moved = bytes_each * len(layers)
        found.append(Case(f"product of 1 token {name} {text} x {len(layers)}", call, moved, rival, is_product=True))
    return found


def bitsandbytes_linear(weight: Tensor, x: Tensor, count: int) -> Callable[[], object] | None:
    try:
        import bitsandbytes
        from bitsandbytes import functional
    except ImportError:
        return None
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes = [packed.clone() for _ in range(count)]

    def call() -> Tensor:
        with torch.no_grad():
            multiply = bitsandbytes.matmul_4bit  # pyright: ignore[reportPrivateImportUsage]
            results = [multiply(x, one.t(), quant_state=state) for one in codes]
        return results[-1]

    return call


def bitsandbytes_nf4(weight: Tensor) -> tuple[Callable[[], object] | None, Callable[[], object] | None]:
    try:
        from bitsandbytes import functional
    except ImportError:
        return None, None
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return (
        lambda: functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"),
        lambda: functional.dequantize_4bit(packed, state),
    )


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def by_reference(call: Callable[[], object]) -> Callable[[], object]:
    def forced() -> object:
        with kernels.forced("reference"):
            return call()

    return forced


def measured(case: Case, pairs: int) -> str:
    made, expected = case.call(), by_reference(case.call)()
    assert isinstance(made, Tensor)
    assert isinstance(expected, Tensor)
    if case.is_product:
        assert (made - expected).abs().max() < 0.01 * expected.abs().max(), case.name
        read = torch.ones(case.moved_bytes // 4)
        probe: Callable[[], object] = read.sum
    else:
        assert torch.equal(made.view(torch.uint8), expected.view(torch.uint8)), f"{case.name}: not the reference's bits"
        probe = torch.ones(case.moved_bytes // 2, dtype=torch.uint8).clone
    calls: dict[str, Callable[[], object]] = {
        "probe": probe,
        "kernel": case.call,
        "reference": by_reference(case.call),
    }
    if case.rival is not None:
        calls["rival"] = case.rival
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(pairs + 1):
        for name, call in calls.items():
            times[name].append(cpu_seconds(call))
    times = {name: found[1:] for name, found in times.items()}  # the first pair warms up
    kernel = times["kernel"]
    low, middle, high = statistics.quantiles(kernel, n=4)
    ratios = [slow / fast for slow, fast in zip(times["reference"], kernel, strict=True)]
    share = statistics.median(probe / own for probe, own in zip(times["probe"], kernel, strict=True))
    rival = "-"
    if case.rival is not None:
        rival = f"{statistics.median(slow / fast for slow, fast in zip(times['rival'], kernel, strict=True)):.2f}"
    rate = case.moved_bytes / middle / 1e9
    return (
        f"| {case.name} | {1e3 * middle:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f}) | {rate:.1f} | {share:.2f} "
        f"| {statistics.median(ratios):.1f} | {rival} |"
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=2048)
    options.add_argument("--columns", type=int, default=5632)
    options.add_argument("--pairs", type=int, default=9, help="calls of each, in turns (at least 7)")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--only", default="", help="cases whose name holds this")
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    choice = kernels.in_use()
    versions = []
    for package in ("torch", "bitsandbytes"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    print(f"{processor()}, {asked.threads} threads; {', '.join(versions)}; {choice.compiler}")
    print(f"kernels: {choice.name} ({choice.reason}); weights [{asked.rows}, {asked.columns}]; {asked.pairs} pairs\n")
    print("| case | CPU ms (quartiles) | GB/s | of the probe's rate | reference / kernel | bitsandbytes / kernel |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for kind in (cases, products):
            for case in kind(asked.rows, asked.columns, dtype):
                if asked.only in case.name:
                    print(measured(case, asked.pairs), flush=True)


if __name__ == "__main__":
    main()
