"""Integer and fp8 weights as compressed-tensors holds them: what transformers and vLLM open without strop.

`pack-quantized`, for 2 to 8 bits, of a layer NAME whose weight is [out, in], b bits, groups of g (one per row without):

    NAME.weight_packed      int32 [out, ceil(in * b / 32)]; code q + 2^(b-1), dense, least significant bit first
    NAME.weight_scale       [out, in / g]; per tensor [1]
    NAME.weight_shape       int64 [2]: out, in
    NAME.weight_zero_point  asymmetric only: int32 [ceil(out * b / 32), in / g], z + 2^(b-1) packed along dim 0;
                            per tensor int8 [1], not packed
    NAME.weight_g_idx       older files' activation order by group only: int32 [in], the group of each input

A row of ours, padded with zero bytes to a multiple of four, is a row of `weight_packed`. `float-quantized` (fp8) holds
`NAME.weight` in float8_e4m3 and `NAME.weight_scale`; `mxfp4-pack-quantized` holds `NAME.weight_packed` uint8
[out, in / 2], the first code in the low nibble, and `NAME.weight_scale` uint8 [out, in / 32], E8M0; `naive-quantized`
(integers or floats, one number each) is read, not written. W = scale * (q - z); the scale of a full-range grid may be
negative, which the format and its readers carry.

`int-quantized` holds int8 weights whose activations are int8 too (`int8-a8`): `NAME.weight` int8 [out, in],
`NAME.weight_scale`, and with a static scale of the activations `NAME.input_scale` [1]; `input_activations` in the
configuration says which. LLM.int8's outlier threshold has no field there: `int8-a8-over6` is written as int8 weights
alone, packed, whose activations other readers leave as they are, and the group's name brings the threshold back.

What transformers 5.23 with compressed-tensors 0.20 does with such a folder (found by experiment, tests/files):
- symmetric grids open with `from_pretrained(folder, dtype=torch.float32)` and give the same weights bit for bit; in a
  16-bit model the scales are rounded to that dtype first.
- asymmetric grids per channel or group open only dequantized while loading (else the library expects zero points that
  are not packed), and are then computed in the scale's dtype. So those folders carry `"dequantize": true` in their
  configuration and scales in float32 (of the same values), and open as plainly and as exactly.
- embeddings cannot be packed: see `embedding_tensors`.
- MXFP4 opens packed in a bfloat16 model only (the library's weights are bfloat16 whatever the model is), so it is
  dequantized while loading too, which is exact: its levels have two significant bits.

Not here: GPT-2's Conv1D, which the library cannot hold packed (`saving` refuses it); quantized caches, groups of
layers with different grids (`mixed` takes them apart), which are refused by name on reading. Activation order by group
is read and not written: the library dropped it in 2026, and other readers with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from strop.errors import FileFormatError, FormatError
from strop.files.gptq import group_index
from strop.numerics.activations import ActivationRange, Activations
from strop.numerics.formats import FORMATS, CodebookFormat, FloatFormat, IntFormat
from strop.numerics.packing import pack, packed_size, unpack
from strop.numerics.qtensor import QuantizedTensor
from strop.numerics.scheme import Granularity, Mode, Scheme, parse_scheme

METHOD = "compressed-tensors"
"""The value of `quant_method` in a model's configuration."""

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale")
"""What the tensors of a layer end in, besides `weight` itself where nothing is packed."""

EMBEDDINGS = "@embeddings"
"""What the name of a group of embeddings ends in, after the scheme's own name."""

