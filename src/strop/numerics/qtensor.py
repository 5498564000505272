"""`QuantizedTensor`: a weight as packed codes, scales and zero points. `quantize_tensor` makes one.

    codes       uint8  [out, ceil(in * bits / 8)]; codebooks [ceil(out * in * bits / 8)] over the flattened weight
    scale       the scheme's scale dtype, [1, 1], [out, 1], [out, groups] or [blocks]; None under double quantization
    zero_point  uint8  like scale, or None; stored as codes are: z - qmin
    nested      under double quantization, the block scales as 8-bit codes
    super_scale in superblocks (Q4_K), scales and minimums of the groups as 6-bit codes: super_scale and super_minimum
                float16 [out, in / 256], sub_scale and sub_minimum uint8 [out, in / 256 * 6]
    activation_scale  float32 [1], the static scale of the layer's inputs; only in schemes with -a8-static, and there
                None until calibration gives it
    group_index int32 [in], which group each input belongs to; only of integers in groups, and only where a group's
                inputs do not stand side by side (GPTQ's activation order): element [o, i] has scale[o, group_index[i]]

Stored codes are unsigned: an integer's is q - qmin, packed by `packing`. Not a `torch.Tensor` subclass, and without
gradient: what trains through a grid is `fake_quantize`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.errors import FormatError
from strop.numerics import accelerated, grid
from strop.numerics.codebook import NestedScale
from strop.numerics.groups import plan_shape, restore, row_chunks, rows_of, split, spread
from strop.numerics.laid import lay_grid
from strop.numerics.packing import pack, packed_size, unpack
from strop.numerics.scheme import NESTED_BLOCK, Granularity, Scheme
from strop.numerics.superblock import SuperScale, super_parts


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A quantized weight of logical shape (out, in); the module's docstring gives the parts."""

    codes: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    scheme: Scheme
    shape: tuple[int, int]
    nested: NestedScale | None = None
    super_scale: SuperScale | None = None
    activation_scale: Tensor | None = None
    group_index: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(part.numel() * part.element_size() for part in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, counting codes, scales and zero points."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])

    def scales(self) -> Tensor:
        """The scales in float32, in the shape that `plan_shape` gives, double quantization and superblocks undone."""
        if self.super_scale is not None:
            return self.super_scale.scales()
        if self.nested is not None:
            return self.nested.dequantize()
        if self.scale is None:
            raise ValueError(f"{self.scheme.name}: neither scales nor nested scales")
        return self.scale.float()

    def minimums(self) -> Tensor | None:
        """What superblocks subtract from the values of their groups, float32 like scales; None without them."""
        return None if self.super_scale is None else self.super_scale.minimums()

    def stored_codes(self) -> Tensor:
        """The codes unpacked, uint8 [out, in]."""
        rows, columns = self.shape
        if self.codes.ndim == 1:
            return unpack(self.codes, self.scheme.bits, rows * columns).view(rows, columns)
        return unpack(self.codes, self.scheme.bits, columns)

    def with_codes(self, stored: Tensor) -> QuantizedTensor:
        """The same scales with other codes, as `stored_codes` gives them: uint8 [out, in]."""
        codes = stored.reshape(-1) if self.codes.ndim == 1 else stored
        return dataclasses.replace(self, codes=pack(codes, self.scheme.bits))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, [out, in], computed in float32 and rounded once to `dtype`."""
        scheme = self.scheme
        if self.group_index is None and self.super_scale is None:
            made = accelerated.dequantize(
                self.codes,
                scheme,
                self.shape,
                scale=self.scales() if self.scale is None else self.scale,
                zero_point=self.zero_point,
                dtype=dtype,
            )
            if made is not None:
                return made
        scale = spread(self.scales())
        zero_point = None if self.zero_point is None else spread(self.zero_point)
        minimum = self.minimums()
        minimum = None if minimum is None else spread(minimum)
        packed = self._packed_rows()
        size = scheme.group_size or self.shape[1]
        groups = self.shape[1] // size if scheme.granularity is Granularity.GROUP else 1
        if self.group_index is not None:  # every input is a group of its own, and takes the scale of the one it is in
            groups, size = self.shape[1], 1
        result = torch.empty((packed.shape[0], groups, size), dtype=dtype, device=packed.device)
        for rows in row_chunks(packed.shape[0], groups * size):
            step, zero = rows_of(scale, rows), None if zero_point is None else rows_of(zero_point, rows)
            if self.group_index is not None:
                step = step[:, self.group_index]  # [rows, groups, 1] -> [rows, in, 1]
                zero = None if zero is None else zero[:, self.group_index]
            values = grid.packed_values(packed[rows], groups, size, step, zero, scheme.format)
            result[rows] = values if minimum is None else values.sub_(rows_of(minimum, rows))
        return restore(result, self.shape)

    def row_reader(self) -> accelerated.RowReader | None:
        """Reads rows without making the rest dense; None where the native kernels do not."""
        if self.group_index is not None or self.super_scale is not None:
            return None
        scale = self.scales() if self.scale is None else self.scale
        return accelerated.RowReader.of(self.codes, self.scheme, self.shape, scale, self.zero_point)

    def with_activation_scale(self, scale: float | None) -> QuantizedTensor:
        """The same with the static scale of the layer's inputs; the tensor itself where the scheme has none.

        Raises:
            FormatError: The scheme needs one, and there is none or it is not a positive number.
        """
        if self.scheme.activations is None or not self.scheme.activations.is_static:
            return self
        if scale is None or not (math.isfinite(scale) and scale > 0):
            raise FormatError(
                f"{self.scheme}: calibration must give a positive scale of the activations, got {scale}; a layer that "
                "no row of the data reaches has none: use int8-a8, which finds it while it runs, or other data"
            )
        given = torch.tensor([scale], dtype=torch.float32, device=self.codes.device)
        return dataclasses.replace(self, activation_scale=given)

    def _packed_rows(self) -> Tensor:
        """The packed codes, a row for each row of groups: [out, bytes], or [blocks, bytes], a short block filled."""
        if self.codes.ndim == 2 or self.scheme.group_size is None:
            return self.codes
        block_bytes = packed_size(self.scheme.group_size, self.scheme.bits)
        missing = -self.codes.numel() % block_bytes
        codes = torch.nn.functional.pad(self.codes, (0, missing)) if missing else self.codes
        return codes.view(-1, block_bytes)

    def tensors(self) -> dict[str, Tensor]:
        """The parts that there are, by name.

        codes, scale, zero_point; nested_codes, nested_scale, nested_offset; super_scale, super_minimum, sub_scale,
        sub_minimum; activation_scale; group_index.
        """
        parts = {"codes": self.codes, "scale": self.scale, "zero_point": self.zero_point}
        if self.nested is not None:
            parts["nested_codes"] = self.nested.codes
            parts["nested_scale"] = self.nested.scale
            parts["nested_offset"] = self.nested.offset
        if self.super_scale is not None:
            parts["super_scale"] = self.super_scale.scale
            parts["super_minimum"] = self.super_scale.minimum
            parts["sub_scale"] = self.super_scale.sub_scale
            parts["sub_minimum"] = self.super_scale.sub_minimum
        parts |= {"activation_scale": self.activation_scale, "group_index": self.group_index}
        return {name: part for name, part in parts.items() if part is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> QuantizedTensor:
        """Build from the parts that `tensors` names.

        Raises:
            FormatError: Parts are missing or too many, or have another shape or dtype than the scheme demands; all of
                them are listed.
        """
        expected = _expected_parts(scheme, shape)
        if "group_index" in tensors and scheme.has_plain_groups:
            expected["group_index"] = ((shape[1],), torch.int32)
        problems = [f"unexpected {name}" for name in tensors if name not in expected]
        for name, (size, dtype) in expected.items():
            part = tensors.get(name)
            if part is None:
                problems.append(f"{name} is missing")
            elif tuple(part.shape) != size or part.dtype != dtype:
                problems.append(f"{name} is {list(part.shape)} {part.dtype}, needed {list(size)} {dtype}")
        if problems:
            raise FormatError(f"a weight {list(shape)} as {scheme.name}: {'; '.join(problems)}")
        nested = None
        if scheme.double_quant:
            nested = NestedScale(tensors["nested_codes"], tensors["nested_scale"], tensors["nested_offset"])
        super_scale = None
        if scheme.super_size is not None:
            super_scale = SuperScale(*(tensors[name] for name in super_parts(scheme, shape)))
        return cls(
            tensors["codes"],
            tensors.get("scale"),
            tensors.get("zero_point"),
            scheme,
            shape,
            nested,
            super_scale,
            tensors.get("activation_scale"),
            tensors.get("group_index"),
        )


def quantize_tensor(
    weight: Tensor,
    scheme: Scheme,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    super_scale: SuperScale | None = None,
    generator: torch.Generator | None = None,
    where: str = "weight",
) -> QuantizedTensor:
    """Round a weight to a scheme's grid: each value to the nearest there is, ties to even, or by chance.

    Args:
        weight: [out, in], any float dtype; worked on in float32, a bounded piece at a time.
        scheme: The grid.
        scale: Scales to use, of the shape `plan_shape` gives, instead of those that cover the weight's own range.
        zero_point: Zero points that go with them, as `choose_scale` returns them; needed exactly where the scheme is
            asymmetric and `scale` is given. In superblocks (Q4_K) both are rounded once more, to the nearest that
            6 bits hold, and zero points may be any number that is not negative.
        super_scale: The superblocks to use, of another weight of the same scheme and shape or of `super_scale_of`.
        generator: Round stochastically with its draws: to one of the two neighbours, the nearer the likelier, so that
            the mean of many roundings is the weight itself, wherever the grid reaches.
        where: The weight's name, for messages.

    Raises:
        FormatError: The shape does not divide, the weight holds NaN or infinite values, or a scale overflows its dtype.
    """
    weight = weight.detach()
    shape = _two_sizes(weight, scheme, where)
    if generator is None and super_scale is None:
        made = accelerated.quantize(weight, scheme, scale, zero_point, where=where)
        if made is not None:
            return QuantizedTensor(made.codes, made.scale, made.zero_point, scheme, shape, made.nested)
    groups = split(weight, scheme)
    laid = lay_grid(groups, scheme, shape, scale=scale, zero_point=zero_point, super_scale=super_scale, where=where)
    stored = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    for rows in row_chunks(groups.shape[0], groups[0].numel()):
        x = groups[rows].float()
        noise = None
        if generator is not None:
            noise = torch.rand(x.shape, generator=generator, device=generator.device).to(x.device)
        stored[rows] = laid.codes(x, rows, noise=noise)
    codes = restore(stored, shape)
    if scheme.granularity is Granularity.BLOCK:
        codes = codes.reshape(-1)
    packed = pack(codes, scheme.bits)
    return QuantizedTensor(packed, laid.scale, laid.zero_point, scheme, shape, laid.nested, laid.super_scale)


def _two_sizes(weight: Tensor, scheme: Scheme, where: str) -> tuple[int, int]:
    """The shape (out, in) of a weight that the scheme can cut into groups."""
    if not weight.is_floating_point():
        raise FormatError(f"{where}: a weight has a float dtype, got {weight.dtype}")
    plan_shape(tuple(weight.shape), scheme, where=where)
    rows, columns = weight.shape
    return rows, columns


def _expected_parts(scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every part that a scheme has for a weight of `shape`."""
    rows, columns = shape
    size = plan_shape(shape, scheme)
    if scheme.granularity is Granularity.BLOCK:
        codes = (packed_size(rows * columns, scheme.bits),)
    else:
        codes = (rows, packed_size(columns, scheme.bits))
    parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": (codes, torch.uint8)}
    if scheme.double_quant:
        nested_blocks = -(-size[0] // NESTED_BLOCK)
        parts["nested_codes"] = (size, torch.uint8)
        parts["nested_scale"] = ((nested_blocks,), torch.float32)
        parts["nested_offset"] = ((), torch.float32)
    elif scheme.super_size is not None:
        parts |= super_parts(scheme, shape)
    else:
        parts["scale"] = (size, scheme.scale_dtype)
    if scheme.has_zero_point:
        parts["zero_point"] = (size, torch.uint8)
    if scheme.activations is not None and scheme.activations.is_static:
        parts["activation_scale"] = ((1,), torch.float32)
    return parts
