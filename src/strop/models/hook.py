"""The hook in transformers' loader: one weight at a time is quantized while the model is being opened.

transformers gives every quantizer (`HfQuantizer`) three moments. Before any tensor is read, the model stands on the
meta device: the layers are chosen and every shape is checked against the scheme. Each tensor that arrives passes
through a conversion operation: ours makes a `QuantizedTensor` of it, puts a layer over it where the dense one stood,
and hands nothing on, so that no dense weight outlives its own conversion. Because this is transformers' own loader,
its renamings and splittings of checkpoint names apply before ours.

`RoundingPlan` rounds full-precision weights; `SkeletonPlan` leaves those of the blocks out; `ReadingPlan` takes the
codes of a folder that is quantized already, bit for bit: codes are repacked, never dequantized. A problem with one
tensor does not stop the others: all of them are collected in `plan.problems` and raised at the end by `opening.load`.

`quantizer` is transformers' side of a plan.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, apply_renamings
from transformers.pytorch_utils import Conv1D

from strop.errors import FileFormatError, FormatError, ModelError, StropError
from strop.files.shards import read_header
from strop.layers.base import is_linear, linear_bias, weight_shape
from strop.layers.quant_embedding import find_ends, install_embedding, is_table
from strop.layers.quant_experts import ExpertWeights, expert_weights, install_experts, plan_experts
from strop.layers.quantized import quantized_linear
from strop.layers.surgery import blocks, plan_linears, replace, select
from strop.models.containers import Container
from strop.models.expert_pieces import ExpertPiece, decode_experts, expert_pieces
from strop.models.gguf_base import GgufBase
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme

_AGAIN = "weight_scale of the tied head"

Rounding = Callable[[str, Tensor], QuantizedTensor]
"""(full name of a layer, its dense weight [out, in]) -> the quantized weight."""


class Plan:
    """What the hook does with a model: which weights it takes, and how each becomes a `QuantizedTensor`.

    Attributes:
        device: where the quantized weights are put.
        problems: what went wrong with single tensors, in the order of the file.
        weights: full names of the parameters that it takes.
        experts: those of them that hold all experts of a mixture.
        reads_codes: whether the folder's weights are quantized already.
    """

    reads_codes: bool

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.problems: list[StropError] = []
        self.weights: set[str] = set()
        self.experts: dict[str, ExpertWeights] = {}
        self._made: dict[str, QuantizedTensor] = {}
        self._made_experts: dict[str, list[QuantizedTensor]] = {}

    def prepare(self, model: PreTrainedModel, checkpoint_files: list[str]) -> None:
        """Choose the layers while the model stands on the meta device."""
        raise NotImplementedError

    def converters(self) -> list[WeightConverter]:
        """Converters of checkpoint tensors, asked before those of the model."""
        return []

    def keep(self, model: nn.Module, name: str, make: Callable[[nn.Module], QuantizedTensor]) -> None:
        """Make the quantized weight of the layer `name` and keep it for `install`, or note why that cannot be done."""
        module = model.get_submodule(name)
        try:
            qtensor = make(module)
            if tuple(qtensor.shape) != weight_shape(module):
                raise ModelError(
                    f"{name}: the file's weight is {qtensor.shape}, the model needs {weight_shape(module)}"
                )
        except StropError as error:
            self.problems.append(error)
        else:
            self._made[name] = qtensor
        # The dense weight stays on the meta device, where it costs nothing; transformers must not draw a random one.
        module.get_parameter("weight")._is_hf_initialized = True  # type: ignore[attr-defined]

    def keep_experts(self, model: nn.Module, name: str, make: Callable[[ExpertWeights], list[QuantizedTensor]]) -> None:
        """As `keep`, for the parameter `name` that holds all experts."""
        try:
            made = make(self.experts[name])
            needed = self.experts[name].shape
            wrong = [q.shape for q in made if q.shape != needed]
            if wrong:
                raise ModelError(f"{name}: the file's experts are {wrong[0]}, the model needs {needed}")
        except StropError as error:
            self.problems.append(error)
        else:
            self._made_experts[name] = made
        model.get_parameter(name)._is_hf_initialized = True  # type: ignore[attr-defined]

    def install(self, model: nn.Module) -> None:
        """Put a layer over its codes where each layer whose weight was kept stands, and `QuantExperts` for experts."""
        for name in list(self._made_experts):
            install_experts(model, name, self._made_experts.pop(name))
        for name in [name for name in self._made if isinstance(model.get_submodule(name), nn.Embedding)]:
            install_embedding(model, name, self._made.pop(name))
        for name in list(self._made):
            layer = quantized_linear(self._made.pop(name), linear_bias(model.get_submodule(name)))
            replace(model, name, layer)


class RoundingPlan(Plan):
    """Round the linear layers and experts of a full-precision checkpoint, each when its weight is read."""

    reads_codes = False

    def __init__(
        self,
        scheme: Scheme | Mapping[str, Scheme],
        rounding: Rounding,
        device: torch.device,
        *,
        keep: Collection[str] = (),
    ) -> None:
        super().__init__(device)
        self.scheme, self.rounding, self.kept = scheme, rounding, frozenset(keep)

    def prepare(self, model: PreTrainedModel, checkpoint_files: list[str]) -> None:
        """Choose the layers; FormatError if a shape does not fit, before anything is read.

        They are those that a mapping names (the embedding and the head may be among them), or every linear layer and
        every expert inside the blocks.
        """
        names = [name for name in select(model, "all-linear") if name not in self.kept]
        if not isinstance(self.scheme, Scheme):
            ends = find_ends(model)
            found = (*names, ends.embedding, ends.head)
            names = [name for name in found if name is not None and name in self.scheme]
        plan_linears(model, self.scheme, names)
        found = expert_weights(model)
        schemes = {name: own for name in found if (own := self._scheme_of_experts(found[name])) is not None}
        plan_experts(found, schemes)
        self.experts = {name: found[name] for name in schemes}
        self.weights = {*(f"{name}.weight" for name in names), *self.experts}

    def _scheme_of_experts(self, weights: ExpertWeights) -> Scheme | None:
        """The scheme of a parameter's experts; None where they stay as they are."""
        if isinstance(self.scheme, Scheme):
            return None if self.kept.intersection([weights.name, *weights.names]) else self.scheme
        own = {self.scheme.get(name) for name in weights.names}
        if len(own) > 1:
            shown = ", ".join(sorted("none" if scheme is None else scheme.name for scheme in own))
            raise FormatError(f"{weights.name}: all of its experts need one format, or none any; got {shown}")
        return own.pop()

    def operation(self) -> _Round:
        """The operation that transformers applies to each weight of `self.weights`."""
        return _Round(self)


