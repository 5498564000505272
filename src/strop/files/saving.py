"""Models saved so that others open them: transformers without strop, and strop again, bit for bit.

    config.json, generation_config.json     the architecture, with `quantization_config` where layers are quantized
    model.safetensors, or shards and index  dense tensors in their dtype; quantized layers as their format demands
                                            (experts under the names that their checkpoint numbers one by one)
    tokenizer files, chat_template.jinja    where there is a tokenizer
    receipt.json                            what was lost, where something was

The writer follows from the `QuantLinear` layers that the model holds: integers and fp8 go to compressed-tensors, NF4
and FP4 to bitsandbytes, none at all makes a dense model. A model is written layer by layer, with no copy of it in
memory. Names are those of the original checkpoint (transformers' own conversions are undone), and a head tied to the
embedding is written once.

Refused by name: formats that no file holds beside each other, adapters not merged, layers still trained through their
rounding, and what a format cannot hold: Conv1D (GPT-2) in compressed-tensors, rows that bitsandbytes misreads.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from strop.errors import FormatError, ModelError
from strop.files import bnb4, compressed_tensors, expert_tensors, mixed
from strop.files.folders import atomic_folder, read_json, write_json
from strop.files.receipts import Receipt
from strop.files.shards import MAX_SHARD_BYTES, Part, write_shards
from strop.layers.lora_linear import LoraLinear
from strop.layers.quant_experts import ExpertWeights, expert_weights, quant_experts
from strop.layers.quantized import QUANTIZED, THROUGH_ROUNDING, QuantizedLinear
from strop.numerics.formats import CodebookFormat
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Scheme

_BLOCK = re.compile(r"^(.*?\.\d+)\.")


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | os.PathLike[str],
    *,
    receipt: Receipt | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a model and its tokenizer to a folder that stands whole or not at all.

    Args:
        model: dense, or with `QuantLinear` layers of one scheme.
        tokenizer: saved beside it with its chat template; None where there is none.
        folder: where to.
        receipt: written as receipt.json.
        overwrite: replace what stands there.
        max_shard_bytes: where the weights are split into several files.

    Returns:
        The folder.

    Raises:
        UsageError: as `atomic_folder`.
        ModelError, FormatError: as `write_model`.
    """
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        write_model(model, tokenizer, temporary, max_shard_bytes=max_shard_bytes)
        if receipt is not None:
            receipt.write(temporary)
    return Path(folder)


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model and its tokenizer into an existing folder, such as a checkpoint that is being written.

    Raises:
        ModelError: adapters that are not merged, or layers that are still trained through their rounding.
        FormatError: formats that no file holds together, or layers that their format cannot hold; all are named.
    """
    schemes = check_savable(model)
    write_shards(folder, _parts(model, schemes), max_shard_bytes=max_shard_bytes)
    _write_configs(model, schemes, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def checkpoint_tensors(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, QuantizedTensor]]:
    """A model's weights under the names of its checkpoint: dense tensors, and codes by the weight they stand for.

    Raises:
        FormatError: experts are quantized, which stand in no such list.
    """
    if quant_experts(model):
        raise FormatError("the experts are quantized; they have no place among a model's plain weights")
    quantized = _quantized(model)
    dense = {
        name: tensor.detach()
        for part in _reverted(model, _dense_state(model, quantized), whole=False)
        for name, tensor in part.make().items()
    }
    codes = {f"{_checkpoint_name(model, name)}.weight": module.qtensor for name, module in quantized.items()}
    return dense, codes


def check_savable(model: PreTrainedModel) -> dict[str, Scheme]:
    """Refuse, before anything is written, a model that no format of ours can hold; return its layers' schemes.

    Raises:
        ModelError, FormatError: as `write_model`.
    """
    for kind, advice in (
        (THROUGH_ROUNDING, "convert the layers first"),
        ((LoraLinear,), "merge the adapter, or save it alone"),
    ):
        found = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, kind)}
        if found:
            name, what = next(iter(found.items()))
            raise ModelError(f"{name} and {len(found) - 1} more are {what}; {advice} (nothing was written)")
    quantized = _quantized(model)
    schemes = {name: module.scheme for name, module in quantized.items()}
    mixed.check_together(list(schemes.values()))
    plain = skeleton(model) if schemes or quant_experts(model) else model
    for scheme in dict.fromkeys(schemes.values()):
        shapes = {name: quantized[name].qtensor.shape for name, own in schemes.items() if own == scheme}
        check_expressible(scheme, shapes, plain)
    check_experts({name: module.scheme for name, module in quant_experts(model).items()}, schemes, plain)
    return schemes


def check_experts(experts: Mapping[str, Scheme], linears: Mapping[str, Scheme], plain: nn.Module) -> None:
    """Refuse experts that no file can hold as transformers opens them, beside the linear layers' schemes.

    Args:
        experts: parameter of experts to its scheme.
        linears: linear layer to its scheme.
        plain: as for `check_expressible`.

    Raises:
        FormatError: every such parameter, or several schemes in one model.
    """
    known = expert_weights(plain) if experts else {}
    problems = [
        f"{name}: {reason}"
        for name, own in experts.items()
        if (reason := inexpressible_experts(own, known[name], plain))
    ]
    if problems:
        raise FormatError(f"{len(problems)} tensor(s) of experts cannot be saved:\n  " + "\n  ".join(problems))
    different = list(dict.fromkeys([*experts.values(), *linears.values()])) if experts else []
    if len(different) > 1:
        names = ", ".join(scheme.name for scheme in different)
        raise FormatError(
            f"one model with quantized experts cannot mix {names}: transformers opens experts by one format"
        )


def inexpressible_experts(scheme: Scheme, weights: ExpertWeights, plain: nn.Module) -> str | None:
    """Why no file can hold a parameter of experts in this scheme; None where one can."""
    reason = expert_tensors.inexpressible(scheme, weights, plain)
    if reason is None:
        compressed_tensors.check_scheme(scheme)
    return reason


def check_expressible(scheme: Scheme, shapes: Mapping[str, tuple[int, int]], plain: nn.Module) -> None:
    """Refuse layers that the scheme's file format cannot hold, so that their readers would fail or read something else.

    Args:
        scheme: of the layers.
        shapes: (out, in) of each layer that is to be quantized, by name.
        plain: the same architecture with its own layers, on the meta device or with weights.

    Raises:
        FormatError: every such layer, with what would do.
    """
    problems = [
        f"{name}: {reason}" for name, shape in shapes.items() if (reason := inexpressible(scheme, name, shape, plain))
    ]
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise FormatError(f"{len(problems)} layer(s) cannot be saved as {scheme}:\n  " + "\n  ".join(shown))


def inexpressible(scheme: Scheme, name: str, shape: tuple[int, int], plain: nn.Module) -> str | None:
    """Why the scheme's file format cannot hold one layer; None where it can."""
    kind = type(plain.get_submodule(name))
    if isinstance(scheme.format, CodebookFormat):
        if kind not in (nn.Linear, Conv1D):
            return (
                f"a {kind.__name__}, which transformers does not open as bitsandbytes; the nearest format is int4-g32"
            )
        try:
            bnb4.check_shape(scheme, shape)
        except FormatError as error:
            return str(error).removeprefix("weight: ")
        return None
    compressed_tensors.check_scheme(scheme)
    if kind is Conv1D:
        return "a Conv1D (GPT-2), which compressed-tensors cannot hold; the nearest format that can is nf4"
    return None


