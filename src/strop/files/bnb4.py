"""NF4 and FP4 weights as bitsandbytes holds them: what transformers, PEFT and vLLM open without strop.

Of a layer NAME with weight [out, in], n = out * in values in blocks of g (64):

    NAME.weight                     uint8 [ceil(n / 2), 1]; two 4-bit codes each, the first in the HIGH nibble
    NAME.weight.absmax              float32 [ceil(n / g)], the largest magnitude of each block;
                                    under double quantization uint8, codes of the dynamic map
    NAME.weight.quant_map           float32 [16], the table
    NAME.weight.nested_absmax       double quantization only: float32 [ceil(blocks / 256)]
    NAME.weight.nested_quant_map    double quantization only: float32 [256], the dynamic map
    NAME.weight.quant_state.bitsandbytes__nf4   uint8, JSON: quant_type, blocksize, dtype, shape, and under double
                                    quantization nested_blocksize, nested_dtype, nested_offset

W = table[code] * absmax(block). The weight is always [out, in]; GPT-2's Conv1D is held transposed, as transformers
holds it.

What transformers 5.23 with bitsandbytes 0.50.2 does with such a folder on a CPU (found by experiment, tests/files):
- it opens, and with dtype=torch.float32 gives the same logits as ours in fp32;
- where `in` is even and no multiple of the block, its CPU kernel restarts the blocks at every row and returns other
  weights, in silence. `check_shape` refuses to write such a layer; reading one, and training over one, is right here;
- on a CPU with AVX512-BF16, evaluation mode alone rounds the blocks' scales to bf16 (differences of 1e-2 in logits),
  and fails where `out` is no multiple of 32; `support_avx512bf16_for_cpu = False` on its `Linear4bit` layers avoids
both. `dtype` in the state is float32, so that nothing is rounded between the table and the matmul.

Not here: 8-bit weights (LLM.int8, `bnb8`) and storage in other dtypes than uint8, which is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from strop.errors import FileFormatError, FormatError
from strop.numerics.codebook import dynamic_map, level_table
from strop.numerics.formats import FORMATS, CodebookFormat
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import NESTED_BLOCK, Scheme, parse_scheme

METHOD = "bitsandbytes"
"""The value of `quant_method` in a model's configuration."""

SUFFIXES = (
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
)
"""What the tensors of a layer end in, besides `weight` itself."""

_MAX_STATE_BYTES = 10_000


def check_scheme(scheme: Scheme) -> None:
    """Refuse a scheme that bitsandbytes' 4-bit layout cannot express.

    Raises:
        FormatError: anything but nf4 and fp4; the message names the nearest.
    """
    if not isinstance(scheme.format, CodebookFormat):
        raise FormatError(
            f"{scheme}: bitsandbytes' 4-bit layout holds nf4 and fp4 alone; integers are saved as compressed-tensors"
        )


def check_shape(scheme: Scheme, shape: tuple[int, int], *, where: str = "weight") -> None:
    """Refuse to write a weight that bitsandbytes would read wrongly on a CPU.

    Raises:
        FormatError: a row of the weight is no multiple of the block.
    """
    assert scheme.group_size is not None
    if shape[1] % scheme.group_size:
        raise FormatError(
            f"{where}: in_features {shape[1]} is no multiple of the block {scheme.group_size} of {scheme}; "
            "bitsandbytes "
            "would read other weights from it on a CPU. Keep this layer in 16 bits, or use an integer format"
        )