class SkeletonPlan(Plan):
    """Leave the big weights of the blocks where they are, on the meta device; all else is loaded."""

    reads_codes = False

    def prepare(self, model: PreTrainedModel, checkpoint_files: list[str]) -> None:
        """Choose every parameter of a block that has two dimensions or more, those of experts too."""
        self.weights = {
            f"{name}.{part}"
            for name, block in blocks(model).items()
            for part, parameter in block.named_parameters()
            if parameter.dim() > 1
        }

    def operation(self) -> _Drop:
        """The operation that transformers applies to each weight of `self.weights`."""
        return _Drop(self)


class ReadingPlan(Plan):
    """Take over the codes of a folder or a GGUF file whose weights are quantized already."""

    reads_codes = True

    def __init__(self, container: Container | GgufBase, device: torch.device) -> None:
        super().__init__(device)
        self.container = container
        self._parts: dict[str, list[str]] = {}
        self._repeated: dict[str, list[str]] = {}
        self._pieces: dict[str, dict[str, ExpertPiece]] = {}
        self._prefix = ""

    def prepare(self, model: PreTrainedModel, checkpoint_files: list[str]) -> None:
        """Find the quantized layers by the tensors that the files hold, under the names that the model gives them.

        A tool may have skipped every layer (bitsandbytes does with Falcon's own linear class): then all stay dense.

        Raises:
            ModelError: the files hold a quantized weight for something that is no linear layer of this model.
        """
        renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
        pieces = expert_pieces(model, renamings)
        if isinstance(self.container, GgufBase):
            self.container = self.container.renamed(lambda name: apply_renamings(name, renamings))
            keys = list(self.container.places)
        else:
            keys = [apply_renamings(key, renamings) for file in checkpoint_files for key in read_header(file).entries]
        self._prefix = f"{model.base_model_prefix}."
        modules, ends = dict(model.named_modules()), find_ends(model)
        strangers = []
        for found, parts in self.container.group(keys).items():
            name = found if found in modules or found in pieces else f"{self._prefix}{found}"
            if name in modules and (is_linear(modules[name]) or (name == ends.embedding and is_table(modules[name]))):
                self._parts[name] = parts
            elif name in pieces:
                piece = pieces[name]
                self.experts[piece.weights.name] = piece.weights
                self._pieces.setdefault(piece.weights.name, {})[name] = dataclasses.replace(piece, parts=tuple(parts))
            else:
                strangers.append(found)
        if strangers:
            raise ModelError(
                f"quantized weights for {len(strangers)} name(s) that are no linear layer of {type(model).__name__}: "
                f"{', '.join(strangers[:5])}{', ...' if len(strangers) > 5 else ''}; "
                "of experts, those are opened that the model's own checkpoints number one by one"
            )
        self.weights = {*(f"{name}.weight" for name in self._parts), *self.experts}
        if ends.tied and ends.embedding in self._parts and isinstance(self.container, Container):
            self._repeated = {ends.embedding: self.container.repeated_scales(keys)}

    def converters(self) -> list[WeightConverter]:
        """One converter per layer: all its tensors arrive together, under the name of its dense weight."""
        result = []
        for name, parts in self._parts.items():
            short = name.removeprefix(self._prefix)  # a checkpoint of the bare decoder has no prefix
            patterns = {rf"(?<!\w){re.escape(f'{short}.{suffix}')}$": suffix for suffix in parts}
            if again := self._repeated.get(name):
                short, prefix = name, rf"(?:{re.escape(self._prefix)})?"
                patterns = {pattern.replace(r"(?<!\w)", rf"(?<!\w){prefix}"): own for pattern, own in patterns.items()}
                patterns |= {rf"(?<!\w){re.escape(key)}$": _AGAIN for key in again}
            result.append(WeightConverter(list(patterns), [f"{short}.weight"], [_Read(self, name, patterns)]))
        return [*result, *self._expert_converters()]

    def _expert_converters(self) -> list[WeightConverter]:
        """One converter for each kind of parameter: what all its experts are made of arrives together, in order."""
        kinds: dict[str, dict[str, None]] = {}
        for name, pieces in self._pieces.items():
            target = ".".join(name.split(".")[-2:])  # `experts.gate_up_proj`, the same in every block
            patterns = kinds.setdefault(target, {})
            for piece in pieces.values():
                patterns.update(dict.fromkeys(map(piece.pattern_of, piece.parts)))
        return [WeightConverter(list(patterns), [target], [_ReadExperts(self)]) for target, patterns in kinds.items()]

    def decode_experts(self, name: str, arrived: Mapping[str, list[Tensor]]) -> list[QuantizedTensor]:
        """The experts of the parameter `name` from all tensors that belong to it."""
        return decode_experts(self.experts[name], self._pieces[name], arrived, self.container, self.device)


