"""What a format does to one real weight: figures, and a picture of the histogram with the grid, the error and where it
is.

A weight is read alone from a model folder's safetensors files, as [out, in] float32; nothing else of the model is
loaded. The picture holds four panels: the weights on their own scale as they are; the same in units of their scale,
with the grid's values; the error in units of the distance between neighbours; the relative error of every group.
"""

from __future__ import annotations

import difflib
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from strop.errors import MissingInputError, ModelError, UsageError
from strop.files.shards import read_tensor, tensor_files
from strop.numerics.formats import IntFormat
from strop.numerics.groups import plan_shape, split, spread
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scheme import Granularity, Mode, Scheme, parse_format

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
_INK, _GRID, _BAR, _ERROR = "#1f2933", "#d9480f", "#4c78a8", "#7a8794"


@dataclass(frozen=True)
class TensorExplanation:
    """A weight in a format: its shape and distribution, and what rounding cost.

    `relative_squared_error` is sum((restored - w)^2) / sum(w^2) and `snr_db` the same as -10 log10, None where nothing
    was lost. `largest_error_steps` is the largest error in steps of its own group's grid (integer formats; None
    otherwise). `worst_group` is the group with the largest relative squared error, in words.
    """

    model: str
    name: str
    format: str
    picture: Path
    shape: tuple[int, int]
    mean: float
    standard_deviation: float
    smallest: float
    largest: float
    bits_per_weight: float
    relative_squared_error: float
    snr_db: float | None
    largest_error_steps: float | None
    worst_group: str
    worst_group_error: float

    def lines(self) -> list[str]:
        """Return the explanation as text."""
        snr = "nothing was lost" if self.snr_db is None else f"SNR {self.snr_db:.2f} dB"
        lines = [
            f"{self.name} [{self.shape[0]}, {self.shape[1]}] of {self.model} in {self.format}",
            f"  weights      {self.smallest:.4g} to {self.largest:.4g}, mean {self.mean:.2g}, "
            f"standard deviation {self.standard_deviation:.4g}",
            f"  size         {self.bits_per_weight:.3f} bits a weight, scales included",
            f"  error        {self.relative_squared_error:.3e} of the weight's squares, {snr}",
        ]
        if self.largest_error_steps is not None:
            lines.append(f"  largest      {self.largest_error_steps:.3f} of a step")
        lines.append(f"  worst group  {self.worst_group}: {self.worst_group_error:.3e}")
        lines.append(f"  picture      {self.picture}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return every figure by name."""
        return {
            "model": self.model,
            "name": self.name,
            "format": self.format,
            "picture": str(self.picture),
            "shape": list(self.shape),
            "mean": self.mean,
            "standard_deviation": self.standard_deviation,
            "smallest": self.smallest,
            "largest": self.largest,
            "bits_per_weight": self.bits_per_weight,
            "relative_squared_error": self.relative_squared_error,
            "snr_db": self.snr_db,
            "largest_error_steps": self.largest_error_steps,
            "worst_group": self.worst_group,
            "worst_group_error": self.worst_group_error,
        }


def explain_tensor(model: str | Path, name: str, format: str, output: str | Path) -> TensorExplanation:
    """Round one weight of a model to a format, say what it cost, and draw it.

    Args:
        model: a folder in full precision, or a hub id.
        name: the tensor's name in the weights file; `.weight` may be left out.
        format: `[container:]scheme`, as everywhere.
        output: the picture, .png or .svg.

    Raises:
        FormatError: the format is unknown or does not fit the weight's shape.
        MissingInputError: there is no such model or no such tensor (the nearest names are listed), or no folder for
        the picture. ModelError: the model is quantized already, or the tensor is no weight matrix.
        UsageError: the picture is neither .png nor .svg.
    """
    scheme = parse_format(format).scheme
    picture = Path(output)
    if picture.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{picture}: pictures are written as {' or '.join(SUFFIXES)}, got {picture.suffix or 'no suffix'!r}."
        )
    if not picture.parent.is_dir():
        raise MissingInputError(f"{picture}: there is no folder {picture.parent} to write the picture to.")
    key, weight = read_weight(model, name)
    plan_shape(tuple(weight.shape), scheme, where=key)
    quantized = quantize_tensor(weight, scheme, where=key)
    restored = quantized.dequantize()
    errors = group_errors(weight, restored, scheme)
    power = weight.double().square().sum().item()
    lost = (restored.double() - weight.double()).square().sum().item()
    relative = lost / power if power else 0.0
    row, column = divmod(int(errors.argmax()), errors.shape[1])
    steps = _error_steps(weight, restored, quantized)
    explanation = TensorExplanation(
        model=str(model),
        name=key,
        format=parse_format(format).name,
        picture=picture,
        shape=(weight.shape[0], weight.shape[1]),
        mean=weight.mean().item(),
        standard_deviation=weight.std(correction=0).item(),
        smallest=weight.min().item(),
        largest=weight.max().item(),
        bits_per_weight=quantized.bits_per_weight,
        relative_squared_error=relative,
        snr_db=-10 * math.log10(relative) if relative else None,
        largest_error_steps=None if steps is None else steps.abs().max().item(),
        worst_group=_place(scheme, row, column, (weight.shape[0], weight.shape[1])),
        worst_group_error=errors[row, column].item(),
    )
    _draw(explanation, weight, restored, quantized, errors)
    return explanation