def config_for(scheme: Scheme, skip: Sequence[str], *, compute_dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return the `quantization_config` of a model whose linear layers, but for `skip`, are quantized by `scheme`.

    Args:
        scheme: nf4 or fp4.
        skip: full names of the layers that stay as they are.
        compute_dtype: what bitsandbytes multiplies in; float32 is exact, 16 bits are quicker on a GPU.

    Raises:
        FormatError: as `check_scheme`.
    """
    check_scheme(scheme)
    return {
        "quant_method": METHOD,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": scheme.format.name,
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "bnb_4bit_compute_dtype": _dtype_name(compute_dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip),
        "llm_int8_threshold": 6.0,
    }


def scheme_from_config(config: Mapping[str, Any]) -> Scheme:
    """Return the scheme that a `quantization_config` describes, with blocks of 64; each layer's own state may say
    another size.

    Raises:
        FormatError: 8-bit weights, another storage dtype, or an unknown table.
    """
    if config.get("load_in_8bit") or not config.get("load_in_4bit"):
        raise FormatError("bitsandbytes: 8-bit weights (LLM.int8) are not read; 4-bit ones (nf4, fp4) are")
    storage = str(config.get("bnb_4bit_quant_storage", "uint8")).removeprefix("torch.")
    if storage != "uint8":
        raise FormatError(f"bitsandbytes: weights stored as {storage} are not read; uint8 is")
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise FormatError(f"bitsandbytes: quant type {kind!r} is not read; nf4 and fp4 are")
    return parse_scheme(kind + ("-dq" if config.get("bnb_4bit_use_double_quant") else ""))


def encode(qtensor: QuantizedTensor, name: str) -> dict[str, Tensor]:
    """Return the tensors of a layer `name` as the file holds them (the module's docstring gives them).

    Raises:
        FormatError: as `check_scheme`.
    """
    scheme = qtensor.scheme
    check_scheme(scheme)
    assert isinstance(scheme.format, CodebookFormat)
    device = qtensor.codes.device
    state: dict[str, Any] = {
        "quant_type": scheme.format.name,
        "blocksize": scheme.group_size,
        "dtype": "float32",
        "shape": list(qtensor.shape),
    }
    tensors = {
        f"{name}.weight": _swap(qtensor.codes).unsqueeze(1),
        f"{name}.weight.quant_map": level_table(scheme.format, device),
    }
    if qtensor.nested is None:
        assert qtensor.scale is not None
        tensors[f"{name}.weight.absmax"] = qtensor.scale
    else:
        tensors[f"{name}.weight.absmax"] = qtensor.nested.codes
        tensors[f"{name}.weight.nested_absmax"] = qtensor.nested.scale
        tensors[f"{name}.weight.nested_quant_map"] = dynamic_map(device)
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": qtensor.nested.offset.item(),
        }
    packed = bytearray(json.dumps(state).encode())
    tensors[f"{name}.weight.quant_state.bitsandbytes__{scheme.format.name}"] = torch.frombuffer(
        packed, dtype=torch.uint8
    )
    return tensors


def decode(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, where: str = "weight"
) -> QuantizedTensor:
    """Return the quantized weight that a layer's tensors hold, codes and scales bit for bit.

    Args:
        tensors: by their own names, without the layer's: `weight`, `weight.absmax`, `weight.quant_map`, ...
        config: the model's `quantization_config`; each layer describes itself, so it is only checked.
        where: the layer's name, for messages.

    Raises:
        FormatError: as `scheme_from_config`.
        FileFormatError: the state is not what the format demands, tensors are missing or too many, have another shape
            or dtype, or the table is not the one of its name.
    """
    if config is not None:
        scheme_from_config(config)
    kind, state = _state(tensors, where)
    double_quant = "weight.nested_absmax" in tensors
    scheme, shape = _described(kind, state, double_quant=double_quant, where=where)
    assert isinstance(scheme.format, CodebookFormat)
    needed = {"weight", "weight.absmax", "weight.quant_map", f"weight.quant_state.bitsandbytes__{kind}"}
    tables = {"weight.quant_map": level_table(scheme.format, torch.device("cpu"))}
    if double_quant:
        needed |= {"weight.nested_absmax", "weight.nested_quant_map"}
        tables["weight.nested_quant_map"] = dynamic_map(torch.device("cpu"))
    if tensors.keys() != needed:
        raise FileFormatError(
            f"{where}: tensors {', '.join(sorted(tensors))} found, {', '.join(sorted(needed))} are needed"
        )
    for name, table in tables.items():
        if not torch.equal(tensors[name].cpu(), table):
            raise FileFormatError(
                f"{where}: {name} is not the table of {kind} that bitsandbytes uses; strop reads no other"
            )
    count = math.prod(shape)
    weight = tensors["weight"]
    if weight.dtype != torch.uint8 or weight.numel() != -(-count // 2):
        raise FileFormatError(
            f"{where}: weight is {weight.dtype} {list(weight.shape)}; {list(shape)} needs uint8 [{-(-count // 2)}, 1]"
        )
    codes = _swap(weight.reshape(-1))
    if count % 2:
        codes[-1] &= 0x0F  # what fills the last byte up is no code
    parts = {"codes": codes}
    absmax = tensors["weight.absmax"].reshape(-1)
    if double_quant:
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=weight.device)
        nested = tensors["weight.nested_absmax"].reshape(-1)
        parts |= {"nested_codes": absmax, "nested_scale": nested, "nested_offset": offset}
    else:
        parts["scale"] = absmax
    try:
        return QuantizedTensor.from_tensors(parts, scheme, shape)
    except FormatError as error:
        raise FileFormatError(f"{where}: {error}") from error


def _swap(codes: Tensor) -> Tensor:
    """Exchange the nibbles of every byte: ours have the first code low, theirs high."""
    return (codes << 4) | (codes >> 4)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _state(tensors: Mapping[str, Tensor], where: str) -> tuple[str, dict[str, Any]]:
    prefix = "weight.quant_state.bitsandbytes__"
    kinds = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    if len(kinds) != 1 or kinds[0] not in ("nf4", "fp4"):
        raise FileFormatError(
            f"{where}: {len(kinds)} quant_state tensors ({', '.join(kinds) or 'none'}); one of nf4 or fp4 is needed"
        )
    raw = tensors[prefix + kinds[0]]
    if raw.dtype != torch.uint8 or raw.numel() > _MAX_STATE_BYTES:
        raise FileFormatError(f"{where}: quant_state is {raw.dtype} of {raw.numel()} values; JSON in uint8 is needed")
    try:
        state = json.loads(bytes(raw.cpu().tolist()).decode())
        if not isinstance(state, dict):
            raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where}: quant_state is not the JSON that the format demands ({error})") from None
    return kinds[0], state


def _described(
    kind: str, state: Mapping[str, Any], *, double_quant: bool, where: str
) -> tuple[Scheme, tuple[int, int]]:
    """The scheme and the shape that a layer's state gives, every field checked."""
    problems = []
    shape, block = state.get("shape"), state.get("blocksize")
    if state.get("quant_type") != kind:
        problems.append(f"quant_type {state.get('quant_type')!r}, {kind!r} is needed")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(type(size) is int and 0 < size < 2**31 for size in shape)
    ):
        problems.append(f"shape {shape!r}, two sizes are needed")
    if type(block) is not int or block not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        problems.append(f"blocksize {block!r}, a power of two from 32 to 4096 is needed")
    if double_quant:
        offset = state.get("nested_offset")
        if state.get("nested_blocksize") != NESTED_BLOCK:
            problems.append(f"nested_blocksize {state.get('nested_blocksize')!r}, {NESTED_BLOCK} is needed")
        if state.get("nested_dtype") != "float32":
            problems.append(f"nested_dtype {state.get('nested_dtype')!r}, float32 is needed")
        if not isinstance(offset, float) or not math.isfinite(offset):
            problems.append(f"nested_offset {offset!r}, a finite number is needed")
    if problems:
        raise FileFormatError(f"{where}: quant_state: {'; '.join(problems)}")
    assert isinstance(shape, list)
    name = kind + (f"-g{block}" if block != 64 else "") + ("-dq" if double_quant else "")
    scheme = parse_scheme(name)
    assert scheme.format == FORMATS[kind]
    return scheme, (shape[0], shape[1])