_MXFP4 = "mxfp4-pack-quantized"
_ONE_EACH = {"int-quantized": torch.int8, "naive-quantized": None, "float-quantized": torch.float8_e4m3fn}
_PACKED = "pack-quantized"
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_scheme(scheme: Scheme) -> None:
    """Refuse a scheme that compressed-tensors cannot express.

    Raises:
        FormatError: codebooks, or another float than e4m3; the message names the nearest.
    """
    if isinstance(scheme.format, CodebookFormat):
        raise FormatError(
            f"{scheme}: compressed-tensors holds no codebooks; it is saved as bitsandbytes, or use int4-g32"
        )
    if scheme.super_size is not None:
        raise FormatError(
            f"{scheme}: is a grid of GGUF files, which no model folder holds; the nearest that one does is "
            "int4-g32-asym"
        )
    if isinstance(scheme.format, FloatFormat) and scheme.format not in (FORMATS["fp8_e4m3"], FORMATS["mxfp4"]):
        raise FormatError(f"{scheme}: of 8-bit floats compressed-tensors holds e4m3 alone; the nearest is fp8")


def opens_packed(scheme: Scheme) -> bool:
    """Whether the library opens the scheme's packed weights as they are, into layers that are plain `nn.Linear`."""
    if scheme.has_power_scale:
        return False
    return scheme.mode is not Mode.ASYMMETRIC or scheme.granularity is Granularity.TENSOR