class PlannedOperation(ConversionOps):
    """An operation of this module; transformers copies converters deeply, a plan must stay the same object."""

    def __deepcopy__(self, memo: dict[int, Any]) -> PlannedOperation:
        return self


class _Round(PlannedOperation):
    """{weight name: [tensor]} -> {}; the plan keeps the rounded weight."""

    def __init__(self, plan: RoundingPlan) -> None:
        self.plan = plan

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **_: object,
    ) -> dict[str, Any]:
        """Round the tensors that the plan chose, pass the others on."""
        passed = {}
        for key in list(input_dict):
            value = input_dict.pop(key)
            if key not in self.plan.weights:
                passed[key] = value
                continue
            name = key.removesuffix(".weight")
            tensor = value[0] if isinstance(value, list) else value
            del value
            if key in self.plan.experts:
                self.plan.keep_experts(model, key, lambda weights, tensor=tensor: self._round_experts(weights, tensor))
                if missing_keys is not None:
                    missing_keys.discard(key)
                continue
            self.plan.keep(model, name, lambda module, name=name, tensor=tensor: self._round(module, name, tensor))
            if missing_keys is not None:
                missing_keys.discard(key)
        return passed

    def _round(self, module: nn.Module, name: str, tensor: Tensor) -> QuantizedTensor:
        needed = tuple(module.get_parameter("weight").shape)
        if tuple(tensor.shape) != needed:
            raise ModelError(f"{name}.weight: the file holds {tuple(tensor.shape)}, the configuration needs {needed}")
        if isinstance(module, Conv1D):
            tensor = tensor.t()  # [in, out] -> [out, in]
        return self.plan.rounding(name, tensor.to(self.plan.device).contiguous())

    def _round_experts(self, weights: ExpertWeights, tensor: Tensor) -> list[QuantizedTensor]:
        rows, columns = reversed(weights.shape) if weights.transposed else weights.shape
        if tuple(tensor.shape) != (weights.count, rows, columns):
            needed = (weights.count, rows, columns)
            raise ModelError(f"{weights.name}: the file holds {tuple(tensor.shape)}, the configuration needs {needed}")
        return [
            self.plan.rounding(name, weights.dense(tensor, expert).to(self.plan.device).contiguous())
            for expert, name in enumerate(weights.names)
        ]


