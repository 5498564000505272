"""`quantize`: post-training quantization of a model's linear layers, saved with a receipt of what each one lost.

Each weight is rounded when transformers' loader reads it, so that memory holds the result and one weight. With `data`,
the model in full precision runs first over part of the rows (the mean squares of the layers' inputs, for the searched
scales) and is then compared with the result on the rest, which calibrated nothing: KL divergence and top-1 agreement
stand in the receipt. The head and the embeddings keep their dtype.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from strop.calibrate import gather_statistics
from strop.data.samples import prepare
from strop.data.templates import Sample
from strop.errors import FormatError, UsageError, nearest
from strop.evaluation.divergence import Divergence, ReferenceLogits
from strop.evaluation.scoring import score
from strop.evaluation.scratch import Scratch
from strop.files.folders import atomic_folder
from strop.files.receipts import Receipt, TensorReceipt
from strop.files.saving import inexpressible, write_model
from strop.layers.base import dense_weight, linear_bias, linear_shape
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import experts, linear_modules, replace
from strop.methods import METHODS, Statistics, rtn
from strop.models import OpenedModel, load
from strop.models.sources import find_folder, is_adapter, read_config
from strop.numerics import OBSERVERS
from strop.numerics.groups import plan_shape
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme, parse_format
from strop.progress import SILENT, Reporter
from strop.recipes.rows import Rows, held_out_records

CALIBRATION_LENGTH: Final = 2048
"""Most tokens of a row that calibrate."""

Rounding = Callable[[str, Tensor], QuantizedTensor]


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
            f"{receipt['layers']} layers as {receipt['requested']}: {receipt['bits_per_weight']:.3f} bits per weight",
            f"largest relative squared error {worst['relative_error']:.2e}, in {worst['name']}",
        ]
        if receipt["fallbacks"]:
            lines.append(f"{len(receipt['fallbacks'])} layers kept as they were: {', '.join(receipt['fallbacks'][:5])}")
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
        MissingInputError, ModelError, FileFormatError, DataError: As the steps raise them.
    """
    scheme = _scheme(format)
    if method not in METHODS:
        raise UsageError(f"method {method!r} is unknown{nearest(method, METHODS)}; there are {', '.join(METHODS)}")
    if observer not in OBSERVERS:
        raise UsageError(
            f"observer {observer!r} is unknown{nearest(observer, OBSERVERS)}; there are {', '.join(OBSERVERS)}"
        )
    if observer != "minmax" and method != "rtn":
        raise UsageError(f"observer {observer}: method {method} finds its scales itself; leave the observer out")
    source = find_folder(model)
    if is_adapter(source):
        raise UsageError(
            f"{model}: is an adapter; merge it first (strop merge {model} -o MERGED), then quantize the result"
        )
    receipt = Receipt(str(model), scheme.name, {"method": method, "observer": observer if method == "rtn" else None})
    calibration, reference = _calibrate(source, data, max_rows, chat_template, receipt, reporter)

    def round_one(name: str, weight: Tensor) -> QuantizedTensor:
        try:
            if method == "rtn":
                quantized = rtn(weight, scheme, observer=observer)
            else:
                quantized = METHODS[method](weight, scheme, calibration.get(name))
        except FormatError as error:
            raise FormatError(f"{name}: {str(error).removeprefix('weight: ')}") from error
        receipt.tensors.append(TensorReceipt.of(name, weight, quantized, scheme.name))
        reporter.advance(len(receipt.tensors))
        return quantized

    with atomic_folder(output, overwrite=overwrite) as temporary:
        reporter.start(f"quantize to {scheme.name}", None, "layers")
        try:
            opened = _rounded(source, scheme, round_one, receipt, keep_indivisible=keep_indivisible)
        finally:
            reporter.finish()
        receipt.left_alone = experts(opened.model)
        write_model(opened.model, opened.tokenizer, temporary)
        if reference is not None:
            with reference.scratch:
                receipt.held_out = reference.figures(opened)
        receipt.write(temporary)
    return QuantizeResult(Path(output), receipt.to_dict())


