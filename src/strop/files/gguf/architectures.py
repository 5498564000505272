"""Models in GGUF: what llama.cpp calls their tensors and settings, and how it lays the tensors out; both ways.

    checkpoint of transformers                        GGUF
    model.layers.3.self_attn.q_proj.weight      <->   blk.3.attn_q.weight         rows of each head in another order
    model.layers.3.mlp.experts.{0..}.up_proj.weight   blk.3.ffn_up_exps.weight    [experts, out, in]
    model.layers.3.mlp.experts.gate_up_proj      ->   the same two tensors, as transformers 5 holds them
    h.3.attn.c_attn.weight                      <->   blk.3.attn_qkv.weight       transposed

The names are data (`architecture_table.py`). What llama.cpp would compute otherwise than transformers (an activation,
a scale of the attention, a window that does not slide where it should) is refused by name, or noted where it shows only
beyond some length. Layouts of matrices move whole rows alone, so that blocks of codes can be moved as they are.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from strop.errors import FormatError, ModelError, nearest
from strop.files.gguf.architecture_table import TABLES, Layout, Line, Table
from strop.files.gguf.rope import Value, rope_metadata, rope_tensors

_FLOATS: Final = ("epsilon", "softcapping")
_NOT_WEIGHTS: Final = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")
_LONG_GEMMA: Final = {"gemma2": 46, "gemma3": 62}
"""Blocks of the models (27B) whose attention llama.cpp scales by hidden size and heads, not by the head's size."""