def config_for(scheme: Scheme, ignore: Sequence[str], *, packed: bool | None = None) -> dict[str, Any]:
    """Return the `quantization_config` of a model whose linear layers, but for `ignore`, are quantized by `scheme`.

    The group bears the scheme's own name (the name is free), so that what the other fields leave out comes back: a
    full-range grid, and the dtype of scales that were widened.

    Args:
        scheme: of the quantized layers.
        ignore: full names of the linear layers that stay as they are.
        packed: whether the library is to keep the weights packed when it opens them; where it cannot, it dequantizes
            them while loading. `opens_packed(scheme)` by default.

    Raises:
        FormatError: as `check_scheme`.
    """
    check_scheme(scheme)
    is_float = isinstance(scheme.format, FloatFormat)
    activations = _activation_fields(scheme.activations)
    weights = {
        "num_bits": scheme.bits,
        "type": "float" if is_float else "int",
        "symmetric": scheme.mode is not Mode.ASYMMETRIC,
        "strategy": scheme.granularity.value,
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    if scheme.has_power_scale:
        weights |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    config: dict[str, Any] = {
        "quant_method": METHOD,
        "format": _form(scheme),
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {scheme.name: group},
        "ignore": list(ignore),
    }
    if activations is None and not (opens_packed(scheme) if packed is None else packed):
        config["dequantize"] = True
    return config


def scheme_from_config(config: Mapping[str, Any]) -> Scheme:
    """Return the one scheme that a `quantization_config` describes.

    The dtype of the scales is the default of the granularity, unless the group's name says otherwise; `decode` takes it
    from the tensors.

    Raises:
        FormatError: several groups, quantized activations or cache, or a kind of weight that strop does not read; all
            named.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise FormatError("quantization_config: config_groups is missing or empty; no weight is described")
    problems = []
    if len(groups) > 1:
        problems.append(f"{len(groups)} groups of layers with grids of their own ({', '.join(groups)}); one is read")
    if config.get("kv_cache_scheme"):
        problems.append("a quantized key-value cache")
    form = config.get("format")
    if form not in (_PACKED, _MXFP4) and form not in _ONE_EACH:
        problems.append(f"format {form!r}; {', '.join([_PACKED, _MXFP4, *_ONE_EACH])} are read")
    if config.get("quantization_status", "compressed") != "compressed":
        problems.append(f"quantization_status {config['quantization_status']!r}; the weights must be 'compressed'")
    name, group = next(iter(groups.items()))
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise FormatError(f"quantization_config: group {name!r} says nothing of weights")
    if group.get("output_activations"):
        problems.append("quantized output activations (those of the input are read)")
    activations = None
    if given := group.get("input_activations"):
        activations = _activations(given)
        if activations is None:
            problems.append(
                f"input activations of {given.get('num_bits')} bits, type {given.get('type')}, strategy "
                f"{given.get('strategy')}, dynamic {given.get('dynamic')}, symmetric {given.get('symmetric')} (int of "
                "8 bits, dynamic by token or static and symmetric by tensor, is read)"
            )
    if weights.get("dynamic") or weights.get("block_structure"):
        problems.append("weights in two-dimensional blocks, or with dynamic scales")
    if problems:
        raise FormatError("compressed-tensors: this model has what strop does not read: " + "; ".join(problems))
    if form == _MXFP4:
        return _mxfp4_scheme(weights, activations)
    return _scheme(name, weights, activations)


def _form(scheme: Scheme) -> str:
    """The configuration's `format`: how weights are packed."""
    if scheme.has_power_scale:
        return _MXFP4
    if isinstance(scheme.format, FloatFormat):
        return "float-quantized"
    return "int-quantized" if _activation_fields(scheme.activations) else _PACKED


def encode(qtensor: QuantizedTensor, name: str, *, packed: bool | None = None) -> dict[str, Tensor]:
    """Return the tensors of a layer `name` as the file holds them (the module's docstring gives them).

    Args:
        qtensor: the weight.
        name: the layer's full name.
        packed: as in `config_for`; where the library dequantizes while loading, it computes in the dtype of the scales,
            which are float32 then.

    Raises:
        FormatError: as `check_scheme`, or a weight in activation order.
    """
    scheme = qtensor.scheme
    check_scheme(scheme)
    if qtensor.group_index is not None:
        raise FormatError(
            f"{name}: its groups are in activation order (desc_act), which compressed-tensors no longer holds; merge "
            "to dense weights and round those (strop merge, then strop quantize), or keep the adapter apart"
        )
    assert qtensor.scale is not None  # only codebooks nest their scales
    if scheme.has_power_scale:
        return {f"{name}.weight_packed": qtensor.codes, f"{name}.weight_scale": qtensor.scale.view(torch.uint8)}
    rows, columns = qtensor.shape
    scale = qtensor.scale.reshape(-1) if scheme.granularity is Granularity.TENSOR else qtensor.scale
    if _activation_fields(scheme.activations):
        tensors = {f"{name}.weight": (qtensor.codes ^ 0x80).view(torch.int8), f"{name}.weight_scale": scale}
        if qtensor.activation_scale is not None:
            tensors[f"{name}.input_scale"] = qtensor.activation_scale
        return tensors
    if not (opens_packed(scheme) if packed is None else packed):
        scale = scale.float()
    if isinstance(scheme.format, FloatFormat):
        weight = qtensor.codes.view(torch.float8_e4m3fn)
        return {f"{name}.weight": weight, f"{name}.weight_scale": scale}
    tensors = {
        f"{name}.weight_packed": _to_words(qtensor.codes),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor([rows, columns], dtype=torch.int64),
    }
    if qtensor.zero_point is not None:
        if scheme.granularity is Granularity.TENSOR:
            zero_point = (qtensor.zero_point.reshape(-1).to(torch.int16) - (1 << (scheme.bits - 1))).to(torch.int8)
        else:
            columns_first = qtensor.zero_point.T.clone(memory_format=torch.contiguous_format)
            zero_point = _to_words(pack(columns_first, scheme.bits)).T.contiguous()
        tensors[f"{name}.weight_zero_point"] = zero_point
    return tensors


def decode(tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, where: str = "weight") -> QuantizedTensor:
    """Return the quantized weight that a layer's tensors hold, codes and scales bit for bit.

    Args:
        tensors: by their own names, without the layer's: `weight_packed`, `weight_scale`, ... or `weight`,
            `weight_scale`.
        config: the model's `quantization_config`.
        where: the layer's name, for messages.

    Raises:
        FormatError: as `scheme_from_config`.
        FileFormatError: tensors are missing or too many, or have another shape or dtype than the format demands.
    """
    scheme = scheme_from_config(config)
    if scheme.has_power_scale:
        return _decode_mxfp4(tensors, scheme, where)
    packed = config.get("format") == _PACKED
    needed = {"weight_packed", "weight_scale", "weight_shape"} if packed else {"weight", "weight_scale"}
    if scheme.mode is Mode.ASYMMETRIC:
        needed.add("weight_zero_point")
    is_static = scheme.activations is not None and scheme.activations.is_static
    if is_static:
        needed.add("input_scale")
    ordered = scheme.has_plain_groups and ("weight_g_idx" in tensors or _by_group(config))
    if ordered:
        needed.add("weight_g_idx")
    if tensors.keys() != needed:
        raise FileFormatError(f"{where}: tensors {_listed(tensors)} found, {_listed(needed)} are needed for {scheme}")
    scale = tensors["weight_scale"]
    if scale.dtype not in _SCALE_DTYPES:
        raise FileFormatError(f"{where}: weight_scale is {scale.dtype}; float16, bfloat16 or float32 is needed")
    codes, shape = _packed_codes(tensors, scheme, where) if packed else _plain_codes(tensors, scheme, config, where)
    scheme, scale = _narrow(scheme, scale, widened=config.get("dequantize") is True)
    scale_shape = scheme.scale_shape(shape)
    if scale.numel() != scale_shape[0] * scale_shape[1] or scale.shape[0] != scale_shape[0]:
        raise FileFormatError(
            f"{where}: weight_scale is {list(scale.shape)}; {scheme} of {list(shape)} needs {list(scale_shape)}"
        )
    parts = {"codes": codes, "scale": scale.reshape(scale_shape).contiguous()}
    if scheme.mode is Mode.ASYMMETRIC:
        parts["zero_point"] = _zero_point(tensors["weight_zero_point"], scheme, scale_shape, packed=packed, where=where)
    if is_static:
        parts["activation_scale"] = _input_scale(tensors["input_scale"], where)
    if ordered:
        assert scheme.group_size is not None
        index = group_index(tensors["weight_g_idx"], shape[1], scheme.group_size, where, name="weight_g_idx")
        parts |= {} if index is None else {"group_index": index}
    try:
        return QuantizedTensor.from_tensors(parts, scheme, shape)
    except FormatError as error:
        raise FileFormatError(f"{where}: {error}") from error


def _activation_fields(activations: Activations | None) -> dict[str, Any] | None:
    """`input_activations` of a group; None where the format has no words for them (an outlier threshold)."""
    if activations is None or activations.threshold is not None:
        return None
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": activations.range is not ActivationRange.TOKEN_ASYMMETRIC,
        "strategy": "tensor" if activations.is_static else "token",
        "dynamic": not activations.is_static,
    }