class _Drop(PlannedOperation):
    """{weight name: [tensor]} -> {}; the weight stays on the meta device."""

    def __init__(self, plan: SkeletonPlan) -> None:
        self.plan = plan

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **_: object,
    ) -> dict[str, Any]:
        """Drop the tensors that the plan chose, pass the others on."""
        passed = {}
        for key, value in input_dict.items():
            if key not in self.plan.weights:
                passed[key] = value
                continue
            model.get_parameter(key)._is_hf_initialized = True  # type: ignore[attr-defined]
            if missing_keys is not None:
                missing_keys.discard(key)
        input_dict.clear()
        return passed


class _Read(PlannedOperation):
    """{pattern: [tensor]} of one layer -> {}; the plan keeps the quantized weight."""

    def __init__(self, plan: ReadingPlan, name: str, patterns: Mapping[str, str]) -> None:
        self.plan, self.name, self.patterns = plan, name, patterns

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **_: object,
    ) -> dict[str, Any]:
        """Put the layer's tensors together as its container stores them."""
        tensors = {}
        for pattern in list(input_dict):
            value = input_dict.pop(pattern)
            tensor = value[0] if isinstance(value, list) else value
            tensors[self.patterns[pattern]] = tensor.to(self.plan.device)
        self.plan.keep(model, self.name, lambda _: self._decoded(tensors))
        if missing_keys is not None:
            missing_keys.discard(f"{self.name}.weight")
        return {}

    def _decoded(self, tensors: dict[str, Tensor]) -> QuantizedTensor:
        again = tensors.pop(_AGAIN, None)
        if again is not None and not again.equal(tensors["weight_scale"]):
            raise FileFormatError(
                f"{self.name}: the scales that its tied head has are others; both are one weight. The file is damaged, "
                "or config.json ties what is not tied (tie_word_embeddings)"
            )
        return self.plan.container.decode(self.name, tensors)


class _ReadExperts(PlannedOperation):
    """{pattern: [tensor of each expert]} of one parameter -> {}; the plan keeps the quantized experts."""

    def __init__(self, plan: ReadingPlan) -> None:
        self.plan = plan

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **_: object,
    ) -> dict[str, Any]:
        """Put every expert together from the layers that the files hold."""
        arrived = {pattern: list(input_dict.pop(pattern)) for pattern in list(input_dict)}
        self.plan.keep_experts(model, full_layer_name, lambda w: self.plan.decode_experts(w.name, arrived))
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}