def skeleton(model: PreTrainedModel) -> nn.Module:
    """Return the model's architecture with its own layers, without weights (on the meta device)."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def _quantized(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZED)}


def _parts(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> Iterator[Part]:
    """The model's tensors under the names of its checkpoint, one block's dense ones or one quantized layer at a
    time.
    """
    quantized, experts = _quantized(model), quant_experts(model)
    blocks: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _dense_state(model, [*quantized, *experts]).items():
        block = _BLOCK.match(name)
        blocks.setdefault(block[1] if block else name, {})[name] = tensor
    for tensors in blocks.values():
        yield from _reverted(model, tensors, whole=bool(experts) or _in_words(schemes))
    if experts:
        yield from _expert_parts(model)
    if not schemes:
        return
    encode = _encoder(model, schemes)
    for name, module in quantized.items():
        layer = _checkpoint_name(model, name)
        made = encode(module.qtensor, layer)
        specs = Part.of(made).specs
        del made
        yield Part(specs, lambda module=module, layer=layer: encode(module.qtensor, layer))


def _expert_parts(model: PreTrainedModel) -> Iterator[Part]:
    """The experts under the names of the checkpoint's layers, one layer at a time; scales in float32."""
    plain = skeleton(model)
    known = expert_weights(plain)

    def encode(parameter: str, layer: str, place: expert_tensors.Place) -> dict[str, Tensor]:
        piece = expert_tensors.cut(quant_experts(model)[parameter].qtensor(place.expert), place)
        return compressed_tensors.encode(piece, layer, packed=False)

    for name in quant_experts(model):
        for layer, place in expert_tensors.places(plain, known[name]).items():
            make = partial(encode, name, layer, place)
            yield Part(Part.of(make()).specs, make)


