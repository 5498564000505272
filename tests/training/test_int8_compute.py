"""Products of the frozen base in int8: what they compute, which blocks keep them, and what a run says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from strop.config import TuneConfig
from strop.errors import ConfigError
from strop.files.folders import read_json
from strop.kernels import block as kernels
from strop.layers.block_products import Operands, Part, Product
from strop.layers.fused_block import FusedBlock
from strop.layers.int8_products import Int8Weight, int8_is_exact
from strop.layers.quant_linear import QuantLinear
from strop.numerics import parse_scheme, quantize_tensor
from strop.recipes.session import open_session
from strop.recipes.tune import tune
from strop.training.int8_compute import LEAST_COSINE, use_int8
from tests.tiny import tiny_chat_file, tiny_folder

pytestmark = pytest.mark.skipif(not int8_is_exact(), reason="no native kernels, or int8 products saturate here")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def linear(outputs: int, inputs: int, scheme: str | None) -> nn.Module:
    weight = random(outputs, inputs) * (1 + torch.arange(outputs)[:, None] / 8)
    if scheme is not None:
        return QuantLinear(quantize_tensor(weight, parse_scheme(scheme)))
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def operands(layers: list[nn.Module], dtype: torch.dtype) -> list[Operands]:
    parts = [Part.of(layer) for layer in layers]
    return [Operands.of(part, dtype) for part in parts if part is not None]


def on_a_grid(x: Tensor) -> Tensor:
    """Rows of x rounded to 255 steps of their own."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (x / scale).round() * scale


@pytest.mark.parametrize("scheme", [None, "nf4", "int4-g32"])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 64, (32,)), (33, 96, (31, 17)), (70, 160, (64, 32, 96))])
def test_both_ways_are_products_of_rounded_rows(scheme, tokens, inputs, outputs):
    if scheme is not None and inputs % 64:
        inputs = 128
    layers = [linear(count, inputs, scheme) for count in outputs]
    given = operands(layers, torch.float32)
    held = Int8Weight.of(given)
    assert held is not None
    dense = torch.cat([layer.qtensor.dequantize() if scheme else layer.weight for layer in layers])
    weight = held.codes * held.scale[:, None]
    assert torch.equal(held.scale, dense.abs().amax(-1) / 127)
    assert ((weight - dense).abs() <= 0.50001 * held.scale[:, None]).all()
    x, grad = random(tokens, inputs, seed=1), random(tokens, sum(outputs), seed=2)
    product = Product(given, torch.float32, held)
    y, _ = product.forward(x)
    torch.testing.assert_close(y, on_a_grid(x) @ weight.t(), rtol=1e-4, atol=1e-3)
    back = product.backward(grad, []).x
    torch.testing.assert_close(back, on_a_grid(grad * held.scale) @ held.codes.float(), rtol=1e-4, atol=1e-3)
    assert held.nbytes == sum(outputs) * (inputs + 4)


def test_what_is_not_finite_spoils_its_row_alone():
    held = Int8Weight.of(operands([linear(16, 64, None)], torch.float32))
    assert held is not None
    for bad in (torch.nan, torch.inf):
        x = random(3, 64)
        x[1, 5] = bad
        y = torch.empty(3, 16)
        held.forward(x, y)
        assert y.isnan().any(-1).tolist() == [False, True, False]
        grad = random(3, 16)
        grad[1, 0] = bad
        assert held.backward(grad).isnan().any(-1).tolist() == [False, True, False]
    assert not held.backward(torch.zeros(2, 16)).any()