def _scheme(format: str) -> Scheme:
    spec = parse_format(format)
    if spec.container is not None:
        raise FormatError(
            f"{format!r}: {spec.container} files are not written yet; the same grid without it is {spec.scheme}"
        )
    return spec.scheme


class _Reference:
    """The source's logits on held-out rows, kept on disk until the result is there to be compared."""

    def __init__(self, model: OpenedModel, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.scratch = Scratch()
        self.logits = ReferenceLogits(len(samples), self.scratch)
        score(model.model, samples, [self.logits])

    def figures(self, model: OpenedModel) -> dict[str, Any]:
        """How far `model` is from the source."""
        divergence = Divergence(self.logits)
        score(model.model, self.samples, [divergence])
        return {
            "rows": len(self.samples),
            "kl": divergence.mean_kl,
            "kl_99th": divergence.kl_99th,
            "top1_agreement": divergence.top1_agreement,
        }


def _calibrate(
    source: Path,
    data: Rows | None,
    max_rows: int,
    chat_template: str | os.PathLike[str] | None,
    receipt: Receipt,
    reporter: Reporter,
) -> tuple[Mapping[str, Statistics], _Reference | None]:
    """Run the source over the rows: statistics from three quarters of them, logits on the others."""
    if data is None:
        return {}, None
    records = held_out_records(data)[:max_rows]
    full = load(source)
    limit = getattr(full.model.config.get_text_config(), "max_position_embeddings", None) or CALIBRATION_LENGTH
    samples = prepare(
        records,
        full.require_tokenizer(),
        max_length=min(CALIBRATION_LENGTH, limit),
        chat_template=None if chat_template is None else str(chat_template),
    ).samples
    held_out = samples[3::4]
    calibrating = [sample for index, sample in enumerate(samples) if index % 4 != 3]
    receipt.settings["calibration"] = {"rows": len(calibrating), "tokens": sum(len(sample) for sample in calibrating)}
    reporter.start("calibrate", len(calibrating), "rows")
    try:
        statistics = gather_statistics(full.model, calibrating, reporter=reporter)
    finally:
        reporter.finish()
    return statistics, _Reference(full, held_out) if held_out else None


def _misfits(source: Path, scheme: Scheme) -> dict[str, str]:
    """Layer name to why the format cannot hold it; decided by shapes and kinds of layers, before a weight is read."""
    config, _ = read_config(source)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    reasons: dict[str, str] = {}
    for name, module in linear_modules(plain).items():
        shape = linear_shape(module)
        try:
            plan_shape(shape, scheme, where=name)
        except FormatError as error:
            reasons[name] = str(error).removeprefix(f"{name}: ")
            continue
        reason = inexpressible(scheme, name, shape, plain)
        if reason is not None:
            reasons[name] = reason
    return reasons


def _rounded(
    source: Path, scheme: Scheme, round_one: Rounding, receipt: Receipt, *, keep_indivisible: bool
) -> OpenedModel:
    """The model with rounded layers: streamed, unless some layers are to be kept as they are."""
    misfits = _misfits(source, scheme)
    if not misfits:
        return load(source, scheme, rounding=round_one)
    if not keep_indivisible:
        shown = [f"{name}: {reason}" for name, reason in list(misfits.items())[:20]]
        more = [f"... and {len(misfits) - 20} more"] if len(misfits) > 20 else []
        raise FormatError(
            f"{source}: {len(misfits)} layers do not fit {scheme} (--keep-indivisible leaves them as they are):\n  "
            + "\n  ".join(shown + more)
        )
    opened = load(source)
    for name, module in linear_modules(opened.model).items():
        weight = dense_weight(module)
        if name in misfits:
            receipt.tensors.append(TensorReceipt.kept(name, weight, linear_shape(module), scheme.name, misfits[name]))
        else:
            replace(opened.model, name, QuantLinear(round_one(name, weight), linear_bias(module)))
    if len(receipt.fallbacks) == len(receipt.tensors):
        raise FormatError(f"{source}: no layer fits {scheme}; nothing was written")
    return opened