@dataclass(frozen=True)
class Piece:
    """A matrix (or vector) of the checkpoint that a GGUF tensor takes rows of.

    Attributes:
        source: the tensor's name in the checkpoint.
        line: the name that the table has for these rows, for what belongs to a layer by name.
        expert: which of the experts stacked in it; None where it holds one matrix.
        part: which of `parts` equal parts of the rows.
        parts: how many the rows hold.
        layout: how the rows change.
    """

    source: str
    line: str
    expert: int | None = None
    part: int = 0
    parts: int = 1
    layout: Layout = Layout.SAME

    def of(self, tensor: Tensor) -> Tensor:
        """The rows themselves, of the source's tensor, in the checkpoint's layout."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        size = tensor.shape[0] // self.parts
        return tensor[self.part * size : (self.part + 1) * size] if self.parts > 1 else tensor


@dataclass(frozen=True)
class Planned:
    """A tensor of a GGUF file: its name, the pieces that it is made of, and whether they are stacked experts."""

    name: str
    pieces: tuple[Piece, ...]
    stacked: bool


@dataclass(frozen=True)
class Architecture:
    """One kind of model, with the numbers that its layouts depend on.

    Attributes:
        table: its names.
        blocks: how many.
        heads: query heads.
        key_heads: key and value heads.
        experts: of each block; 0 without.
    """

    table: Table
    blocks: int
    heads: int
    key_heads: int
    experts: int = 0

    @property
    def name(self) -> str:
        """What GGUF calls it."""
        return self.table.name

    # --- settings -----------------------------------------------------------------------------------------------------

    def metadata(self, config: Any) -> dict[str, Value]:
        """The settings of a model in GGUF's keys, without those of the tokenizer.

        Raises:
            FormatError: llama.cpp does not compute what the configuration asks for; everything of it is named.
        """
        if problems := list(self.problems(config)):
            raise FormatError(
                f"{config.model_type}: llama.cpp does not compute this model as transformers does:\n  "
                + "\n  ".join(problems)
            )
        found: dict[str, Value] = {}
        for key, field in self.table.settings:
            value = _setting(config, key, field)
            if value is not None:
                found[key] = value
        if self.name == "gemma3" and not found.get("attention.sliding_window"):
            found.pop("attention.sliding_window", None)
        if self.name != "gpt2":
            found |= rope_metadata(config, self.name)
        if self._pattern_differs(config):
            found["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
        return {"general.architecture": self.name} | {f"{self.name}.{key}": value for key, value in found.items()}

    def extra_tensors(self, config: Any) -> dict[str, Tensor]:
        """Tensors that no checkpoint holds, float32."""
        return {} if self.name == "gpt2" else rope_tensors(config)

    def problems(self, config: Any) -> Iterator[str]:
        """What llama.cpp would compute otherwise."""
        activation = next(
            (
                value
                for field in ("hidden_activation", "hidden_act", "activation_function")
                if (value := getattr(config, field, None)) is not None
            ),
            None,
        )
        if activation is not None and activation not in self.table.activation:
            yield f"activation {activation!r}; {self.name} has {self.table.activation[0]}"
        if self.table.tied_only and not config.tie_word_embeddings:
            yield f"a head of its own; {self.name} has none beside the embedding"
        if self.name in _LONG_GEMMA:
            long = self.blocks == _LONG_GEMMA[self.name]
            needed = config.hidden_size / self.heads if long else config.head_dim
            if config.query_pre_attn_scalar != needed:
                yield f"query_pre_attn_scalar {config.query_pre_attn_scalar}; {self.name} has {needed:g} at this size"
        caps = (config.attn_logit_softcapping, config.final_logit_softcapping) if self.name == "gemma2" else (1.0,)
        if not all(caps):
            yield "logits without softcaps; gemma2 has them"
        if self.name == "gemma3" and getattr(config, "attn_logit_softcapping", None):
            yield "softcaps in the attention; gemma3 has none"
        if getattr(config, "use_bidirectional_attention", None):
            yield "attention in both directions"
        if self.name == "gpt2":
            if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
                yield "attention scaled otherwise than by the head's size"
            if config.add_cross_attention:
                yield "cross attention"
        if self.experts:
            normalized = getattr(config, "norm_topk_prob", True)
            if normalized != (self.name != "qwen2moe"):
                yield f"norm_topk_prob {normalized}; {self.name} has {not normalized}"
            if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1:
                yield "blocks without experts among those that have them"

    def notes(self, config: Any) -> list[str]:
        """What differs in llama.cpp beyond some length only."""
        window = getattr(config, "sliding_window", None)
        used = getattr(config, "use_sliding_window", True)
        if self.table.sliding_pattern is None and window and used and window < config.max_position_embeddings:
            return [
                f"llama.cpp attends to everything where this model's window slides: past {window:,} tokens its answers "
                "differ from transformers'"
            ]
        return []

    def _pattern_differs(self, config: Any) -> bool:
        every, kinds = self.table.sliding_pattern, getattr(config, "layer_types", None)
        if every is None or not kinds:
            return False
        return any((kind == "sliding_attention") != (at % every < every - 1) for at, kind in enumerate(kinds))

    # --- tensors ------------------------------------------------------------------------------------------------------

    def tensor_name(self, name: str) -> str | None:
        """GGUF's name of a checkpoint's tensor; None where GGUF holds nothing of it (buffers).

        Raises:
            ModelError: a tensor that the architecture does not know.
        """
        pieces = self._pieces_of(name)
        return None if not pieces else pieces[0][0]

    def lines_of(self, layer: str) -> list[str]:
        """The checkpoint's layers that a layer of the model in memory is made of; several for stacked experts.

        Args:
            layer: its full name; an expert's is that of the parameter and its number.
        """
        parameter, _, expert = layer.rpartition(".")
        for fused, lines in self.table.fused:
            if (found := _number(fused, parameter)) is not None:
                return [line.replace("{n}", str(found["n"])).replace("{e}", expert) for line in lines]
        return [_split(self._full(f"{layer}.weight"))[0]]

    def checkpoint_names(self, name: str) -> list[str]:
        """The checkpoint's names of what a GGUF tensor holds, one for each expert where they are stacked.

        Raises:
            ModelError: a tensor that the architecture does not know.
        """
        stem, ending = _split(name)
        for theirs, ours, _ in self.table.lines:
            if (found := _number(ours, stem)) is not None:
                named = theirs.replace("{n}", str(found.get("n", "")))
                experts = range(self.experts) if "{e}" in theirs else [None]
                return [named.replace("{e}", str(expert)) + ending for expert in experts]
        raise ModelError(f"{name}: a tensor of GGUF's {self.name} that strop does not know")

    def to_gguf(self, name: str, tensor: Tensor) -> Tensor:
        """A checkpoint's tensor in GGUF's layout; of one expert where they are numbered one by one."""
        return self.laid_out(tensor, self.layout_of(name))

    def layout_of(self, name: str) -> Layout:
        """How GGUF lays out a checkpoint's tensor."""
        return self._line(_split(self._full(name))[0])[2]

    def from_gguf(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The checkpoint's tensors, in its own layout, that a GGUF tensor holds."""
        names = self.checkpoint_names(name)
        layout = self._line(_split(names[0])[0])[2]
        parts = list(tensor) if len(names) > 1 or tensor.ndim == 3 else [tensor]
        return {own: self.laid_back(part, layout) for own, part in zip(names, parts, strict=True)}

    def laid_out(self, tensor: Tensor, layout: Layout) -> Tensor:
        """A tensor in GGUF's layout."""
        if layout is Layout.PLUS_ONE:
            return tensor.float() + 1.0
        if layout is Layout.TRANSPOSED:
            return tensor.t().contiguous() if tensor.ndim == 2 else tensor
        order = self.row_order(layout, tensor.shape[0])
        return tensor if order is None else tensor[order]

    def laid_back(self, tensor: Tensor, layout: Layout) -> Tensor:
        """A tensor of a GGUF file in the checkpoint's layout; undoes `laid_out`."""
        if layout is Layout.PLUS_ONE:
            return tensor.float() - 1.0
        if layout is Layout.TRANSPOSED:
            return tensor.t().contiguous() if tensor.ndim == 2 else tensor
        order = self.row_order(layout, tensor.shape[0])
        return tensor if order is None else tensor[torch.argsort(order)]

    def row_order(self, layout: Layout, rows: int) -> Tensor | None:
        """Which of the checkpoint's rows stands at each row of the file; None where the order is the same.

        A head of d rows is rotated as pairs (i, i + d / 2) in transformers and as (2i, 2i + 1) in llama.cpp.
        """
        if layout not in (Layout.QUERY, Layout.KEY):
            return None
        heads = self.heads if layout is Layout.QUERY else self.key_heads
        return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)

    def plan(self, names: Iterable[str], *, tied: bool) -> list[Planned]:
        """The tensors of a file that holds a checkpoint's tensors, block by block.

        Args:
            names: the checkpoint's tensors.
            tied: whether the head is the embedding.

        Raises:
            ModelError: tensors that the architecture does not know, or that are missing; all are named.
        """
        found: dict[str, list[Piece]] = {}
        strangers = []
        for name in names:
            try:
                pieces = self._pieces_of(name)
            except ModelError:
                strangers.append(name)
                continue
            for gguf_name, piece in pieces:
                found.setdefault(gguf_name, []).append(piece)
        if tied:
            found.pop("output.weight", None)
            if self.table.untied_only and "token_embd.weight" in found:
                found["output.weight"] = found["token_embd.weight"]
        missing = [name for name in self._weights(tied=tied) if name not in found]
        short = [
            f"{name} ({len(pieces)} of {self.experts} experts)"
            for name, pieces in found.items()
            if self._is_stacked(name) and len(pieces) != self.experts
        ]
        if strangers or missing or short:
            raise ModelError(_disagreement(self.name, strangers, missing, short))
        return [
            Planned(name, tuple(sorted(pieces, key=_expert_of)), self._is_stacked(name))
            for name, pieces in sorted(found.items(), key=lambda item: _place(item[0]))
        ]

    def embedding_name(self, names: Iterable[str]) -> str:
        """Which of a checkpoint's tensors is the embedding.

        Raises:
            ModelError: none is.
        """
        own = f"{self.table.lines[0][0]}.weight"
        found = next((name for name in names if not _NOT_WEIGHTS.fullmatch(name) and self._full(name) == own), None)
        if found is None:
            raise ModelError(f"the weights hold no {own}")
        return found

    def _weights(self, *, tied: bool) -> Iterator[str]:
        """The weights that every such file holds."""
        for theirs, ours, _ in self.table.lines:
            if theirs == "lm_head" and tied and not self.table.untied_only:
                continue
            for block in range(self.blocks if "{n}" in ours else 1):
                yield f"{ours.replace('{n}', str(block))}.weight"

    def _pieces_of(self, name: str) -> list[tuple[str, Piece]]:
        """GGUF's names of what a checkpoint's tensor holds; empty for buffers."""
        if _NOT_WEIGHTS.fullmatch(name):
            return []
        full = self._full(name)
        for fused, lines in self.table.fused:
            if (found := _number(fused, full)) is not None:
                return [
                    piece
                    for part, line in enumerate(lines)
                    for piece in self._of_fused(name, line, found, part, len(lines))
                ]
        stem, ending = _split(full)
        theirs, ours, layout = self._line(stem)
        number = _number(theirs, stem) or {}
        gguf_name = ours.replace("{n}", str(number.get("n", ""))) + ending
        return [(gguf_name, Piece(name, stem, layout=layout))]

    def _of_fused(
        self, name: str, line: str, found: Mapping[str, int], part: int, parts: int
    ) -> Iterator[tuple[str, Piece]]:
        _, ours, layout = next(entry for entry in self.table.lines if entry[0] == line)
        for expert in range(self.experts):
            own = line.replace("{n}", str(found["n"])).replace("{e}", str(expert))
            yield f"{ours.replace('{n}', str(found['n']))}.weight", Piece(name, own, expert, part, parts, layout)

    def _line(self, stem: str) -> Line:
        for line in self.table.lines:
            if _number(line[0], stem) is not None:
                return line
        raise ModelError(f"{stem}: a tensor that {self.name} does not have in GGUF")

    def _full(self, name: str) -> str:
        """The name as the table has it: with the prefix that a checkpoint of the bare decoder leaves out."""
        if not name.startswith((self.table.prefix, "lm_head.")):
            name = self.table.prefix + name
        for other, own in self.table.aliases:
            stem, ending = _split(name)
            if (found := _number(other, stem)) is not None:
                return own.replace("{n}", str(found["n"])) + ending
        return name

    def _is_stacked(self, name: str) -> bool:
        return _split(name)[0].endswith("_exps")


