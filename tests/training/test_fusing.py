"""Blocks as one piece against transformers' own: gradients, masks, methods, memory, and what keeps its own forward."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from strop import kernels
from strop.data.batches import Batch, padded_batch
from strop.layers import fused_block
from strop.layers.block_products import TILE_VALUES, Operands, Part, Product
from strop.layers.fused_block import FusedBlock, Seen
from strop.layers.lora_linear import LoraLinear
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import attach_lora, block_lists, detach_lora, quantize_linears
from strop.memory import PeakMemory, release_unused_memory, steady_allocation
from strop.numerics.scheme import parse_scheme
from strop.training.fusing import find_fused, fused_blocks, in_one_piece, probe_inputs
from strop.training.losses import find_head, token_loss_sum
from strop.training.metrics import read_metrics
from tests.fresh import in_fresh_process
from tests.tiny import FAMILIES, tiny_config, tiny_model
from tests.training.helpers import KINDS, Notes, prepared, ragged_samples, run_loop, stream_of

needs_kernels = pytest.mark.skipif(kernels.in_use().name == "reference", reason=kernels.in_use().reason)

pytestmark = needs_kernels


def model_of(family: str, *, attention: str = "sdpa", **changes: Any) -> nn.Module:
    """A tiny model whose norms and biases are no ones and zeros, so that a lost one shows."""
    common = tiny_config("llama").to_dict() | {"attention_dropout": 0.0} | changes
    common = {key: value for key, value in common.items() if key not in ("model_type", "architectures", "head_dim")}
    extra = {"mistral": {"sliding_window": 6}, "qwen3": {"head_dim": 24}}.get(family, {})
    config = AutoConfig.for_model(family, **(common | extra))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return max(([*found] for found in block_lists(model)), key=len)


def fused_of(model: nn.Module, batch: Batch | None = None) -> dict[int, FusedBlock]:
    batch = batch or padded_batch(ragged_samples(3), range(3), pad_id=0)
    return find_fused(model, blocks_of(model), probe_inputs(batch))


def batch_of(model: Any, kind: str) -> Batch:
    samples = ragged_samples(7)
    if kind == "one row":
        return padded_batch(samples, [2], pad_id=0)
    if kind == "packed":
        return stream_of(samples, model, packing=True, batch_size=2).next_step()[0]
    return padded_batch(samples, range(4), pad_id=0)


def gradients(model: nn.Module, batch: Batch, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, count = token_loss_sum(model, batch)
    (loss / count).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach()}


def both(model: nn.Module, batch: Batch, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By transformers' blocks, and as one piece."""
    own = gradients(model, batch, **options)
    blocks, fused = blocks_of(model), fused_of(model, batch)
    assert len(fused) == len(blocks)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the call went to the block's own forward")

    for one in fused.values():
        one.own = refuse
    with in_one_piece(blocks, fused):
        return own, gradients(model, batch, **options)