def _activations(fields: Any) -> Activations | None:
    """What `input_activations` describes; None where strop has no such activations."""
    if not isinstance(fields, Mapping) or fields.get("num_bits") != 8 or fields.get("type", "int") != "int":
        return None
    symmetric = fields.get("symmetric", True)
    if fields.get("dynamic") is True and fields.get("strategy") == "token":
        return Activations(ActivationRange.TOKEN if symmetric else ActivationRange.TOKEN_ASYMMETRIC)
    if not fields.get("dynamic") and fields.get("strategy") == "tensor" and symmetric:
        return Activations(ActivationRange.TENSOR)
    return None


def _by_group(config: Mapping[str, Any]) -> bool:
    """Whether the one group of layers was quantized in activation order and kept in it."""
    (group,) = config["config_groups"].values()
    return group["weights"].get("actorder") in ("group", True)


def _input_scale(scale: Tensor, where: str) -> Tensor:
    if scale.numel() != 1 or scale.dtype not in _SCALE_DTYPES or not (scale > 0).all() or not scale.isfinite().all():
        raise FileFormatError(
            f"{where}: input_scale is {scale.dtype} {list(scale.shape)}; one positive float16, bfloat16 or float32 is "
            "needed"
        )
    return scale.reshape(1).float()


def _scheme(name: str, weights: Mapping[str, Any], activations: Activations | None) -> Scheme:
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    group_size = weights.get("group_size")
    if strategy is None:  # the library's own rule for what is left out
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    format_name = {"int": f"int{bits}", "float": "fp8_e4m3" if bits == 8 else ""}.get(str(kind), "")
    if format_name not in FORMATS or strategy not in ("tensor", "channel", "group"):
        raise FormatError(
            f"compressed-tensors: weights of {bits} bits, type {kind}, strategy {strategy} are not read; int of 2 to 8 "
            "bits and "
            "float of 8, by tensor, channel or group, are"
        )
    granularity = Granularity(strategy)
    if granularity is Granularity.GROUP and (type(group_size) is not int or group_size < 2):
        raise FormatError(f"compressed-tensors: strategy group with group_size {group_size!r}; at least 2 is needed")
    symmetric = weights.get("symmetric", True)
    try:
        named = parse_scheme(name.removesuffix(EMBEDDINGS))
    except FormatError:
        named = None
    number = FORMATS[format_name]
    if (
        named is not None
        and named.bits == bits
        and isinstance(named.format, IntFormat) == isinstance(number, IntFormat)
        and named.granularity is granularity
        and (granularity is not Granularity.GROUP or named.group_size == group_size)
        and (named.mode is not Mode.ASYMMETRIC) == symmetric
        and _activation_fields(named.activations) == _activation_fields(activations)
    ):
        return named
    base = format_name + (f"-g{group_size}" if granularity is Granularity.GROUP else "")
    text = base + ("-tensor" if granularity is Granularity.TENSOR else "") + ("" if symmetric else "-asym")
    return parse_scheme(text if activations is None else f"{text}-{activations.name}")