def architecture_of(config: Any) -> Architecture:
    """The architecture of a transformers configuration.

    Raises:
        FormatError: none that is written as GGUF; the message names it, and those that are.
    """
    kinds = [kind for table in TABLES for kind in table.model_types]
    table = next((table for table in TABLES if config.model_type in table.model_types), None)
    if table is None:
        raise FormatError(
            f"{config.model_type}: no GGUF file is written of this architecture"
            f"{nearest(config.model_type, kinds)}; those that are: {', '.join(kinds)}"
        )
    heads = config.num_attention_heads
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    return Architecture(
        table, config.num_hidden_layers, heads, getattr(config, "num_key_value_heads", None) or heads, experts
    )


def architecture_in(metadata: Mapping[str, Any]) -> Architecture:
    """The architecture that a GGUF file's keys name.

    Raises:
        FormatError: none that strop knows; the message names it, and those that it knows.
        ModelError: the keys that say how many blocks and heads there are are missing or no numbers.
    """
    name = metadata.get("general.architecture")
    experts = metadata.get(f"{name}.expert_count") or 0
    tables = [table for table in TABLES if table.name == name]
    if not tables:
        known = dict.fromkeys(table.name for table in TABLES)
        raise FormatError(
            f"general.architecture is {name!r}{nearest(str(name), known)}; those that strop knows: {', '.join(known)}"
        )
    mixtures = [table for table in tables if any("{e}" in theirs for theirs, _, _ in table.lines)]
    table = next((one for one in tables if (one in mixtures) == bool(experts)), tables[0])
    numbers = []
    for key in ("block_count", "attention.head_count"):
        number = metadata.get(f"{name}.{key}")
        if type(number) is not int or number < 1:
            raise ModelError(f"{name}.{key} is {number!r}; a number of 1 or more is needed")
        numbers.append(number)
    key_heads = metadata.get(f"{name}.attention.head_count_kv") or numbers[1]
    if type(key_heads) is not int or type(experts) is not int:
        raise ModelError(f"{name}: head or expert counts that differ from block to block are not known")
    return Architecture(table, numbers[0], numbers[1], key_heads, experts)