def assert_alike(own: dict[str, Tensor], ours: dict[str, Tensor], tolerance: float) -> None:
    assert own.keys() == ours.keys()
    for name, expected in own.items():
        error = float((expected - ours[name]).norm()) / (float(expected.norm()) + 1e-12)
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["one row", "padded", "packed"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_all_gradients_are_those_of_transformers(family, kind, attention):
    model = model_of(family, attention=attention)
    own, ours = both(model.requires_grad_(True), batch_of(model, kind))
    assert_alike(own, ours, 2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_in_bfloat16_they_differ_by_its_rounding(family):
    """Both are compared with float32: ours is no further away than transformers' own, with a quarter to spare."""
    model = model_of(family, num_hidden_layers=4).requires_grad_(True)
    batch = batch_of(model, "padded")
    exact = gradients(model, batch)
    own, ours = both(model, batch, dtype=torch.bfloat16)

    def distance(found: dict[str, Tensor]) -> float:
        return sum(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact) / len(exact)

    assert distance(ours) < 1.25 * distance(own)


@pytest.mark.parametrize("stretch", [1, 3, 16])
def test_stretches_of_tokens_change_nothing(stretch, monkeypatch):
    monkeypatch.setattr(fused_block, "ROWS_AT_ONCE", stretch)
    model = model_of("mistral").requires_grad_(True)
    own, ours = both(model, batch_of(model, "packed"))
    assert_alike(own, ours, 2e-5)


@pytest.mark.parametrize("tile", [1, 100, 1 << 22])
@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq", "int4-g32", "int8", "int3-g32-asym", "fp8", "int4-tensor"])
def test_adapters_over_quantized_layers(scheme, tile, monkeypatch):
    monkeypatch.setattr("strop.layers.block_products.TILE_VALUES", tile)
    model = model_of("qwen2")
    quantize_linears(model, parse_scheme(scheme))
    attach_lora(model, "all-linear", rank=4, alpha=8, generator=torch.Generator().manual_seed(1))
    for module in model.modules():
        if isinstance(module, LoraLinear):
            nn.init.normal_(module.lora_B, std=0.1)
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    own, ours = both(model, batch_of(model, "padded"))
    assert len(own) == 2 * 7 * 2 + 1
    assert_alike(own, ours, 2e-5)


def test_adapters_on_some_layers_of_some_ranks():
    model = model_of("llama").requires_grad_(False)
    attach_lora(model, ["q_proj", "down_proj"], rank=3, alpha=8, generator=torch.Generator().manual_seed(1))
    attach_lora(model, ["v_proj", "up_proj"], rank=5, alpha=7, generator=torch.Generator().manual_seed(2))
    for module in model.modules():
        if isinstance(module, LoraLinear):
            nn.init.normal_(module.lora_B, std=0.1)
    own, ours = both(model, batch_of(model, "padded"))
    assert len(own) == 2 * 4 * 2 + 1
    assert_alike(own, ours, 2e-5)


def test_an_adapter_that_is_switched_off_is_not_there():
    model = prepared("lora")
    batch, blocks = batch_of(model, "padded"), blocks_of(model)
    adapters = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for module in adapters:
        nn.init.normal_(module.lora_B)
    with torch.no_grad(), in_one_piece(blocks, fused_of(model, batch)):
        on = model(**batch.inputs()).logits
        for module in adapters:
            module.switched_off = True
        off = model(**batch.inputs()).logits
    assert not torch.allclose(on, off)
    assert torch.allclose(off, tiny_model("llama")(**batch.inputs()).logits, atol=1e-4)


def test_layers_that_were_replaced_since_go_to_the_block():
    """An adapter that comes later must not be passed by, nor one that left still work."""
    model = model_of("llama").requires_grad_(False)
    batch, blocks = batch_of(model, "one row"), blocks_of(model)
    with torch.no_grad(), in_one_piece(blocks, fused_of(model, batch)):
        plain = model(**batch.inputs()).logits
        attach_lora(model, ["v_proj"], rank=2, alpha=4, generator=torch.Generator().manual_seed(1))
        for module in model.modules():
            if isinstance(module, LoraLinear):
                nn.init.normal_(module.lora_B)
        adapted = model(**batch.inputs()).logits
        assert not any(block.forward.in_place() for block in blocks)
        again = fused_of(model, batch)
        assert len(again) == len(blocks)
        with in_one_piece(blocks, again):
            assert torch.allclose(model(**batch.inputs()).logits, adapted, atol=1e-4)
        detach_lora(model)
        assert torch.equal(model(**batch.inputs()).logits, plain)
    assert not torch.allclose(adapted, plain)


def test_dropout_drops_inputs_of_the_adapter_alone_and_keeps_their_mean():
    """A product is linear in its input: the mean of 2,000 draws is the product without dropout, within 6 errors."""
    layer = LoraLinear(nn.Linear(24, 16), 4, 8.0, dropout=0.4, generator=torch.Generator().manual_seed(0)).train()
    nn.init.normal_(layer.lora_B)
    part = Part.of(layer)
    assert part is not None
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))

    def drawn() -> Tensor:
        with torch.no_grad():
            return Product([Operands.of(part, torch.float32)], torch.float32).forward(x)[0]

    torch.manual_seed(0)
    draws = torch.stack([drawn() for _ in range(2000)])
    torch.manual_seed(0)
    assert torch.equal(drawn(), draws[0])
    assert not torch.equal(draws[0], draws[1])
    with torch.no_grad():
        still, base = layer.eval()(x), layer.base(x)
    assert bool(((draws.mean(0) - still).abs() <= 6 * draws.std(0) / 2000**0.5).all())
    layer.train().switched_off = True
    assert torch.allclose(drawn(), base, atol=1e-6)


