"""The fields of blocks: every bit in one field, codes as the blocks' own readers have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strop.files.gguf.block_fields import FIELDS
from strop.files.gguf.k_blocks import K_BLOCKS, parts_of
from strop.files.gguf.small_blocks import SMALL_BLOCKS, mxfp4_parts
from strop.files.gguf.types import TYPES


def random_blocks(name: str, count: int = 50) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, TYPES[name].block_bytes), np.uint8)


def test_every_type_that_a_file_may_name_has_fields() -> None:
    assert FIELDS.keys() == TYPES.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_every_bit_of_a_block_belongs_to_one_field(name: str) -> None:
    seen = np.zeros((1, TYPES[name].block_bytes), np.uint8)
    bits = 0
    for field in FIELDS[name]:
        alone = np.zeros_like(seen)
        field.write(np.full(field.count, (1 << field.bits) - 1, field.dtype), alone)
        assert not (alone & seen).any()
        assert np.unpackbits(alone).sum() == field.bits * field.count
        seen |= alone
        bits += field.bits * field.count
    assert (seen == 255).all()
    assert bits == 8 * TYPES[name].block_bytes


@pytest.mark.parametrize("name", FIELDS)
def test_fields_written_one_after_the_other_give_the_blocks_again(name: str) -> None:
    blocks = random_blocks(name)
    again = random_blocks(name)[::-1].copy()
    for field in FIELDS[name]:
        numbers = field.read(blocks)
        assert numbers.dtype == field.dtype
        assert numbers.max() < 1 << field.bits
        field.write(numbers, again)
    assert (again == blocks).all()


@pytest.mark.parametrize("name", FIELDS)
def test_writing_one_field_leaves_the_others(name: str) -> None:
    for changed in FIELDS[name]:
        blocks = random_blocks(name)
        before = [field.read(blocks) for field in FIELDS[name]]
        changed.write(changed.read(random_blocks(name)[::-1]), blocks)
        for field, numbers in zip(FIELDS[name], before, strict=True):
            if field is not changed:
                assert (field.read(blocks) == numbers).all()


@pytest.mark.parametrize("name", [*SMALL_BLOCKS, *K_BLOCKS, "mxfp4"])
def test_codes_are_those_of_the_reader_of_the_blocks(name: str) -> None:
    blocks = random_blocks(name)
    (field,) = (field for field in FIELDS[name] if field.role == "codes")
    if name == "mxfp4":
        wanted = mxfp4_parts(torch.from_numpy(blocks))[0]
    elif name in SMALL_BLOCKS:
        wanted = SMALL_BLOCKS[name].from_bytes(torch.from_numpy(blocks))[0]
    else:
        wanted = parts_of(name, torch.from_numpy(blocks)).codes
        if wanted.dtype == torch.int8:
            wanted = wanted + (1 << field.bits - 1)
    assert (field.read(blocks) == wanted.view(torch.uint8).reshape(-1).numpy()).all()


@pytest.mark.parametrize("name", ["q4_k", "q5_k"])
def test_the_six_bit_scales_and_minimums_are_those_of_the_reader(name: str) -> None:
    blocks = random_blocks(name)
    low, high = (field.read(blocks).reshape(-1, 2, 4) for field in FIELDS[name][2:4])
    parts = parts_of(name, torch.from_numpy(blocks))
    assert parts.sub_minimum is not None
    for place, wanted in enumerate((parts.sub_scale, parts.sub_minimum)):
        assert (np.concatenate([low[:, place], high[:, place]], axis=1) == wanted.numpy()).all()


def test_blocks_have_as_many_codes_as_values() -> None:
    by_the_byte = {"tq1_0", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"}
    for name, fields in FIELDS.items():
        codes = sum(field.count for field in fields if field.role != "scales")
        assert codes == TYPES[name].block or name in by_the_byte, name