def test_trained_weights_have_no_codes():
    layer = nn.Linear(32, 8)
    assert Int8Weight.of(operands([layer, linear(8, 32, None)], torch.float32)) is None


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_rounded_alike_whatever_the_threads(threads):
    x, before = random(300, 257).bfloat16(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        codes, scale = kernels.round_rows(x, None)
    finally:
        torch.set_num_threads(before)
    wide = x.float()
    assert torch.equal(scale, wide.abs().amax(-1) / 127)
    assert (codes - (wide / scale[:, None]).round()).abs().max() <= 1


# --- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_file(tmp_path_factory.mktemp("data") / "chats.jsonl", rows=16)


def config(base: Path, data: Path, **settings: Any) -> TuneConfig:
    given = {"method": "lora", "dtype": "float32", "compute": "int8", "valid_fraction": 0.25}
    return TuneConfig.from_flat({"model": str(base), "data": str(data), **given, **settings})


def pieces(model: nn.Module) -> list[FusedBlock]:
    return [block.forward for block in model.modules() if isinstance(vars(block).get("forward"), FusedBlock)]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_sound_blocks_multiply_in_int8_in_training_alone(tmp_path, data, method):
    base = tiny_folder(tmp_path, "llama")
    session = open_session(config(base, data, method=method))
    assert session.int8 is not None
    assert session.int8.blocks == (0, 1)
    assert session.int8.cosine is not None
    assert session.int8.cosine >= LEAST_COSINE
    held = [weight for piece in pieces(session.model) for weight in piece.int8 or ()]
    assert session.int8.nbytes == sum(weight.nbytes for weight in held if weight is not None) > 0
    batch = session.stream.next_step()[0]
    model = session.model
    results = {}
    with torch.no_grad():
        for training in (False, True):
            results[training] = model.train(training)(**batch.inputs()).logits
        for piece in pieces(model):
            piece.int8 = None
        own = model.train()(**batch.inputs()).logits
    assert torch.equal(results[False], own)
    assert not torch.equal(results[True], own)
    assert float(functional.cosine_similarity(results[True].flatten(), own.flatten(), dim=0)) > 0.999


def test_a_block_with_outliers_keeps_its_products(tmp_path, data):
    base = tiny_folder(tmp_path, "llama", num_hidden_layers=4)
    session = open_session(config(base, data, compute="bf16"))
    model = session.model
    with torch.no_grad():  # a few inputs of the second block's layers are a thousand times as large, and hardly used
        block = model.model.layers[1]
        for norm, layers in (
            (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
            (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
        ):
            norm.weight[:3] *= 1000
            for layer in layers:
                getattr(layer, "base", layer).weight[:, :3] /= 1000
    found = use_int8(model, session.stream, torch.float32)
    assert found.kept == (1,)
    assert found.blocks == (0, 2, 3)
    assert [piece.int8 is not None for piece in pieces(model)] == [True, False, True, True]
    assert "blocks 1 keep the base's products" in found.line()


def test_a_run_says_what_it_computed_in_int8_and_resumes_bit_for_bit(tmp_path, data):
    base = tiny_folder(tmp_path, "llama")
    settings = {"max_steps": 4, "batch_size": 2, "save_steps": 2, "learning_rate": 1e-2}
    common = {"method": "lora", "dtype": "float32", "compute": "int8", "valid_fraction": 0.25}
    whole = tune(base, data, output=tmp_path / "whole", **common, **settings)
    report = read_json(whole.path / "run.json")
    assert report["int8"]["blocks"] == [0, 1]
    assert report["int8"]["cosine"] >= LEAST_COSINE
    with pytest.raises(KeyboardInterrupt):
        tune(base, data, output=tmp_path / "cut", reporter=_Stop(3), **common, **settings)
    again = tune(base, data, output=tmp_path / "cut", resume=True, **common, **settings)
    for folder in ("best", "last"):
        one, other = ((run.path / folder / "adapter_model.safetensors").read_bytes() for run in (whole, again))
        assert one == other


class _Stop:
    """Ctrl-C while a step is under way."""

    def __init__(self, step: int) -> None:
        self.left, self.training = step, False

    def note(self, text: str) -> None: ...

    def start(self, title: str, total: float | None, unit: str) -> None:
        self.training = title == "training"

    def advance(self, done: float, **fields: float | int | str) -> None:
        if self.training:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    def finish(self) -> None: ...


@pytest.mark.parametrize(("method", "more"), [("full", {}), ("qat-lora", {"format": "int4-g32"})])
def test_it_is_refused_where_no_base_is_frozen(method, more):
    with pytest.raises(ConfigError, match="compute: int8 multiplies by a frozen base"):
        TuneConfig.from_flat({"model": "m", "data": "d", "method": method, "compute": "int8", **more})


def test_a_model_without_such_blocks_trains_on_and_says_so(tmp_path, data):
    session = open_session(config(tiny_folder(tmp_path, "gpt2"), data))
    assert session.int8 is not None
    assert session.int8.blocks == ()
    assert "no block of this model runs as one piece" in session.int8.line()