def _dense_state(model: PreTrainedModel, quantized: Iterable[str]) -> dict[str, Tensor]:
    """The state dict without the insides of quantized layers (their bias stays) and without tied copies."""
    inside = {
        f"{name}.{part}" for name in quantized for part in model.get_submodule(name).state_dict() if part != "bias"
    }
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in inside}
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    for copy_name, source in model.all_tied_weights_keys.items():
        if copy_name in state and source in state and _same_memory(state[copy_name], state[source]):
            del state[copy_name]
    return state


def _reverted(model: PreTrainedModel, tensors: dict[str, Tensor], *, whole: bool) -> Iterator[Part]:
    """Parts that undo transformers' conversions (renamed keys, fused experts) when they are written.

    Beside weights in compressed-tensors (`whole`), experts stay fused in one tensor: its loader would take them apart
    for packed ones, and lose those that are not.
    """
    together = dict(tensors)
    for name, tensor in tensors.items():
        if whole and len(revert_weight_conversion(model, {name: torch.empty_like(tensor, device="meta")})) > 1:
            yield Part.of({name: together.pop(name)})
    if not together:
        return
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in together.items()}
    yield Part(Part.of(revert_weight_conversion(model, empty)).specs, lambda: revert_weight_conversion(model, together))


def _checkpoint_name(model: PreTrainedModel, layer: str) -> str:
    """The name that the checkpoint gives a layer."""
    (name,) = revert_weight_conversion(model, {f"{layer}.weight": torch.empty(0, device="meta")})
    return name.removesuffix(".weight")


def _write_configs(model: PreTrainedModel, schemes: Mapping[str, Scheme], folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = _dtype(model)
    state = model.state_dict()
    for copy_name, source in model.all_tied_weights_keys.items():
        if copy_name in state and source in state and not _same_memory(state[copy_name], state[source]):
            config.tie_word_embeddings = False  # else they would be tied again on opening
    vars(config).pop("quantization_config", None)
    config.save_pretrained(folder)
    experts = {name: module.scheme for name, module in quant_experts(model).items()}
    if schemes or experts:
        kept = [
            name
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, QUANTIZED)
        ]
        fields = read_json(folder / "config.json")
        fields["quantization_config"] = _quantization_config(model, schemes or experts, kept)
        write_json(folder / "config.json", fields)
    if model.can_generate() and model.generation_config is not None:
        # not its save_pretrained, which refuses settings that many published models carry
        model.generation_config.to_json_file(
            str(folder / "generation_config.json"), use_diff=True, keys_to_pop=["compile_config"]
        )


def _encoder(
    model: PreTrainedModel, schemes: Mapping[str, Scheme]
) -> Callable[[QuantizedTensor, str], dict[str, Tensor]]:
    if not _in_words(schemes):
        return bnb4.encode
    packed = _stays_packed(model, schemes)
    return lambda qtensor, name: compressed_tensors.encode(qtensor, name, packed=packed)


def _quantization_config(model: PreTrainedModel, schemes: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, Any]:
    if not _in_words(schemes):
        return bnb4.config_for(next(iter(schemes.values())), kept)
    return mixed.config_for(schemes, kept, packed=_stays_packed(model, schemes))


def _in_words(schemes: Mapping[str, Scheme]) -> bool:
    """Whether the quantized layers go to compressed-tensors; codebooks go to bitsandbytes."""
    return any(not isinstance(scheme.format, CodebookFormat) for scheme in schemes.values())


def _stays_packed(model: PreTrainedModel, schemes: Mapping[str, Scheme]) -> bool:
    """Whether compressed-tensors can keep all layers packed when it opens them."""
    plain = skeleton(model)
    linears = [name for name in schemes if name not in quant_experts(model)]
    return all(compressed_tensors.opens_packed(scheme) for scheme in set(schemes.values())) and all(
        type(plain.get_submodule(name)) is nn.Linear for name in linears
    )


def _dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of the dense weights: that of the input embeddings."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return weight.dtype if isinstance(weight, Tensor) else model.dtype


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape
