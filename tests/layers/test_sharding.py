"""Quantized layers and adapters under FSDP2: two processes, half of the codes in each, train as one process does."""

from __future__ import annotations

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from strop.errors import FormatError
from strop.layers.surgery import attach_lora, blocks, quantize_linears
from strop.numerics import parse_scheme
from tests.tiny import tiny_input, tiny_model

TEXTS = ["int8", "int4-g32", "int4-g16-asym", "int3-g32", "nf4", "nf4-dq", "fp8"]
OTHERWISE = "int4-g32"
STEPS = 3

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)


def model_of(text: str) -> nn.Module:
    """A quantized model with adapters, the same in every process."""
    model = tiny_model("llama")
    quantize_linears(model, parse_scheme(text))
    attach_lora(model, rank=4, alpha=8.0, generator=torch.Generator().manual_seed(0))
    return model


def whole(tensor: Tensor) -> Tensor:
    """A parameter with all of its shards."""
    gather = getattr(tensor, "full_tensor", None)
    return (gather() if gather is not None else tensor).detach().clone()


def trained(model: nn.Module, rows: list[Tensor], share: float) -> dict[str, Any]:
    """Logits and losses of each row over some steps, and the adapters after them; each row counts `share`."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    logits, losses = [], []
    for _ in range(STEPS):
        for ids in rows:
            output = model(input_ids=ids, labels=ids, use_cache=False)
            (output.loss * share).backward()
            logits.append(output.logits.detach())
            losses.append(output.loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return {"logits": logits, "losses": losses, "adapters": {name: whole(each) for name, each in trainable.items()}}


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    """Block by block, then what is left, over all processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for part in (*blocks(model).values(), model):
        fully_shard(part, mesh=mesh, **settings)
    return model


def by_operators(text: str) -> nn.Module:
    """The same model, each block compiled, so that its layers are operators."""
    model = model_of(text)
    for block in blocks(model).values():
        block.compile(backend="aot_eager", fullgraph=True)
    return model


def other_ways(text: str, row: Tensor) -> dict[str, Any]:
    """Compiled, in autocast to bfloat16, and with a policy that casts every parameter to it."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    warnings.simplefilter("ignore", DeprecationWarning)  # dynamo's own doing
    compiled = trained(sharded(by_operators(text)), [row], 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = trained(sharded(model_of(text)), [row], 1.0)
    cast = sharded(model_of(text), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    try:
        cast(input_ids=row, use_cache=False)
        refused = ""
    except FormatError as error:
        refused = str(error)
    return {"compiled": compiled, "autocast": narrow, "refused": refused}


def one_of_two(rank: int, meeting: str, texts: list[str]) -> dict[str, dict[str, Any]]:
    """What a process of two sees: it holds its shards and reads its own row."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        found, row = {}, tiny_input()[rank : rank + 1]
        for text in texts:
            model = model_of(text)
            before = {name: parameter.nbytes for name, parameter in model.named_parameters()}
            sharded(model)
            held = {name: cast(DTensor, each).to_local().nbytes for name, each in model.named_parameters()}
            seen = trained(model, [row], 1.0)
            kept = {name: whole(each) for name, each in model.named_parameters() if not each.requires_grad}
            found[text] = seen | {"before": before, "held": held, "frozen": kept}
        return found | {"other ways": other_ways(OTHERWISE, row)}
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    meeting = str(Path(tmp_path_factory.mktemp("gloo")) / "meeting")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(one_of_two, rank, meeting, TEXTS) for rank in range(2)]
        return [job.result(timeout=300) for job in jobs]


def in_one_process(model: nn.Module) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return trained(model, [tiny_input()[row : row + 1] for row in range(2)], 0.5)
    finally:
        torch.set_num_threads(threads)


def assert_same(seen: dict[str, Any], alone: dict[str, Any], rank: int) -> None:
    for what in ("logits", "losses"):
        for found, expected in zip(seen[what], alone[what][rank::2], strict=True):
            assert torch.equal(found, expected), what
    assert seen["adapters"].keys() == alone["adapters"].keys()
    for name, expected in alone["adapters"].items():
        assert torch.equal(seen["adapters"][name], expected), name


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_two_processes_train_adapters_as_one_does(both: list[dict[str, dict[str, Any]]], text: str) -> None:
    """Bit for bit: the mean over two rows is half of each, and halves are exact."""
    alone = in_one_process(model_of(text))
    fresh = dict(model_of(text).named_parameters())
    for rank, sides in enumerate(both):
        seen = sides[text]
        assert_same(seen, alone, rank)
        for name, moved in alone["adapters"].items():
            assert not torch.equal(moved, fresh[name]), f"{name} did not move"
        for name, found in seen["frozen"].items():  # with its dtype: a scale is no weight to be cast
            assert found.dtype == fresh[name].dtype, name
            assert torch.equal(found.view(torch.uint8), fresh[name].view(torch.uint8)), name


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_each_process_holds_half_of_the_codes_and_scales(both: list[dict[str, dict[str, Any]]], text: str) -> None:
    first, second = (sides[text] for sides in both)
    codes = [name for name in first["before"] if name.endswith((".codes", ".scale"))]
    assert len([name for name in codes if name.endswith(".codes")]) == 14  # of each of the blocks' linear layers
    for name in codes:
        assert first["held"][name] == second["held"][name] == first["before"][name] / 2, name
    for name, size in first["before"].items():
        assert first["held"][name] + second["held"][name] == size, name


@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones_do(both: list[dict[str, dict[str, Any]]]) -> None:
    """The layers are operators then, with the same numbers; what lies between them is summed in another order."""
    for sides in both:
        found, expected = sides["other ways"]["compiled"], sides[OTHERWISE]
        for what in ("logits", "losses"):
            torch.testing.assert_close(found[what], expected[what], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_autocast_computes_as_in_one_process(both: list[dict[str, dict[str, Any]]]) -> None:
    for rank, sides in enumerate(both):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            expected = model_of(OTHERWISE)(input_ids=tiny_input()[rank : rank + 1], use_cache=False).logits
        found = sides["other ways"]["autocast"]["logits"][0]
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
        assert not torch.equal(found, sides[OTHERWISE]["logits"][0])


@pytest.mark.slow
def test_a_policy_that_casts_scales_is_refused(both: list[dict[str, dict[str, Any]]]) -> None:
    """It would round what the file holds."""
    for sides in both:
        assert "scale is [64, 2] torch.bfloat16, needed [64, 2] torch.float16" in sides["other ways"]["refused"]
