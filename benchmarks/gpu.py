"""How fast are quantized weights and adapters on a GPU? `python -m benchmarks.gpu`, which takes at most 8 minutes.

The cases are those of the benchmarks for CPUs: codes and values by format, quantized layers with one token and with
many, a step of LoRA and of QLoRA at 135 million parameters, answers written greedily. On a GPU they are PyTorch's
operators (the reference of `numerics`; the native kernels are for CPUs): a product makes its weight dense first.

Before anything is timed, each kind of case is compared with the reference on the CPU, at a small size in float32 (and
bfloat16, where its rounding sets the bound); a difference ends the run with exit code 1. Times are those of the wall,
between two waits for the device: the median of the calls and their quartiles, in turns with bitsandbytes, and PEFT over
it, where they are installed. Steps are the usual bare loop (forward, backward, AdamW) around strop's layers and around
PEFT's. Results go to a file of JSON lines, where they replace those of the same machine.

`--device cpu --size tiny` tries all of it out where there is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.generation import Answers, Prompts, by_generate, by_our_loop, count
from benchmarks.kernels import bitsandbytes_linear, bitsandbytes_nf4, processor
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from strop import kernels
from strop.evaluation.decoding import decodes
from strop.evaluation.writing import Manner
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import attach_lora, quantize_linears
from strop.numerics import QuantizedTensor, parse_scheme, quantize_tensor

FORMATS = ("int8", "int4-g32", "int4-g128-asym", "int3-g64", "int2-g32", "nf4", "nf4-dq", "fp8")
LINEARS = ("int8", "int4-g32", "int4-g128-asym", "nf4")
CODES_DIFFER = 1e-4
"""The share of codes that may differ: a quotient rounded otherwise falls to the other side of a midpoint."""
LEAST_SECONDS = 2e-3
"""What is timed at once takes at least this long: a wait for the device takes some hundredths of a millisecond."""
OFF = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""How far a product may be off, as a share of its norm: sums in another order, and one rounding to bfloat16."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rows: int
    columns: int
    tokens: int
    length: int
    prompt: int
    new: int
    hidden: int
    layers: int
    heads: int
    vocabulary: int
    cycled_bytes: int  # of weights that products of one token take in turns, so that none lies in a cache
    calls: int


SIZES = {
    "full": Size(5632, 2048, 4096, 2048, 64, 64, 576, 30, 9, 49152, 256 << 20, 15),
    "tiny": Size(64, 128, 8, 16, 8, 4, 96, 2, 3, 128, 0, 3),
}


@dataclass(frozen=True)
class Check:
    """A comparison with the reference on the CPU: what was found and what is allowed."""

    name: str
    found: float
    allowed: float

    @property
    def holds(self) -> bool:
        return self.found <= self.allowed


@dataclass
class Case:
    """One call, a rival that does the same (None where there is none), and what a call moves or makes."""

    name: str
    call: Callable[[], object]
    rival: Callable[[], object] | None = None
    amount: float = 0.0
    unit: str = "GB/s"


# --- correctness ----------------------------------------------------------------------------------------------------


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def differing(a: Tensor, b: Tensor) -> float:
    """The share of bytes that differ."""
    left, right = (each.cpu().contiguous().view(-1).view(torch.uint8) for each in (a, b))
    return float((left != right).double().mean()) if left.shape == right.shape else 1.0


def off(found: Tensor, expected: Tensor) -> float:
    """The distance as a share of what is expected; infinite where it is no number."""
    share = (found.cpu().double() - expected.cpu().double()).norm() / expected.cpu().double().norm()
    return float(share) if torch.isfinite(share) else float("inf")


def format_checks(device: torch.device) -> Iterator[Check]:
    """Codes of the same weight, and values of the same codes."""
    weight = 0.02 * drawn(48, 256)
    for text in FORMATS:
        scheme = parse_scheme(text)
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{text} {str(dtype).removeprefix('torch.')}"
            with kernels.forced("reference"):
                held = quantize_tensor(weight.to(dtype), scheme)
                values = held.dequantize(dtype)
            made = quantize_tensor(weight.to(dtype).to(device), scheme)
            yield Check(f"codes {name}", differing(made.codes, held.codes), CODES_DIFFER)
            yield Check(f"values {name}", differing(moved(held, device).dequantize(dtype), values), 0.0)


def moved(held: QuantizedTensor, device: torch.device) -> QuantizedTensor:
    tensors = {name: tensor.to(device) for name, tensor in held.tensors().items()}
    return QuantizedTensor.from_tensors(tensors, held.scheme, held.shape)


def linear_checks(device: torch.device) -> Iterator[Check]:
    """A layer's output and the gradient of its input against float64 products with the reference's weight."""
    for text in LINEARS:
        with kernels.forced("reference"):
            held = quantize_tensor(0.02 * drawn(48, 256), parse_scheme(text))
            weight = held.dequantize(torch.float32).double()
        layer = QuantLinear(moved(held, device))
        for dtype, allowed in OFF.items():
            for tokens in (1, 32):
                name = f"{text} {str(dtype).removeprefix('torch.')} {tokens} tokens"
                x, grad = drawn(tokens, 256, seed=1).to(dtype), drawn(tokens, 48, seed=2).to(dtype)
                with torch.no_grad():
                    yield Check(f"linear {name}", off(layer(x.to(device)), x.double() @ weight.T), allowed)
                leaf = x.to(device).requires_grad_()
                layer(leaf).backward(grad.to(device))
                assert leaf.grad is not None
                yield Check(f"gradient {name}", off(leaf.grad, grad.double() @ weight), allowed)


def adapted(model: LlamaForCausalLM, text: str | None) -> LlamaForCausalLM:
    """LoRA over every linear layer of the blocks, and those in a format where one is named."""
    if text is not None:
        quantize_linears(model, parse_scheme(text))
    attach_lora(model, rank=16, alpha=32.0, generator=torch.Generator().manual_seed(0))
    return model


def llama(size: Size, device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """Random weights whose logits spread as a trained model's do."""
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 3,
        vocab_size=size.vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    nn.Module.to(model, device, dtype)
    return model