def read_weight(model: str | Path, name: str) -> tuple[str, Tensor]:
    """Read one weight matrix of a model folder or hub id.

    Returns:
        Its name in the file, and the weight as float32 [out, in].

    Raises:
        MissingInputError: no such model, or no such tensor; the nearest names are listed.
        ModelError: the folder's weights are quantized, or the tensor is no matrix of floating-point numbers.
    """
    from strop.models.sources import find_folder, is_adapter, read_config

    folder = find_folder(model)
    if is_adapter(folder):
        raise ModelError(f"{folder}: holds an adapter; merge it first (strop merge), or name its base model.")
    files = tensor_files(folder)
    key = name if name in files else f"{name}.weight"
    if key not in files:
        raise MissingInputError(
            f"{folder}: no tensor is called {name!r}; the nearest are: {', '.join(_near(name, list(files)))}."
        )
    weight = read_tensor(files[key], key)
    if weight.ndim != 2 or not weight.is_floating_point():
        _, quantization = read_config(folder)
        reason = (
            "the model is quantized already; name one in full precision" if quantization else "name a weight matrix"
        )
        raise ModelError(
            f"{key} of {folder}: {list(weight.shape)} {weight.dtype} is not a matrix of numbers; {reason}."
        )
    if _stands_transposed(folder, key):
        weight = weight.t()
    return key, weight.float().contiguous()


def _near(name: str, names: list[str]) -> list[str]:
    """Return the names closest to what was asked for: those that hold it first."""
    holding = [known for known in names if name and name in known][:5]
    return holding or difflib.get_close_matches(name, names, n=5, cutoff=0.0)


def _stands_transposed(folder: Path, key: str) -> bool:
    """Say whether the file holds the weight as [in, out], as GPT-2's Conv1D does."""
    from transformers.pytorch_utils import Conv1D

    from strop.models.sources import read_config
    from strop.planner.parameters import meta_model

    config, _ = read_config(folder)
    module = key.removesuffix(".weight")
    return any(
        isinstance(found, Conv1D) and (path == module or path.endswith(f".{module}"))
        for path, found in meta_model(config, where=str(folder)).named_modules()
    )


# --- errors -----------------------------------------------------------------------------------------------------------


def group_errors(weight: Tensor, restored: Tensor, scheme: Scheme) -> Tensor:
    """Return the relative squared error of every group, [rows, groups] (blocks of a codebook: [1, blocks]).

    A group of zeros lost nothing: 0.
    """
    groups = split(weight, scheme).double()  # [out, in] -> [rows, groups, size]
    lost = (split(restored, scheme).double() - groups).square().sum(-1)
    power = groups.square().sum(-1)
    errors = torch.where(power > 0, lost / power, torch.zeros_like(lost))
    return errors.reshape(1, -1) if scheme.granularity is Granularity.BLOCK else errors


def _error_steps(weight: Tensor, restored: Tensor, quantized: QuantizedTensor) -> Tensor | None:
    """Return the errors in steps of each group's own grid, flat; None where the steps are not even."""
    if not isinstance(quantized.scheme.format, IntFormat):
        return None
    step = spread(quantized.scales()).abs()
    step = torch.where(step > 0, step, torch.inf)  # a group of one value has no steps
    return (split(restored - weight, quantized.scheme) / step).flatten()


def _place(scheme: Scheme, row: int, column: int, shape: tuple[int, int]) -> str:
    if scheme.granularity is Granularity.TENSOR:
        return f"row {row} (one scale for all)"
    if scheme.granularity is Granularity.CHANNEL or scheme.group_size is None:
        return f"output channel {row}"
    if scheme.granularity is Granularity.BLOCK:
        start = column * scheme.group_size
        return f"block {column}, from row {start // shape[1]}, input {start % shape[1]}"
    start = column * scheme.group_size
    return f"output channel {row}, inputs {start} to {start + scheme.group_size - 1}"


# --- the picture ------------------------------------------------------------------------------------------------------