def _mxfp4_scheme(weights: Mapping[str, Any], activations: Activations | None) -> Scheme:
    """MXFP4, if the weights are described as that, and nothing else is rounded."""
    if activations is not None:
        raise FormatError(f"compressed-tensors: {_MXFP4} with input activations of 8 bits; strop reads it without them")
    needed = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    found = {"strategy": "group", "symmetric": True} | {key: weights[key] for key in needed if key in weights}
    if found != needed:
        raise FormatError(f"compressed-tensors: {_MXFP4} with weights of {found}; {needed} is what it means")
    return parse_scheme("mxfp4")


def _decode_mxfp4(tensors: Mapping[str, Tensor], scheme: Scheme, where: str) -> QuantizedTensor:
    needed = {"weight_packed", "weight_scale"}
    if tensors.keys() != needed:
        raise FileFormatError(f"{where}: tensors {_listed(tensors)} found, {_listed(needed)} are needed for {scheme}")
    packed, scale = tensors["weight_packed"], tensors["weight_scale"]
    for name, tensor in tensors.items():
        if tensor.dtype != torch.uint8 or tensor.ndim != 2 or 0 in tensor.shape:
            raise FileFormatError(
                f"{where}: {name} is {tensor.dtype} {list(tensor.shape)}; uint8 of two sizes is needed"
            )
    if (scale == 255).any():
        raise FileFormatError(f"{where}: weight_scale holds NaN (the byte 255); the file is damaged")
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    parts = {"codes": packed.contiguous(), "scale": scale.contiguous().view(scheme.scale_dtype)}
    try:
        return QuantizedTensor.from_tensors(parts, scheme, (rows, columns))
    except FormatError as error:
        raise FileFormatError(f"{where}: {error}") from error


def _narrow(scheme: Scheme, scale: Tensor, *, widened: bool) -> tuple[Scheme, Tensor]:
    """The scale in the scheme's dtype where it was only widened for the file, else the scheme with the scale's
    dtype.
    """
    if scale.dtype == scheme.scale_dtype:
        return scheme, scale
    narrow = scale.to(scheme.scale_dtype)
    if widened and scale.dtype == torch.float32 and narrow.float().equal(scale):
        return scheme, narrow
    return dataclasses.replace(scheme, scale_dtype=scale.dtype), scale


