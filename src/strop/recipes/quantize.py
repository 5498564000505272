"""`quantize`: post-training quantization of a model's linear layers, saved with a receipt of what each one lost.

Each weight is rounded when transformers' loader reads it, so that memory holds the result and one weight. With `data`,
the model in full precision runs first over part of the rows (the mean squares of the layers' inputs, for the searched
scales) and is then compared with the result on the rest, which calibrated nothing: KL divergence and top-1 agreement
stand in the receipt. That pass alone needs the source in memory. The head and the embeddings keep their dtype.

What a format cannot hold (a group size that does not divide, a kind of layer that its files have no place for) is
refused before any work, all of it at once, or kept in its own dtype and listed where that is asked for.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from strop.calibrate import gather_activation_scales, gather_statistics
from strop.data.batches import eval_batches
from strop.data.records import Record, read_data
from strop.data.samples import prepare
from strop.data.templates import Sample
from strop.errors import FormatError, UsageError, nearest
from strop.evaluation.divergence import Divergence, ReferenceLogits
from strop.evaluation.scoring import score
from strop.evaluation.scratch import Scratch
from strop.files.folders import atomic_folder, check_target
from strop.files.receipts import Receipt, TensorReceipt
from strop.files.saving import inexpressible, write_model
from strop.layers.base import dense_weight, linear_shape
from strop.layers.surgery import coverage, experts, linear_modules
from strop.methods import METHODS, Statistics, rtn
from strop.models import OpenedModel, load
from strop.models.sources import find_folder, is_adapter, read_config
from strop.numerics import OBSERVERS
from strop.numerics.activation_observers import ActivationObserver
from strop.numerics.activation_observers import activation_observer as activation_observer_of
from strop.numerics.groups import plan_shape
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme, parse_format
from strop.progress import SILENT, Reporter
from strop.recipes.rows import Rows, rows_name

MAX_LENGTH: Final = 2048
"""Most tokens of a row that calibrates or is compared."""

HELD_OUT: Final = 0.25
"""Share of the rows that calibrate nothing and are compared."""

BATCH_SIZE: Final = 8


@dataclass(frozen=True)
class QuantizeResult:
    """A quantized model and its receipt.

    Attributes:
        path: The folder that was written.
        receipt: What receipt.json holds.
    """

    path: Path
    receipt: dict[str, Any]

    def lines(self) -> list[str]:
        """The result in sentences."""
        receipt = self.receipt
        worst = max(receipt["tensors"], key=lambda tensor: tensor["relative_error"])
        lines = [
            f"{receipt['layers'] - len(receipt['fallbacks'])} of {receipt['layers']} linear layers as "
            f"{receipt['requested']}: {receipt['bits_per_weight']:.3f} bits per weight over all of them",
            f"largest relative squared error {worst['relative_error']:.2e}, in {worst['name']}",
        ]
        if receipt["fallbacks"]:
            names = ", ".join(receipt["fallbacks"][:5]) + (", ..." if len(receipt["fallbacks"]) > 5 else "")
            lines.append(f"{len(receipt['fallbacks'])} of these layers kept in their own dtype: {names}")
        if receipt["left_alone"]:
            lines.append(f"{len(receipt['left_alone'])} tensors of experts are not quantized")
        held_out = receipt["held_out"]
        if held_out:
            lines.append(
                f"on {held_out['rows']} held-out rows: KL {held_out['kl']:.2e} nats per token from the source, top-1 "
                f"agreement {100 * held_out['top1_agreement']:.1f}%"
            )
        return [*lines, f"the model: {self.path}"]


def quantize(
    model: str | os.PathLike[str],
    format: str,
    *,
    output: str | os.PathLike[str],
    method: str = "rtn",
    observer: str = "minmax",
    activation_observer: str = "minmax",
    data: Rows | None = None,
    max_rows: int = 128,
    chat_template: str | os.PathLike[str] | None = None,
    keep_indivisible: bool = False,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> QuantizeResult:
    """Round a model's linear layers to a format and save the result.

    Args:
        model: A folder in full precision, a run of full fine-tuning, a hub id, or "demo".
        format: The scheme, as `--format` writes it.
        output: The folder to write.
        method: "rtn" rounds to nearest; "search" searches each scale for the least squared error, weighted by what
            `data` says of the inputs.
        observer: How rtn finds the range: minmax, percentile or mse.
        activation_observer: How the range of the activations is found for a format with a static one
            (`int8-a8-static`, which needs data): minmax, average, percentile or entropy.
        data: Rows to calibrate with, of the kind that the model will see.
        max_rows: Rows of `data` that are used; a quarter of them is held out for the receipt.
        chat_template: For models that have none, as `tune` takes it.
        keep_indivisible: Leave a layer that the format cannot hold in its own dtype and say so in the receipt; without
            it such layers are refused, all at once, before any work.
        overwrite: Replace what stands at `output`.
        reporter: Told what happens.

    Raises:
        UsageError: A method or observer that is unknown, or an observer with a method that uses none.
        FormatError: A format that is unknown, needs a container that is not written, or does not fit the layers.
        UsageError: Something stands at `output`, or `model` is an adapter.
        MissingInputError, ModelError, FileFormatError, DataError: As the steps raise them.
    """
    scheme = _scheme(format)
    _check_method(method, observer)
    observing = _activation_observer(scheme, activation_observer, data)
    check_target(output, overwrite=overwrite)
    source = find_folder(model)
    plain = _skeleton(source, scheme)
    misfits = _misfits(plain, scheme)
    if misfits and not keep_indivisible:
        raise FormatError(_refusal(source, scheme, misfits))
    names = [name for name in linear_modules(plain) if name not in misfits]
    if not names:
        raise FormatError(f"{source}: no linear layer fits {scheme}; nothing would be quantized. {_first(misfits)}")
    receipt = Receipt(str(model), scheme.name, {"method": method, "observer": observer if method == "rtn" else None})
    receipt.left_alone = experts(plain)
    if receipt.left_alone:
        reporter.note(
            f"{len(receipt.left_alone)} tensors of experts stay in their dtype; the layers that are rounded hold "
            f"{coverage(plain, names):.0%} of the weights"
        )
    if observing is not None:
        receipt.settings["activation_observer"] = activation_observer
    statistics, scales, reference = _run_source(source, data, max_rows, chat_template, observing, receipt, reporter)
    made: dict[str, TensorReceipt] = {}

    def round_one(name: str, weight: Tensor) -> QuantizedTensor:
        if method == "rtn":
            quantized = rtn(weight, scheme, observer=observer, where=name)
        else:
            quantized = METHODS[method](weight, scheme, statistics.get(name), where=name)
        try:
            quantized = quantized.with_activation_scale(scales.get(name))
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from None
        made[name] = TensorReceipt.of(name, weight, quantized, scheme.name)
        reporter.advance(len(made), layer=name)
        return quantized

    try:
        with atomic_folder(output, overwrite=overwrite) as temporary:
            reporter.start(f"quantize to {scheme.name}", len(names), "layers")
            try:
                opened = load(source, scheme, rounding=round_one, keep=misfits)
            finally:
                reporter.finish()
            for name, module in linear_modules(opened.model).items():  # in the model's order, not the files'
                receipt.tensors.append(made.get(name) or _kept(name, module, scheme, misfits[name]))
            write_model(opened.model, opened.tokenizer, temporary)
            if reference is not None:
                receipt.held_out = reference.figures(opened)
            receipt.write(temporary)
    finally:
        if reference is not None:
            reference.close()
    return QuantizeResult(Path(output), receipt.to_dict())


def _scheme(format: str) -> Scheme:
    spec = parse_format(format)
    if spec.container is not None:
        raise FormatError(
            f"{format!r}: files of the kind {spec.container} are not written yet; the same grid without the container "
            f"is {spec.scheme}, which the file can be made from later without loss"
        )
    return spec.scheme


def _check_method(method: str, observer: str) -> None:
    if method not in METHODS:
        raise UsageError(f"method {method!r} is unknown{nearest(method, METHODS)}; there are {', '.join(METHODS)}")
    if observer not in OBSERVERS:
        raise UsageError(
            f"observer {observer!r} is unknown{nearest(observer, OBSERVERS)}; there are {', '.join(OBSERVERS)}"
        )
    if observer != "minmax" and method != "rtn":
        raise UsageError(f"observer {observer}: method {method} finds its scales itself; leave the observer out")


def _activation_observer(scheme: Scheme, name: str, data: Rows | None) -> Callable[[], ActivationObserver] | None:
    """What observes the activations of each layer; None where the format fixes no scale for them."""
    make = activation_observer_of(name)
    if scheme.activations is None or not scheme.activations.is_static:
        if name != "minmax":
            raise UsageError(
                f"activation observer {name}: {scheme} fixes no scale for activations; leave it out, or use "
                "int8-a8-static"
            )
        return None
    if data is None:
        raise UsageError(
            f"{scheme}: the scale of the activations is fixed from data; give rows of the kind that the model will see "
            "(--data FILE), or use int8-a8, which needs none"
        )
    return make


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


def _misfits(plain: nn.Module, scheme: Scheme) -> dict[str, str]:
    """Layer name to why the format cannot hold it; decided by shapes and kinds of layers, before a weight is read."""
    reasons: dict[str, str] = {}
    for name, module in linear_modules(plain).items():
        shape = linear_shape(module)
        try:
            plan_shape(shape, scheme, where=name)
        except FormatError as error:
            reasons[name] = str(error).removeprefix(f"{name}: ")
        else:
            reason = inexpressible(scheme, name, shape, plain)
            if reason is not None:
                reasons[name] = reason
    return reasons


def _refusal(source: Path, scheme: Scheme, misfits: Mapping[str, str]) -> str:
    shown = [f"{name}: {reason}" for name, reason in list(misfits.items())[:20]]
    if len(misfits) > 20:
        shown.append(f"... and {len(misfits) - 20} more")
    return (
        f"{source}: {len(misfits)} layer(s) do not fit {scheme}; choose a format that they fit, or leave them as they "
        "are "
        "(--keep-indivisible):\n  " + "\n  ".join(shown)
    )


def _first(misfits: Mapping[str, str]) -> str:
    return next((f"{name}: {reason}" for name, reason in misfits.items()), "It has none inside its blocks")


def _kept(name: str, module: nn.Module, scheme: Scheme, reason: str) -> TensorReceipt:
    return TensorReceipt.kept(name, dense_weight(module), linear_shape(module), scheme.name, reason)


class _Reference:
    """The source's logits on held-out rows, kept on disk until the result is there to be compared."""

    def __init__(self, model: OpenedModel, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self._scratch = Scratch()
        self._logits = ReferenceLogits(len(samples), self._scratch)
        try:
            score(model.model, samples, [self._logits], batch_size=BATCH_SIZE)
        except BaseException:
            self.close()
            raise

    def figures(self, model: OpenedModel) -> dict[str, Any]:
        """How far `model` is from the source."""
        divergence = Divergence(self._logits)
        score(model.model, self._samples, [divergence], batch_size=BATCH_SIZE)
        return {
            "rows": len(self._samples),
            "tokens": int(divergence.tokens.sum()),
            "kl": divergence.mean_kl,
            "kl_99th": divergence.kl_99th,
            "top1_agreement": divergence.top1_agreement,
        }

    def close(self) -> None:
        """Give the disk back."""
        self._scratch.close()


def _run_source(
    source: Path,
    data: Rows | None,
    max_rows: int,
    chat_template: str | os.PathLike[str] | None,
    observing: Callable[[], ActivationObserver] | None,
    receipt: Receipt,
    reporter: Reporter,
) -> tuple[Mapping[str, Statistics], Mapping[str, float], _Reference | None]:
    """Run the source over the rows: statistics and scales of activations from some, logits on others; the source is
    closed again.
    """
    if data is None:
        return {}, {}, None
    calibrating_rows, held_out_rows = _rows(data, max_rows)
    opened = load(source)
    context = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None) or MAX_LENGTH

    def samples_of(records: Sequence[Record]) -> list[Sample]:
        template = None if chat_template is None else str(chat_template)
        limit = min(MAX_LENGTH, context)
        return list(prepare(records, opened.require_tokenizer(), max_length=limit, chat_template=template))

    calibrating = samples_of(calibrating_rows)
    held_out = samples_of(held_out_rows) if held_out_rows else []
    if not held_out and len(calibrating) > 1:  # one long text: its last windows are held out
        count = max(1, round(len(calibrating) * HELD_OUT))
        calibrating, held_out = calibrating[:-count], calibrating[-count:]
    calibrating = calibrating[:max_rows]
    held_out = held_out[: max(1, round(max_rows * HELD_OUT))]
    tokens = sum(len(sample) for sample in calibrating)
    receipt.settings["calibration"] = {"data": rows_name(data), "rows": len(calibrating), "tokens": tokens}
    reporter.start("calibrate", len(calibrating), "rows")
    try:
        statistics = gather_statistics(opened.model, eval_batches(calibrating, BATCH_SIZE), reporter=reporter)
        scales = {}
        if observing is not None:
            scales = gather_activation_scales(opened.model, eval_batches(calibrating, BATCH_SIZE), observing)
    finally:
        reporter.finish()
    if not held_out:
        reporter.note(f"{rows_name(data)}: a single row; it calibrates, and nothing is left to compare on")
        return statistics, scales, None
    return statistics, scales, _Reference(opened, held_out)


def _rows(data: Rows, max_rows: int) -> tuple[list[Record], list[Record]]:
    """Rows that calibrate and rows that are held out, drawn evenly and always the same.

    Of a folder with splits, training rows calibrate and those of the validation (or test) split are held out.
    """
    splits = read_data(data if not isinstance(data, os.PathLike) else Path(data), seed=0, valid_fraction=HELD_OUT)
    held_out = splits.valid or splits.test
    count = max(1, round(max_rows * HELD_OUT)) if held_out and max_rows > 1 else 0
    return _drawn(splits.train, max(1, max_rows - count)), _drawn(held_out, count)


def _drawn(records: list[Record], count: int) -> list[Record]:
    if len(records) <= count:
        return records
    return [records[index] for index in sorted(random.Random(0).sample(range(len(records)), count))]