def test_the_gradient_through_dropout_is_that_of_the_inputs_that_were_kept():
    """Against a difference quotient: the same seed drops the same inputs."""
    model = prepared("lora", dropout=0.5)
    batch, blocks = batch_of(model, "one row"), blocks_of(model)
    adapter = next(module for module in model.modules() if isinstance(module, LoraLinear))
    for module in model.modules():
        if isinstance(module, LoraLinear):
            nn.init.normal_(module.lora_B, std=0.1)
    fused = fused_of(model, batch)
    model.train()

    def loss() -> Tensor:
        torch.manual_seed(5)
        return token_loss_sum(model, batch)[0]

    with in_one_piece(blocks, fused):
        loss().backward()
        for parameter in (adapter.lora_A, adapter.lora_B):
            assert parameter.grad is not None
            direction = parameter.grad / parameter.grad.norm()
            with torch.no_grad():
                parameter.add_(direction, alpha=1e-2)
                above = float(loss())
                parameter.sub_(direction, alpha=2e-2)
                below = float(loss())
                parameter.add_(direction, alpha=1e-2)
            assert (above - below) / 2e-2 == pytest.approx(float(parameter.grad.norm()), rel=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_the_same_as_without(kind, tmp_path):
    """Losses of six steps within 1e-4 of each other; a low-bit code may tip over, which moves them a little more."""
    losses, pieces = [], []
    for name in ("fused", "own"):
        model, seen = prepared(kind), set[bool]()

        def look(_: int, model: nn.Module = model, seen: set[bool] = seen) -> None:
            seen.update("forward" in vars(block) for block in blocks_of(model))

        with contextlib.ExitStack() as stack:
            if name == "own":
                stack.enter_context(kernels.forced("reference"))
            run_loop(model, tmp_path / name, reporter=Notes(look))
        pieces.append(seen)
        losses.append([row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row])
    assert pieces == [{kind != "qat-lora"}, {False}]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if "qat" in kind else 1e-4)


@pytest.mark.parametrize("family", [name for name in (*FAMILIES, "qwen3_moe") if name not in ("llama", "qwen3")])
def test_other_blocks_keep_their_own_forward(family):
    """Another norm, another activation, learned positions, one product for three, experts."""
    assert fused_of(tiny_model(family)) == {}


def altered(change: Callable[[nn.Module], None]) -> nn.Module:
    model = model_of("llama")
    change(blocks_of(model)[1])
    return model


def another_activation(block: Any) -> None:
    block.mlp.act_fn = nn.GELU(approximate="tanh")


def gate_and_up_swapped(block: Any) -> None:
    """Called in the other order: the first of both is the gate here."""
    mlp = block.mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.gate_proj(x) * mlp.act_fn(mlp.up_proj(x)))


def one_more_parameter(block: Any) -> None:
    block.sinks = nn.Parameter(torch.zeros(4))


def random_numbers(block: Any) -> None:
    block.self_attn.attention_dropout = 0.1


def a_factor(block: Any) -> None:
    own = block.mlp.forward
    block.mlp.forward = lambda x: own(x) * 1.001


@pytest.mark.parametrize(
    "change", [another_activation, gate_and_up_swapped, one_more_parameter, random_numbers, a_factor]
)
def test_a_block_that_computes_something_else_is_found_out(change):
    assert list(fused_of(altered(change))) == [0]