def _setting(config: Any, key: str, field: str) -> Value | None:
    value = getattr(config, field, None)
    if field == "n_inner" and value is None:
        value = 4 * config.n_embd
    if field == "num_key_value_heads" and value is None:
        value = config.num_attention_heads
    if field == "sliding_window" and value is None and config.model_type == "phi3":
        value = 0  # llama.cpp tells Phi-4 by it
    if value is None:
        return None
    return float(value) if key.endswith(_FLOATS) else int(value)


def _split(name: str) -> tuple[str, str]:
    """A name without its ending, and the ending (`.weight`, `.bias`, or none)."""
    for ending in (".weight", ".bias"):
        if name.endswith(ending):
            return name.removesuffix(ending), ending
    return name, ""


def _number(pattern: str, name: str) -> dict[str, int] | None:
    """The numbers that stand for {n} and {e} in a name; None where it does not fit."""
    match = _expression(pattern).fullmatch(name)
    return None if match is None else {key: int(value) for key, value in match.groupdict().items()}


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{e\}", r"(?P<e>\d+)"))


def _expert_of(piece: Piece) -> int:
    if piece.expert is not None:
        return piece.expert
    match = re.search(r"\.experts\.(\d+)\.", piece.line)
    return int(match[1]) if match else 0


def _place(name: str) -> tuple[int, int, str]:
    """Where a tensor stands: the embedding, then block by block, then norm and head."""
    block = re.match(r"blk\.(\d+)\.", name)
    if block:
        return 1, int(block[1]), ""
    return (2, 0, name) if name.startswith("output") else (0, 0, name)


def _disagreement(name: str, strangers: list[str], missing: list[str], short: list[str]) -> str:
    lines = [
        f"  {len(names)} {what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for what, names in (
            ("that GGUF has no place for", strangers),
            ("missing", missing),
            ("incomplete", short),
        )
        if names
    ]
    return "\n".join([f"the tensors are not those of {name}; there are", *lines])