def _draw(
    explanation: TensorExplanation, weight: Tensor, restored: Tensor, quantized: QuantizedTensor, errors: Tensor
) -> None:
    """Draw the four panels and put the file in place once it is whole."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "svg.hashsalt": "strop",  # names inside the file would be random otherwise
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 7.2), layout="constrained")
        FigureCanvasAgg(figure)
        (values, units), (error, where) = figure.subplots(2, 2)
        snr = "no loss" if explanation.snr_db is None else f"SNR {explanation.snr_db:.1f} dB"
        figure.suptitle(
            f"{explanation.name}  [{explanation.shape[0]}, {explanation.shape[1]}]  as {explanation.format}: "
            f"{explanation.bits_per_weight:.2f} bits a weight, {snr}",
            color=_INK,
            fontsize=11,
        )
        _draw_values(values, weight, restored)
        _draw_units(units, weight, quantized)
        _draw_error(error, weight, restored, quantized)
        _draw_groups(where, errors, quantized.scheme, worst=explanation.worst_group)
        _save(figure, explanation.picture)


def _draw_values(axes: Axes, weight: Tensor, restored: Tensor) -> None:
    edges = torch.linspace(weight.min(), weight.max() + 1e-12, 161).numpy()
    axes.hist(
        weight.flatten().numpy(), bins=edges.tolist(), histtype="stepfilled", color=_BAR, alpha=0.85, label="weights"
    )
    axes.hist(
        restored.flatten().numpy(),
        bins=edges.tolist(),
        histtype="step",
        color=_GRID,
        linewidth=0.9,
        label="after rounding",
    )
    axes.set(title="Weights, before and after", xlabel="value", ylabel="count", yscale="log")
    axes.axvline(0, color=_INK, linewidth=0.6)
    axes.legend(frameon=False)


def _draw_units(axes: Axes, weight: Tensor, quantized: QuantizedTensor) -> None:
    """Weights divided by their own group's scale: one picture for all groups, with one grid."""
    scheme = quantized.scheme
    groups = split(weight, scheme)
    scale = spread(quantized.scales())
    in_units = groups / torch.where(scale == 0, torch.ones_like(scale), scale)
    form = scheme.format
    if isinstance(form, IntFormat):
        levels = [float(code) for code in form.values()]
        if scheme.mode is Mode.ASYMMETRIC and quantized.zero_point is not None:
            in_units = in_units + spread(quantized.zero_point).float() + form.qmin
        unit = "weight / its group's scale" + (" + zero point" if scheme.mode is Mode.ASYMMETRIC else "")
        minimum = quantized.minimums()
        if minimum is not None:
            in_units = in_units + spread(minimum) / torch.where(scale > 0, scale, torch.inf)
            unit = "(weight + its group's minimum) / its group's scale"
        margin = max(0.75, 0.02 * len(levels))
    else:
        levels = [float(level) for level in form.values()]
        unit = "weight / its group's scale"
        margin = 0.04 * (max(levels) - min(levels))
    low, high = min(levels), max(levels)
    axes.hist(
        in_units.flatten().clamp(low - margin, high + margin).numpy(),
        bins=200,
        histtype="stepfilled",
        color=_BAR,
        alpha=0.85,
    )
    if len(levels) <= 64:
        for level in levels:
            axes.axvline(level, color=_GRID, linewidth=0.8, alpha=0.8)
        title = f"The same on their grid: {len(set(levels))} values"
    else:
        axes.axvspan(low, high, color=_GRID, alpha=0.08)
        title = f"The same on their grid: {len(set(levels))} values, {low:g} to {high:g}"
    if scheme.mode is not Mode.ASYMMETRIC:
        unit += "   (peaks at the ends: the largest of each group)"
    axes.set(title=title, xlabel=unit, ylabel="count", xlim=(low - margin, high + margin))


def _draw_error(axes: Axes, weight: Tensor, restored: Tensor, quantized: QuantizedTensor) -> None:
    steps = _error_steps(weight, restored, quantized)
    if steps is None:
        axes.hist((restored - weight).flatten().numpy(), bins=160, histtype="stepfilled", color=_ERROR)
        axes.set(title="Error", xlabel="value after rounding - weight", ylabel="count")
        return
    axes.hist(steps.numpy(), bins=160, histtype="stepfilled", color=_ERROR)
    for bound in (-0.5, 0.5):
        axes.axvline(bound, color=_GRID, linewidth=0.8, linestyle="--")
    axes.set(title="Error, in steps of each group's grid (dashed: half a step)", xlabel="steps", ylabel="count")


def _draw_groups(axes: Axes, errors: Tensor, scheme: Scheme, *, worst: str) -> None:
    """Draw a map of all groups where there are several a row, and sorted errors where there is one."""
    from matplotlib.ticker import MaxNLocator

    percent = 100 * errors
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=scheme.granularity is Granularity.GROUP))
    if scheme.granularity is Granularity.GROUP and errors.shape[1] > 1:
        image = axes.imshow(percent.numpy(), aspect="auto", cmap="magma", interpolation="nearest")
        axes.figure.colorbar(image, ax=axes, label="% of the group's squares")
        axes.set(
            title=f"Error of each group, worst: {worst}",
            xlabel=f"group of {scheme.group_size} inputs",
            ylabel="output channel",
        )
        axes.spines[:].set_visible(False)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return
    ordered = percent.flatten().sort(descending=True).values
    axes.fill_between(range(len(ordered)), ordered.numpy(), step="mid", color=_ERROR)
    kind = "blocks" if scheme.granularity is Granularity.BLOCK else "output channels"
    axes.set(title=f"Error of the {len(ordered)} {kind}, worst: {worst}", xlabel=kind, ylabel="% of its squares")
    axes.set_ylim(bottom=0)


def _save(figure: Any, path: Path) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        # No date inside: the same weight gives the same file.
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(temporary, dpi=130, metadata=metadata)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
