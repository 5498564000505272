"""`quantize`: post-training quantization of a model's linear layers, saved with a receipt of what each one lost.

An expert of a mixture is a linear layer like any other, `<parameter>.<number>`; see `strop.layers.quant_experts`.

    no rows are needed or given   each weight is rounded when transformers' loader reads it
    rows (`data`)                 blocks come one at a time (`strop.calibrate`): a method over its inputs, the result in
                                  place before the next block runs; rows held out flow along and judge both models

Memory holds the result and one weight, or one block. What was made of the blocks is kept beside the output until the
model stands, so that a killed run goes on from the last finished block, with the same bits. The head and the embeddings
keep their dtype, but for a budget, which may choose formats for them.

What a format cannot hold (a group size that does not divide, a kind of layer that its files have no place for) is
refused before any work, all of it at once, or kept in its own dtype and listed where that is asked for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from strop.calibrate.quantizing import BlockWork
from strop.errors import FormatError, UsageError
from strop.evaluation.comparison import significant
from strop.files.folders import atomic_folder, check_target
from strop.files.mixed import check_together
from strop.files.receipts import Receipt, TensorReceipt
from strop.files.saving import inexpressible, inexpressible_experts, write_model
from strop.files.shards import weight_bytes
from strop.layers.base import dense_weight, linear_shape, weight_shape
from strop.layers.quant_experts import ExpertWeights, expert_weights
from strop.layers.surgery import blocks, experts, linear_modules
from strop.methods import BLOCK_METHODS, DRIFT, HESSIAN, METHODS, Method, rtn
from strop.methods.sequential import layer_by_layer
from strop.models import load
from strop.models.sources import find_folder, is_adapter, read_config
from strop.numerics.activation_observers import MinMax
from strop.numerics.groups import plan_shape
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme
from strop.pages.receipt import RECEIPT_PAGE, write_receipt_page
from strop.progress import SILENT, Reporter
from strop.recipes.budget import FORMATS, choose_formats, parse_budget
from strop.recipes.calibrated import Calibrated, calibrate_model, open_bench
from strop.recipes.gate import Gate, layers_to_blame, more_bits
from strop.recipes.quantize_checks import (
    check_method,
    check_scale_steps,
    check_weights_only,
    observing_activations,
    scheme_of,
)
from strop.recipes.recording import record, recorded
from strop.recipes.rows import Rows


@dataclass(frozen=True)
class QuantizeResult:
    """A quantized model and its receipt.

    Attributes:
        path: The folder that was written.
        receipt: What receipt.json holds.
        choice: How the formats were chosen, in sentences; empty where one was given.
    """

    path: Path
    receipt: dict[str, Any]
    choice: Sequence[str] = ()

    def lines(self) -> list[str]:
        """The result in sentences."""
        receipt = self.receipt
        worst = max(receipt["tensors"], key=lambda tensor: tensor["relative_error"])
        lines = [
            f"{receipt['layers'] - len(receipt['fallbacks'])} of {receipt['layers']} linear layers"
            f"{_with_experts(receipt)} as {receipt['requested']}: "
            f"{receipt['bits_per_weight']:.3f} bits per weight over all of them",
            f"largest relative squared error {worst['relative_error']:.2e}, in {worst['name']}",
        ]
        if receipt["fallbacks"]:
            names = ", ".join(receipt["fallbacks"][:5]) + (", ..." if len(receipt["fallbacks"]) > 5 else "")
            lines.append(
                f"{len(receipt['fallbacks'])} of these layers kept in their own dtype, "
                f"{receipt['fallback_share']:.1%} of their parameters: {names}"
            )
        if receipt["left_alone"]:
            lines.append(f"{len(receipt['left_alone'])} tensors of experts are not quantized")
        held_out = receipt["held_out"]
        if held_out:
            lines.append(
                f"on {held_out['rows']} held-out rows: KL {held_out['kl']:.2e} nats per token from the source"
                f"{_between(held_out['kl_interval'])}, top-1 agreement {100 * held_out['top1_agreement']:.1f}%"
                f"{_between(held_out['top1_agreement_interval'], percent=True)}, "
                f"perplexity {significant(held_out['perplexity'])} "
                f"(source {significant(held_out['source_perplexity'])})"
            )
            furthest = max(receipt["blocks"], key=lambda block: block["held_out_error"] or 0.0)
            lines.append(
                f"furthest from full precision: {furthest['name']}, {furthest['held_out_error']:.2e} of its output"
            )
        return [*lines, *self.choice, f"the receipt: {self.path / RECEIPT_PAGE}", f"the model: {self.path}"]


@recorded
def quantize(
    model: str | os.PathLike[str],
    format: str | None = None,
    *,
    output: str | os.PathLike[str],
    method: str = "rtn",
    observer: str = "minmax",
    activation_observer: str = "minmax",
    budget: str | None = None,
    formats: Sequence[str] = FORMATS,
    data: Rows | None = None,
    max_rows: int = 128,
    max_length: int | None = None,
    max_memory: int | None = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    repair: bool = False,
    scale_steps: int = 0,
    chat_template: str | os.PathLike[str] | None = None,
    seed: int = 0,
    keep_indivisible: bool = False,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> QuantizeResult:
    """Round a model's linear layers to a format, or to a format each under a budget, and save the result.

    Args:
        model: A folder in full precision, a run of full fine-tuning, a hub id, or "demo".
        format: The scheme, as `--format` writes it; None with a budget.
        output: The folder to write.
        method: A name of `strop.methods.METHODS` or `BLOCK_METHODS`; those that need rows take built-in paragraphs
            where no `data` are given.
        observer: How rtn finds the range: minmax, percentile or mse.
        activation_observer: How the range of a layer's inputs is found for a format with one scale for all of them
            (`int8-a8-static`, which needs data): minmax, average, percentile or entropy.
        budget: "3.5bits", "300MB" or "kl<0.02" instead of a format: see `strop.recipes.budget`.
        formats: What layers may become under a budget, and what a repair may give them.
        data: Rows to calibrate with, of the kind that the model will see, as `tune` takes them.
        max_rows: Rows of `data` that are used; a quarter of them is held out for the receipt.
        max_length: Most tokens of a row; the model's context (at most 2,048) by default.
        max_memory: Most bytes of memory, hidden states on the disk above it.
        max_kl: The gate: most nats per token from the source, on held-out rows.
        min_agreement: The gate: least share of held-out tokens on which both models choose the same.
        repair: Past the gate, give more bits to the layers of the blocks to blame until it passes.
        scale_steps: Steps that train all scales together once every layer is rounded, on how far the whole model is
            from the source (`strop.training.scales`); the quantized model is in memory whole.
        chat_template: For models that have none, as `tune` takes it.
        seed: Of methods that draw.
        keep_indivisible: Leave a layer that the format cannot hold in its own dtype and say so in the receipt; without
            it such layers are refused, all at once, before any work.
        overwrite: Replace what stands at `output`.
        reporter: Told what happens.

    Raises:
        UsageError: A method or observer that is unknown, an observer with a method that uses none, neither or both of
            format and budget, a gate without rows to judge by, static activations without data, something stands at
            `output`, `model` is an adapter, or `max_memory` or the budget is too little.
        FormatError: A format that is unknown, needs a container that is not written, or does not fit the layers.
        GateError: The result lies past the gate; nothing is written.
        MissingInputError, ModelError, FileFormatError, DataError: As the steps raise them.
    """
    if (format is None) == (budget is None):
        raise UsageError("give a format (--format int4-g32) or a budget (--budget 3.5bits), one of the two")
    check_method(method, observer)
    gate = Gate(max_kl, min_agreement)
    if gate.asked and data is None and not needs_rows(method) and budget is None:
        raise UsageError("a gate (max-kl, min-agreement) is judged on rows that chose nothing; give some with --data")
    if repair and not gate.asked:
        raise UsageError("a repair goes on until the gate passes; say which (--max-kl, --min-agreement)")
    asked = None if budget is None else parse_budget(budget)
    known = {scheme.name: scheme for scheme in map(scheme_of, formats)} if asked is not None or repair else {}
    scheme = next(iter(known.values())) if format is None else scheme_of(format)
    check_weights_only([*known.values(), scheme] if repair else list(known.values()))
    if scale_steps:
        check_scale_steps(scale_steps, scheme, has_rows=data is not None or needs_rows(method) or asked is not None)
    observing = observing_activations(scheme, activation_observer, data)
    check_target(output, overwrite=overwrite)
    source = find_folder(model)
    plain = _skeleton(source, scheme)
    check_together([*known.values(), scheme] if repair else list(known.values()))
    misfits = {} if asked is not None else _misfits(plain, scheme)
    if misfits and not keep_indivisible:
        raise FormatError(_refusal(source, scheme, misfits, expert_weights(plain)))
    found = {} if asked is not None else expert_weights(plain)
    if repair and found:
        raise UsageError(
            "repair gives layers formats of their own, and transformers opens one format beside quantized experts; "
            "leave --repair out, and choose a format with more bits if the gate does not pass"
        )
    shapes = _layers(plain, found)
    names = [name for name in shapes if name not in misfits]
    if not names:
        raise FormatError(f"{source}: no linear layer fits {scheme}; nothing would be quantized. {_first(misfits)}")
    settings: dict[str, Any] = {"method": method, "observer": observer if method == "rtn" else None}
    if observing is not None:
        settings["activation_observer"] = activation_observer
    if scale_steps:
        settings["scale_steps"] = scale_steps
    receipt = Receipt(str(model), budget or scheme.name, settings)
    receipt.left_alone = [name for name in experts(plain) if name not in found]
    receipt.experts = sum(weights.count for weights in found.values())
    receipt.parameters = _weights(plain)
    if receipt.left_alone:
        reporter.note(
            f"{len(receipt.left_alone)} tensors of experts stay in their dtype; the layers that are rounded hold "
            f"{sum(math.prod(shapes[name]) for name in names) / _weights(plain):.0%} of the weights"
        )
    schemes = dict.fromkeys(names, scheme)
    calibrated, allocation, repairs = None, None, 0
    if data is not None or needs_rows(method) or asked is not None:
        bench = open_bench(
            source,
            data,
            max_rows=max_rows,
            max_length=max_length,
            max_memory=max_memory,
            hessian=method in HESSIAN,
            trains=method in BLOCK_METHODS,
            whole=_may_become(plain, names, [scheme, *known.values()]) if scale_steps else None,
            chat_template=chat_template,
            reporter=reporter,
        )
        work, end_method = _block_work(method, observer, seed), _end_method(method, observer)
        plan = {"method": method, "observer": observer, "activation_observer": activation_observer, "seed": seed}
        folder = Path(output).parent / f".{Path(output).name}.blocks"

        def fits(layer: str, own: Scheme) -> bool:
            return _misfit(plain, layer, own) is None

        def calibrate(chosen: Mapping[str, Scheme]) -> Calibrated:
            return calibrate_model(
                bench,
                chosen,
                work,
                plan=plan,
                folder=folder,
                end_method=end_method,
                activation_observer=observing or MinMax,
                scale_steps=scale_steps,
                seed=seed,
                reporter=reporter,
            )

        if asked is not None:
            trials = folder.with_name(f"{folder.name}.trial")
            allocation = choose_formats(
                bench, asked, known, fits, work, plan=plan, folder=trials, end_method=end_method, reporter=reporter
            )
            schemes = dict(allocation.schemes)
            shapes |= {name: weight_shape(plain.get_submodule(name)) for name in schemes if name not in shapes}
        calibrated = calibrate(schemes)
        while problems := gate.problems(calibrated.held_out):
            blamed = layers_to_blame(bench, calibrated)
            if not repair:
                raise gate.error(problems, calibrated, blamed)
            schemes = more_bits(calibrated, schemes, list(known.values()), fits, blamed, reporter)
            calibrated, repairs = calibrate(schemes), repairs + 1
        _record(calibrated, receipt, reporter)
        receipt.gate = gate.passed(repairs)
    made = {} if calibrated is None else dict(calibrated.receipts)
    rounding = (
        _round_on_reading(schemes, method, observer, made, reporter)
        if calibrated is None
        else lambda name, _: calibrated.weight(name)
    )
    with atomic_folder(output, overwrite=overwrite) as temporary:
        reporter.start("write the model", len(names), "layers")
        try:
            opened = load(source, schemes, rounding=rounding)
        finally:
            reporter.finish()
        for name, parameter in ({} if calibrated is None else calibrated.taken.others()).items():
            opened.model.get_parameter(name).data.copy_(parameter)
        for name in shapes:  # in the model's order, not the files'
            entry = made.get(name) or _kept(opened.model, name, shapes[name], scheme, misfits[name])
            receipt.tensors.append(replace(entry, requested=scheme.name) if repairs else entry)
        write_model(opened.model, opened.tokenizer, temporary)
        receipt.weights_bytes, receipt.source_weights_bytes = weight_bytes(temporary), weight_bytes(source)
        receipt.made_by = {**record(), "seed": seed}
        receipt.write(temporary)
        write_receipt_page(receipt.to_dict(), temporary / RECEIPT_PAGE)
        if allocation is not None:
            allocation.write(temporary)
    if calibrated is not None:
        calibrated.remove()
    return QuantizeResult(Path(output), receipt.to_dict(), [] if allocation is None else allocation.lines())


def needs_rows(method: str) -> bool:
    """Whether a method cannot work without calibration rows."""
    return method in BLOCK_METHODS or method in HESSIAN


def _block_work(method: str, observer: str, seed: int) -> BlockWork:
    if method in BLOCK_METHODS:
        chosen = BLOCK_METHODS[method]
        return lambda block, schemes, step: chosen(block, schemes, seed=seed, step=step)
    each = _layer_method(method, observer)
    drift = method in DRIFT
    return lambda block, schemes, step: layer_by_layer(block, schemes, each, hessian=method in HESSIAN, drift=drift)


def _layer_method(method: str, observer: str) -> Method:
    return partial(rtn, observer=observer) if method == "rtn" else METHODS[method]


def _end_method(method: str, observer: str) -> Method:
    """What rounds the head where a method of blocks rounds the blocks: what that method starts from."""
    if method in METHODS:
        return _layer_method(method, observer)
    return METHODS["gptq"] if method in HESSIAN else METHODS["search"]


def _round_on_reading(
    schemes: Mapping[str, Scheme], method: str, observer: str, made: dict[str, TensorReceipt], reporter: Reporter
) -> Callable[[str, Tensor], QuantizedTensor]:
    """A rounding for `load` that keeps receipts."""
    each = _layer_method(method, observer)

    def round_one(name: str, weight: Tensor) -> QuantizedTensor:
        quantized = each(weight, schemes[name], None, where=name)
        made[name] = TensorReceipt.of(name, weight, quantized, schemes[name].name)
        reporter.advance(len(made), layer=name)
        return quantized

    return round_one


def _record(calibrated: Calibrated, receipt: Receipt, reporter: Reporter) -> None:
    """Put what calibration saw into the receipt."""
    receipt.settings["calibration"] = calibrated.rows.to_dict()
    receipt.held_out = calibrated.held_out
    receipt.blocks = [
        {
            "name": report.name,
            "calibration_error": report.error.calibration,
            "held_out_error": report.error.held_out,
            "notes": list(report.notes),
        }
        for report in calibrated.reports
    ]
    for report in calibrated.reports:
        for note in report.notes:
            reporter.note(note)


def _skeleton(source: Path, scheme: Scheme) -> nn.Module:
    """The source's architecture without weights, if it is a model in full precision."""
    if is_adapter(source):
        raise UsageError(f"{source}: is an adapter; merge it first (strop merge), then quantize the merged model")
    config, quantization = read_config(source)
    if quantization is not None:
        raise FormatError(
            f"{source}: is quantized already ({quantization.get('quant_method')}), and rounding it again to {scheme} "
            "would "
            "lose more; quantize the model that it came from"
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _may_become(plain: nn.Module, names: Sequence[str], schemes: Sequence[Scheme]) -> dict[str, list[Scheme]]:
    """The formats that each layer can be given; where there is one, all of the layers fit it."""
    if len(set(schemes)) == 1:
        return {name: [schemes[0]] for name in names}
    return {name: [own for own in schemes if _misfit(plain, name, own) is None] for name in names}


def require_fit(source: Path, scheme: Scheme) -> nn.Module:
    """The architecture, without weights, of a model in full precision all of whose linear layers a format can hold.

    Raises:
        UsageError: It is an adapter.
        FormatError: It is quantized, or a layer does not fit; all of them are named.
    """
    plain = _skeleton(source, scheme)
    misfits = _misfits(plain, scheme)
    if misfits:
        raise FormatError(_refusal(source, scheme, misfits, expert_weights(plain)))
    return plain


def _misfits(plain: nn.Module, scheme: Scheme) -> dict[str, str]:
    """Layer name to why the format cannot hold it; decided by shapes and kinds of layers, before a weight is read."""
    found = {name: _misfit(plain, name, scheme) for name in linear_modules(plain)}
    for weights in expert_weights(plain).values():
        found.update(dict.fromkeys(weights.names, _misfit_of_experts(plain, weights, scheme)))
    return {name: reason for name, reason in found.items() if reason is not None}


def _misfit_of_experts(plain: nn.Module, weights: ExpertWeights, scheme: Scheme) -> str | None:
    try:
        plan_shape(weights.shape, scheme, where=weights.name)
    except FormatError as error:
        return str(error).removeprefix(f"{weights.name}: ")
    return inexpressible_experts(scheme, weights, plain)


def _misfit(plain: nn.Module, name: str, scheme: Scheme) -> str | None:
    """Why the format cannot hold a layer; None where it can."""
    shape = weight_shape(plain.get_submodule(name))
    try:
        plan_shape(shape, scheme, where=name)
    except FormatError as error:
        return str(error).removeprefix(f"{name}: ")
    return inexpressible(scheme, name, shape, plain)


def _refusal(source: Path, scheme: Scheme, misfits: Mapping[str, str], experts: Mapping[str, ExpertWeights]) -> str:
    together = {own: weights.name for weights in experts.values() for own in weights.names}
    lines = list(dict.fromkeys(f"{together.get(name, name)}: {reason}" for name, reason in misfits.items()))
    shown = lines[:20]
    if len(lines) > 20:
        shown.append(f"... and {len(lines) - 20} more")
    return (
        f"{source}: {len(misfits)} layer(s) do not fit {scheme}; choose a format that they fit, or leave them as they "
        "are "
        "(--keep-indivisible):\n  " + "\n  ".join(shown)
    )


def _first(misfits: Mapping[str, str]) -> str:
    return next((f"{name}: {reason}" for name, reason in misfits.items()), "It has none inside its blocks")


def _kept(model: nn.Module, name: str, shape: tuple[int, int], scheme: Scheme, reason: str) -> TensorReceipt:
    parent, _, number = name.rpartition(".")
    parameter = dict(model.get_submodule(parent.rpartition(".")[0]).named_parameters()).get(parent.rpartition(".")[2])
    if parameter is None:  # a layer, not an expert within a parameter
        return TensorReceipt.kept(name, dense_weight(model.get_submodule(name)), shape, scheme.name, reason)
    return TensorReceipt.kept(name, parameter[int(number)], shape, scheme.name, reason)


def _layers(plain: nn.Module, experts: Mapping[str, ExpertWeights]) -> dict[str, tuple[int, int]]:
    """Shape (out, in) of each linear layer and each of these experts by name, block by block."""
    linears = {name: linear_shape(module) for name, module in linear_modules(plain).items()}
    found: dict[str, tuple[int, int]] = {}
    for block in blocks(plain):
        found.update({layer: shape for layer, shape in linears.items() if layer.startswith(f"{block}.")})
        for weights in experts.values():
            if weights.name.startswith(f"{block}."):
                found.update(dict.fromkeys(weights.names, weights.shape))
    return found or linears


def _weights(plain: nn.Module) -> int:
    return sum(parameter.numel() for parameter in plain.parameters())


def _with_experts(receipt: Mapping[str, Any]) -> str:
    return f" ({receipt['experts']} of them experts)" if receipt["experts"] else ""


def _between(interval: list[float | None], *, percent: bool = False) -> str:
    low, high = interval
    if low is None or high is None:
        return ""
    return f" (95% {100 * low:.1f} to {100 * high:.1f}%)" if percent else f" (95% {low:.2e} to {high:.2e})"