def test_a_call_with_a_cache_or_weights_in_its_mask_goes_to_the_block():
    model = model_of("llama")
    batch, blocks = batch_of(model, "one row"), blocks_of(model)
    ids = batch.input_ids
    with torch.no_grad():
        plain = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).logits
        weighs = torch.zeros(1, 1, ids.shape[1], ids.shape[1]).masked_fill_(
            torch.ones(ids.shape[1:] * 2).triu(1) > 0, -9
        )
        biased = model(input_ids=ids, attention_mask=weighs, use_cache=False).logits
        with in_one_piece(blocks, fused_of(model, batch)):
            cache = DynamicCache(config=model.config)
            assert torch.equal(model(input_ids=ids, past_key_values=cache).logits, plain)
            assert cache.get_seq_length() == ids.shape[1]
            assert torch.equal(model(input_ids=ids, attention_mask=weighs, use_cache=False).logits, biased)
    assert "forward" not in vars(blocks[0])


@pytest.mark.parametrize("part", ["self_attn.q_proj", "self_attn", "mlp.down_proj", "input_layernorm"])
def test_a_hook_inside_a_block_is_called(part):
    """What one piece computes makes no call of a layer: while somebody waits for one, the block makes them."""
    model = model_of("llama")
    batch, blocks = batch_of(model, "one row"), blocks_of(model)
    with torch.no_grad():
        plain = model(**batch.inputs()).logits
        with in_one_piece(blocks, fused_of(model, batch)):
            calls: list[nn.Module] = []
            handle = blocks[1].get_submodule(part).register_forward_hook(lambda module, *_: calls.append(module))
            assert torch.allclose(model(**batch.inputs()).logits, plain, atol=1e-4)
            assert len(calls) == 1
            handle.remove()
            model(**batch.inputs())
            assert len(calls) == 1


def test_a_forward_that_a_layer_inside_was_given_since_is_called():
    model = model_of("llama")
    batch, blocks = batch_of(model, "one row"), blocks_of(model)
    with torch.no_grad(), in_one_piece(blocks, fused_of(model, batch)):
        plain = model(**batch.inputs()).logits
        mlp: Any = blocks[1].get_submodule("mlp")
        mlp.forward = torch.zeros_like
        assert not torch.allclose(model(**batch.inputs()).logits, plain, atol=1e-2)
        del mlp.forward
        assert torch.equal(model(**batch.inputs()).logits, plain)


def test_a_block_that_scales_queries_beyond_some_length_is_found_out():
    """The scale is one for as many tokens as the probe has."""
    rope = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "llama_4_scaling_beta": 0.5,
    }  # fmt: skip
    assert fused_of(model_of("ministral3", head_dim=8, max_position_embeddings=256, rope_parameters=rope)) == {}


@pytest.mark.parametrize("kind", ["one row", "padded", "packed"])
def test_in_inference_mode_it_is_the_same(kind):
    """Tensors made there have no version by which a mask is known again."""
    model = model_of("mistral")
    batch, blocks = batch_of(model, kind), blocks_of(model)
    fused = fused_of(model, batch)
    with torch.inference_mode():
        own = model(**batch.inputs()).logits
        with in_one_piece(blocks, fused):
            found = model(**batch.inputs()).logits
    assert torch.allclose(found, own, atol=1e-4)


def test_a_mask_changed_in_inference_mode_is_read_again():
    with torch.inference_mode():
        mask = torch.ones(1, 1, 4, 4).bool().tril()
        before = fused_block._MASKS.seen(mask)
        mask[0, 0, 3, 0] = False
        after = fused_block._MASKS.seen(mask)
    assert before is not None
    assert after is not None
    assert (int(before.first[0, 3]), int(after.first[0, 3])) == (0, 1)