def token_rows(size: Size, rows: int, length: int) -> Tensor:
    return torch.randint(5, size.vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def model_checks(device: torch.device) -> Iterator[Check]:
    """Three steps of gradient descent on adapters, and greedy answers, by a small model in float32."""
    size = SIZES["tiny"]
    ids = token_rows(size, 2, size.length)
    for text in (None, "nf4", "int4-g32"):
        name = "lora" if text is None else f"qlora {text}"
        with kernels.forced("reference"):
            start = adapted(llama(size, dtype=torch.float32), text)
        there = copy.deepcopy(start)
        nn.Module.to(there, device)
        with kernels.forced("reference"):
            losses, parts = three_steps(start, ids)
        found, others = three_steps(there, ids.to(device))
        yield Check(f"losses of {name}", off(found, losses), 1e-5)
        yield Check(f"adapters after 3 steps of {name}", off(others, parts), 1e-3)
        prompts, manner = ids.tolist(), Manner((), size.new, None, 2)
        with kernels.forced("reference"):
            expected = by_generate(start.eval(), prompts, manner)
        written = by_generate(there.eval(), prompts, manner)
        wrong = sum(a != b for at in expected for a, b in zip(expected[at], written[at], strict=True))
        yield Check(f"tokens of greedy answers, {name}", wrong, 0)


def three_steps(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The losses, and what the adapters are after it, in one row."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=0.1), []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), torch.cat([parameter.detach().reshape(-1) for parameter in trained])


def all_checks(device: torch.device) -> list[Check]:
    return [*format_checks(device), *linear_checks(device), *model_checks(device)]


# --- times ----------------------------------------------------------------------------------------------------------


def format_cases(size: Size, device: torch.device) -> Iterator[Case]:
    weight = (0.02 * drawn(size.rows, size.columns)).bfloat16().to(device)
    for text in FORMATS:
        scheme = parse_scheme(text)
        held = quantize_tensor(weight, scheme)
        rivals = bitsandbytes_nf4(weight) if text == "nf4" else (None, None)
        gigabytes = (weight.nbytes + held.nbytes) / 1e9
        yield Case(f"quantize {text}", lambda s=scheme: quantize_tensor(weight, s), rivals[0], gigabytes)
        yield Case(f"dequantize {text}", lambda h=held: h.dequantize(torch.bfloat16), rivals[1], gigabytes)


def linear_cases(size: Size, device: torch.device) -> Iterator[Case]:
    weight = (0.02 * drawn(size.rows, size.columns)).bfloat16().to(device)
    for text in ("bf16", *LINEARS):
        layer: nn.Module = nn.Linear(size.columns, size.rows, bias=False, device=device, dtype=torch.bfloat16)
        if text != "bf16":
            layer = QuantLinear(quantize_tensor(weight, parse_scheme(text)))
        held = sum(parameter.nbytes for parameter in layer.parameters())
        for tokens in (1, size.tokens):
            number = max(1, size.cycled_bytes // held) if tokens == 1 else 1
            layers = [copy.deepcopy(layer) for _ in range(number)]
            x = drawn(tokens, size.columns, seed=1).bfloat16().to(device)
            rival = bitsandbytes_linear(weight, x, number) if text == "nf4" else None
            name = f"linear {text}, {tokens} tokens" + (f" x {number}" if number > 1 else "")
            yield Case(name, lambda all_=layers, x=x: each_of(all_, x), rival, tokens * number, "tokens/s")


@torch.no_grad()
def each_of(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    return [layer(x) for layer in layers][-1]


def step_of(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_peft(folder: str, device: torch.device, *, nf4: bool) -> nn.Module | None:
    """PEFT's adapters over the same model, on bitsandbytes' NF4 or on bf16; None where they are not installed."""
    try:
        import bitsandbytes  # noqa: F401
        from peft import LoraConfig, get_peft_model
        from transformers import BitsAndBytesConfig
    except ImportError:
        return None
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config if nf4 else None, device_map={"": device}
    )
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def step_cases(size: Size, device: torch.device) -> Iterator[Case]:
    ids = token_rows(size, 1, size.length).to(device)
    with tempfile.TemporaryDirectory() as folder:
        llama(size).save_pretrained(folder)
        for text in (None, "nf4", "int4-g32"):
            model = adapted(llama(size, device), text)
            other = by_peft(folder, device, nf4=text == "nf4") if text in (None, "nf4") else None
            rival = None if other is None else step_of(other, ids)
            name = "lora" if text is None else f"qlora {text}"
            yield Case(f"step of {name}, 1 x {size.length}", step_of(model, ids), rival, size.length, "tokens/s")


def written(way: Callable[..., Answers], model: PreTrainedModel, prompts: Prompts, manner: Manner) -> int:
    return count(way(model, prompts, manner))


def writing_cases(size: Size, device: torch.device) -> Iterator[Case]:
    """Greedy answers by our own loop, where it takes the model, beside transformers' generate."""
    for text in (None, "nf4", "int4-g32"):
        model: PreTrainedModel = llama(size, device).eval()
        if text is not None:
            quantize_linears(model, parse_scheme(text))
        for batch in (1, 8):
            prompts, manner = token_rows(size, batch, size.prompt).tolist(), Manner((), size.new, None, batch)
            ours, theirs = (partial(written, way, model, prompts, manner) for way in (by_our_loop, by_generate))
            name, tokens = f"writing {text or 'bf16'}, batch {batch}", batch * size.new
            if decodes(model, size.prompt + size.new):
                yield Case(name, ours, theirs, tokens, "tokens/s")
            else:
                yield Case(f"{name}, by generate", theirs, None, tokens, "tokens/s")


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Of one of some calls in a row."""
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait(device)
    return (time.perf_counter() - start) / repeats


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(case: Case, calls: int, device: torch.device) -> dict[str, Any]:
    """A case's figures; two calls of each warm up, and say how many in a row take `LEAST_SECONDS`."""
    both = [call for call in (case.call, case.rival) if call is not None]
    warm = [min(seconds_of(call, device) for _ in range(2)) for call in both]
    repeats = [max(1, min(100, int(LEAST_SECONDS / seconds))) for seconds in warm]
    times: list[list[float]] = [[] for _ in both]
    for _ in range(calls):
        for call, often, found in zip(both, repeats, times, strict=True):
            found.append(seconds_of(call, device, often))
    low, middle, high = statistics.quantiles(times[0], n=4)
    figures: dict[str, Any] = {"case": case.name, "ms": [round(1e3 * each, 4) for each in (low, middle, high)]}
    figures |= {"rate": round(case.amount / middle, 2), "unit": case.unit}
    if case.rival is not None:
        figures["rival_ms"] = round(1e3 * statistics.median(times[1]), 4)
        figures["rival_by_ours"] = round(statistics.median(b / a for a, b in zip(*times, strict=True)), 3)
    return figures


def line_of(figures: dict[str, Any]) -> str:
    low, middle, high = figures["ms"]
    rival = f"{figures['rival_by_ours']:.2f}" if "rival_ms" in figures else "-"
    times = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    return f"| {figures['case']} | {times} | {figures['rate']:,.1f} {figures['unit']} | {rival} |"


# --- the run --------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for package in ("transformers", "bitsandbytes", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def keep(path: Path, machine: str, size: str, lines: Sequence[dict[str, Any]]) -> None:
    """Write the results of this machine and size in place of its earlier ones."""
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    others = [line for line in before if (json.loads(line)["machine"], json.loads(line)["size"]) != (machine, size)]
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = [json.dumps({"machine": machine, "size": size} | line) for line in lines]
    path.write_text("\n".join([*others, *mine]) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda")
    options.add_argument("--size", choices=SIZES, default="full")
    options.add_argument("--minutes", type=float, default=7.0, help="no case begins after this long")
    options.add_argument("--results", type=Path, default=Path(__file__).parent / "results/gpu.jsonl")
    asked = options.parse_args(arguments)
    began, device, size = time.monotonic(), torch.device(asked.device), SIZES[asked.size]
    if device.type == "cuda" and not torch.cuda.is_available():
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        sys.stderr.write(
            f"benchmarks.gpu: PyTorch finds no CUDA device here (torch {torch.__version__}, built {built}). Run it "
            "on a machine with an NVIDIA GPU, with a torch for CUDA; --device cpu --size tiny tries it without.\n"
        )
        return 2
    cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if cuda else f"{processor()} ({platform.machine()})"
    by = "PyTorch's operators" if cuda else f"the kernels for {kernels.in_use().name}"
    print(f"{machine}; {', '.join(f'{name} {found}' for name, found in versions().items())}; {by}\n")
    checks = all_checks(device)
    wrong = [check for check in checks if not check.holds]
    for check in wrong:
        print(f"{check.name}: off by {check.found:.3g}, allowed {check.allowed:.3g}")
    if wrong:
        print(f"{len(wrong)} of {len(checks)} comparisons with the reference on the CPU fail: nothing is timed")
        return 1
    print(f"all {len(checks)} comparisons with the reference on the CPU hold\n")
    lines: list[dict[str, Any]] = [{"case": "comparisons", "held": len(checks), "by": by, "versions": versions()}]
    print("| case | ms (quartiles) | rate | rival's time / ours |\n|---|---|---|---|")
    for cases in (format_cases, linear_cases, step_cases, writing_cases):
        for case in cases(size, device):
            if time.monotonic() - began > 60 * asked.minutes:
                print(f"| {case.name} | not measured: {asked.minutes:g} minutes are over | | |")
                continue
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
            figures = measured(case, size.calls, device)
            if cuda:
                figures["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            lines.append(figures)
            print(line_of(figures), flush=True)
    keep(asked.results, machine, asked.size, lines)
    print(f"\n{time.monotonic() - began:.0f} seconds; written to {asked.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
