"""`BlockwiseModel`: a full-precision model of which only what stands outside its blocks, and one block, is in memory.

    outside     embeddings, final norm, head, rotary tables: float32, from the start
    a block     brought from the files when its turn comes, and sent away again: its big weights go to the meta device

Everything passes through transformers' own loader, so that its renamings and splittings of checkpoint names apply. How
a block is called (masks, positions, which of several rotary tables) is the model's own business: its forward pass runs
with every block replaced by one that passes its hidden states on, and what the block in question was given is taken
down. A model whose blocks are no chain, hidden states in and hidden states out, is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from strop.errors import ModelError
from strop.files.shards import tensor_files
from strop.layers.surgery import blocks
from strop.models.opening import open_skeleton, quiet
from strop.models.sources import read_config


class _Stop(Exception):
    """The block in question was reached: no error, its call was taken down."""


class _Passing(nn.Module):
    """Stands where a block stood: takes down how it is called and passes the hidden states on."""

    def __init__(self, block: nn.Module, owner: BlockwiseModel, index: int) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not a submodule: its weights may be on the meta device
        object.__setattr__(self, "owner", owner)
        self.index = index

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)  # models ask blocks what kind they are

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner.passed(self.index, args, kwargs)


class BlockwiseModel:
    """A model opened for work block by block.

    Args:
        folder: Config and safetensors of a model in full precision.

    Attributes:
        model: transformers' model in evaluation mode and float32; the big weights of its blocks on the meta device.
        blocks: The blocks by full name, in the model's order.
        dtype: Of the dense weights in the files.

    Raises:
        ModelError: it has no repeated blocks, or cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model: PreTrainedModel = open_skeleton(folder)
        kind = read_config(folder)[0].dtype
        self.dtype = kind if isinstance(kind, torch.dtype) else torch.float32
        self.blocks = blocks(self.model)
        if not self.blocks:
            raise ModelError(f"{folder}: {type(self.model).__name__} has no repeated blocks to bring one at a time")
        self._files = self._files_of_blocks(tensor_files(folder))
        self._tuples: dict[int, int] = {}
        self._wanted: int | None = None
        self._given: dict[int, Tensor] = {}
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @property
    def outside_bytes(self) -> int:
        """Bytes of what is always in memory."""
        held = {id(p): p for p in [*self.model.parameters(), *self.model.buffers()] if not p.is_meta}
        return sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    def block_bytes(self, name: str) -> int:
        """Bytes of a block's big weights in float32."""
        return 4 * sum(parameter.numel() for _, _, parameter in _heavy(self.blocks[name]))

    @contextmanager
    def brought(self, name: str) -> Iterator[nn.Module]:
        """The block with its weights in memory, for as long as the context lasts."""
        block = self.blocks[name]
        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            slices: dict[str, Any] = {}
            for key, file in self._files[name].items():
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                slices[key] = opened[file].get_slice(key)
            config = LoadStateDictConfig(
                dtype=torch.float32,
                dtype_plan={},
                weight_mapping=list[Any](get_model_conversion_mapping(self.model)),
                sharded_metadata=None,
            )
            with quiet():
                convert_and_load_state_dict_in_model(self.model, slices, config)
        lost = [part for _, part, parameter in _heavy(block) if parameter.is_meta]
        if lost:
            raise ModelError(f"{self.folder}: {name}: the files hold no {', '.join(lost[:5])}")
        for parameter in block.parameters():
            parameter.requires_grad = False
        try:
            yield block
        finally:
            for owner, part, parameter in list(_heavy(block)):
                empty = torch.empty_like(parameter, device="meta")
                setattr(owner, part, nn.Parameter(empty, requires_grad=False))

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with other weights in modules outside its blocks, by full name, while the context lasts."""
        modules = {name: self.model.get_submodule(name) for name in weights}
        before = {name: module.get_parameter("weight") for name, module in modules.items()}
        try:
            for name, module in modules.items():
                module.register_parameter("weight", nn.Parameter(weights[name], requires_grad=False))
            yield
        finally:
            for name, module in modules.items():
                module.register_parameter("weight", before[name])

    def embedded(self, inputs: dict[str, Any]) -> Tensor:
        """The hidden states that the first block is given."""
        first = next(iter(self.blocks))
        args, kwargs = self._call_of(first, inputs)
        return _hidden_of(args, kwargs, first)

    def call_of(self, name: str, inputs: dict[str, Any], hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """How the model calls a block for these inputs, with `hidden` in place of the hidden states.

        Raises:
            ModelError: the model is no chain of blocks.
        """
        args, kwargs = self._call_of(name, inputs)
        given = _hidden_of(args, kwargs, name)
        if given.shape != hidden.shape:
            raise ModelError(f"{name}: is given {list(given.shape)}, the block before it made {list(hidden.shape)}")
        return (hidden, *args[1:]), {key: value for key, value in kwargs.items() if key != "hidden_states"}

    def after_blocks(self, inputs: dict[str, Any], hidden: Tensor) -> Any:
        """The model's output where `hidden` is what the last block gave."""
        return self._forward(inputs, None, {len(self.blocks) - 1: hidden})

    def states_after_blocks(self, inputs: dict[str, Any], hidden: Tensor) -> Tensor:
        """The last hidden states, which the head is given, where `hidden` is what the last block gave."""
        return self._forward(inputs, None, {len(self.blocks) - 1: hidden}, self.model.base_model).last_hidden_state

    @torch.no_grad()
    def learn_returns(self, inputs: dict[str, Any]) -> None:
        """Run the first block on these inputs, to pass hidden states on as the blocks return them."""
        name = next(iter(self.blocks))
        with self.brought(name) as block:
            args, kwargs = self._call_of(name, inputs)
            self.returns_tuple(name, block(*args, **kwargs))

    def returns_tuple(self, name: str, output: Any) -> None:
        """Remember how a block returns its hidden states, so that passing them on looks the same."""
        self._tuples[list(self.blocks).index(name)] = len(output) if isinstance(output, tuple) else 0

    def passed(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What stands for block `index` in a forward pass."""
        if index == self._wanted:
            self._call = (args, kwargs)
            raise _Stop
        hidden = self._given.get(index)
        if hidden is None:
            hidden = _hidden_of(args, kwargs, list(self.blocks)[index])
        length = self._tuples.get(index, self._tuples.get(0, 0))  # until it has run, as the first
        return (hidden, *[None] * (length - 1)) if length else hidden

    def _call_of(self, name: str, inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._forward(inputs, list(self.blocks).index(name), {})
        assert self._call is not None
        return self._call

    @torch.no_grad()
    def _forward(
        self, inputs: dict[str, Any], wanted: int | None, given: dict[int, Tensor], part: nn.Module | None = None
    ) -> Any:
        with self.passing():
            self._wanted, self._given = wanted, given
            try:
                output = (part or self.model)(**inputs)
            except _Stop:
                return None
        if wanted is not None:
            name = list(self.blocks)[wanted]
            raise ModelError(f"{self.folder}: {name} is never reached; the model is no chain of blocks")
        return output

    @contextmanager
    def passing(self) -> Iterator[None]:
        """The model with every block replaced by one that passes its hidden states on."""
        places = [(self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in self.blocks]
        self._wanted, self._given, self._call = None, {}, None
        for index, ((parent, place), block) in enumerate(zip(places, self.blocks.values(), strict=True)):
            parent._modules[place] = _Passing(block, self, index)
        try:
            yield
        finally:
            for (parent, place), block in zip(places, self.blocks.values(), strict=True):
                parent._modules[place] = block

    def _files_of_blocks(self, files: dict[str, Path]) -> dict[str, dict[str, Path]]:
        """Block to the checkpoint's tensors that belong to it, and the file of each."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state = self.model.state_dict()
        found: dict[str, dict[str, Path]] = {name: {} for name in self.blocks}
        for key, file in files.items():
            renamed, _ = rename_source_key(key, renamings, converters, self.model.base_model_prefix, state)
            owner = next((name for name in self.blocks if renamed.startswith(f"{name}.")), None)
            if owner is not None:
                found[owner][key] = file
        return found


def _heavy(block: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in block.modules():
        for part, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() > 1:  # gains and biases stay in memory
                yield module, part, parameter


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Tensor:
    first = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise ModelError(f"{name}: is not called with hidden states first; the model is no chain of blocks")
    return first