def test_a_second_derivative_is_refused():
    """There is no graph inside; what it would leave out must not pass for zero."""
    model = model_of("llama", attention="eager").requires_grad_(True)
    batch, blocks = batch_of(model, "one row"), blocks_of(model)
    x = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()  # pyright: ignore[reportCallIssue]
    with in_one_piece(blocks, fused_of(model, batch)):
        y = model(inputs_embeds=x, use_cache=False).logits.square().sum()
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(y, x, create_graph=True)


def test_masks_that_are_stretches_and_those_that_are_not():
    causal = torch.ones(2, 1, 5, 5).bool().tril()
    seen = Seen.of(causal)
    assert seen is not None
    assert torch.equal(seen.last, Seen.causal(2, 5).last)
    assert torch.equal(seen.first, Seen.causal(2, 5).first)
    hole = causal.clone()
    hole[1, 0, 4, 2] = False
    assert Seen.of(hole) is None
    lowest = torch.zeros(2, 1, 5, 5).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert Seen.of(lowest) is not None
    assert Seen.of(lowest.masked_fill(~causal, -5.0)) is None
    nothing = causal.clone()
    nothing[0, 0, 3] = False
    blind = Seen.of(nothing)
    assert blind is not None
    assert int(blind.last[0, 3]) < int(blind.first[0, 3])
    assert Seen.of(causal[0]) is None


def test_the_model_is_as_it_was_before_and_after(tmp_path):
    model = prepared("lora")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stream, training = stream_of(ragged_samples(), model), model.training
    place, state = stream.state_dict(), torch.get_rng_state()
    with fused_blocks(model, stream):
        assert all("forward" in vars(block) for block in blocks_of(model))
    assert stream.state_dict() == place
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == training
    assert all("forward" not in vars(block) and not block._forward_hooks for block in blocks_of(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_reference_can_be_forced():
    with kernels.forced("reference"):
        assert fused_of(model_of("llama")) == {}


def peaks_by_length() -> list[int]:
    """Peak bytes of a forward and backward pass over 2,048 and 8,192 tokens, the head left out."""
    model = model_of("llama", max_position_embeddings=8192).requires_grad_(False)
    attach_lora(model, "all-linear", rank=2, alpha=4, generator=torch.Generator().manual_seed(1))
    fused, blocks = fused_of(model), blocks_of(model)
    assert len(fused) == len(blocks)
    peaks = []
    with steady_allocation(), in_one_piece(blocks, fused):
        for length in (512, 2048, 8192):
            ids = torch.randint(5, 300, (1, length))
            release_unused_memory()
            with PeakMemory() as memory:
                model.model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
            peaks.append(memory.peak_bytes)
    return peaks[1:]


def test_memory_grows_with_the_length_and_not_with_its_square():
    """A row four times as long takes four times the memory, a fifth to spare; scores alone would take sixteen times."""
    short, long = in_fresh_process(peaks_by_length)
    assert long < 1.2 * 4 * short


def test_quantized_weights_are_not_dense_as_a_whole():
    """A product over a quantized layer makes no more of it dense than a tile."""
    layer = nn.Linear(512, 4096, bias=False)
    holder = nn.ModuleDict({"a": layer})
    quantize_linears(holder, parse_scheme("nf4"))
    part = Part.of(holder["a"])
    assert part is not None
    assert isinstance(part.base, QuantLinear)
    product = Product([Operands.of(part, torch.bfloat16)], torch.bfloat16)
    rows = [len(weight) for _, weight in product.tiles()]
    assert sum(rows) == 4096
    assert max(rows) * 512 <= TILE_VALUES


def test_probing_is_on_a_copy():
    model = prepared("lora")
    before = copy.deepcopy(model.state_dict())
    assert fused_of(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_head_and_blocks_together_are_the_loss_of_the_model():
    model = model_of("llama").requires_grad_(True)
    batch = batch_of(model, "padded")
    own = gradients(model, batch)
    head = find_head(model, batch)
    assert head is not None
    with in_one_piece(blocks_of(model), fused_of(model, batch)):
        model.zero_grad(set_to_none=True)
        loss, count = token_loss_sum(model, batch, head=head)
        (loss / count).backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}
    assert_alike(own, ours, 2e-5)