def _packed_codes(tensors: Mapping[str, Tensor], scheme: Scheme, where: str) -> tuple[Tensor, tuple[int, int]]:
    words, given = tensors["weight_packed"], tensors["weight_shape"]
    sizes = given.reshape(-1).tolist() if given.dtype in (torch.int64, torch.int32) else []
    if len(sizes) != 2 or min(sizes) < 1:
        raise FileFormatError(
            f"{where}: weight_shape is {given.dtype} {sizes or list(given.shape)}; two sizes are needed"
        )
    rows, columns = sizes
    expected = [rows, -(-columns * scheme.bits // 32)]
    if words.dtype != torch.int32 or list(words.shape) != expected:
        raise FileFormatError(
            f"{where}: weight_packed is {words.dtype} {list(words.shape)}; {scheme} of {sizes} needs int32 {expected}"
        )
    return _to_bytes(words, packed_size(columns, scheme.bits)), (rows, columns)


def _plain_codes(
    tensors: Mapping[str, Tensor], scheme: Scheme, config: Mapping[str, Any], where: str
) -> tuple[Tensor, tuple[int, int]]:
    weight = tensors["weight"]
    dtype = _ONE_EACH[config["format"]] or (torch.int8 if isinstance(scheme.format, IntFormat) else torch.float8_e4m3fn)
    if weight.ndim != 2 or weight.dtype != dtype or 0 in weight.shape:
        raise FileFormatError(f"{where}: weight is {weight.dtype} {list(weight.shape)}; {dtype} [out, in] is needed")
    shape = (weight.shape[0], weight.shape[1])
    if isinstance(scheme.format, FloatFormat):
        return weight.contiguous().view(torch.uint8), shape
    return pack(_stored(weight, scheme, f"{where}: weight"), scheme.bits), shape


def _zero_point(zero_point: Tensor, scheme: Scheme, shape: tuple[int, ...], *, packed: bool, where: str) -> Tensor:
    rows, groups = shape
    if packed and scheme.granularity is not Granularity.TENSOR:
        expected = [-(-rows * scheme.bits // 32), groups]
        if zero_point.dtype != torch.int32 or list(zero_point.shape) != expected:
            raise FileFormatError(
                f"{where}: weight_zero_point is {zero_point.dtype} {list(zero_point.shape)}; int32 {expected} is needed"
            )
        columns = _to_bytes(zero_point.T.contiguous(), packed_size(rows, scheme.bits))  # [groups, ceil(out * b / 8)]
        return unpack(columns, scheme.bits, rows).T.contiguous()
    if zero_point.dtype != torch.int8 or zero_point.numel() != rows * groups:
        raise FileFormatError(
            f"{where}: weight_zero_point is {zero_point.dtype} {list(zero_point.shape)}; int8 {list(shape)} is needed"
        )
    return _stored(zero_point.reshape(shape), scheme, f"{where}: weight_zero_point")


def _stored(signed: Tensor, scheme: Scheme, where: str) -> Tensor:
    """Codes q as int8 to q + 2^(b-1) as uint8."""
    half = 1 << (scheme.bits - 1)
    least, most = int(signed.min()), int(signed.max())
    if least < -half or most >= half:
        raise FileFormatError(f"{where}: values from {least} to {most} do not fit {scheme.bits} bits")
    return (signed.to(torch.int16) + half).to(torch.uint8)


def _to_words(rows: Tensor) -> Tensor:
    """Rows of bytes as rows of int32, padded with zero bytes; little-endian."""
    missing = -rows.shape[-1] % 4
    if missing:
        rows = torch.nn.functional.pad(rows, (0, missing))
    return rows.reshape(-1).view(torch.int32).reshape(rows.shape[0], -1)


def _to_bytes(words: Tensor, count: int) -> Tensor:
    """The first `count` bytes of each row of int32 words."""
    return words.reshape(-1).view(torch.uint8).reshape(words.shape[0], -1)[:, :count].contiguous()


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
