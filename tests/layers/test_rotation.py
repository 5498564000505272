"""Rotating the residual stream leaves the model's function as it was, or the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from strop.errors import ModelError
from strop.layers.rotation import rotate_residual
from strop.methods.hadamard import randomized_hadamard
from strop.models import load
from tests.tiny import tiny_input, tiny_model


def rotation(size: int = 64):
    return randomized_hadamard(size, torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_input(seed=3)).logits


def spread_gains(model: nn.Module) -> None:
    """Gains away from one, so that leaving them behind would show."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "norm" in name:
                parameter += torch.rand(parameter.shape, generator=generator)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_rotated_model_gives_the_same_logits_with_other_weights(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    spread_gains(model)
    before, weights = logits(model), {name: part.clone() for name, part in model.state_dict().items()}
    rotate_residual(model, rotation())
    assert (logits(model) - before).abs().max() < 1e-4 * before.abs().max()
    linear = [name for name, part in weights.items() if part.ndim == 2]
    changed = [name for name in linear if not torch.equal(model.state_dict()[name], weights[name])]
    assert changed == linear
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["demo", "stories260K"])
def test_real_models_can_be_rotated(name: str, material: Path) -> None:
    opened = load(name if name == "demo" else material / "models" / name, dtype="float32")
    hidden = opened.model.config.hidden_size
    tokens = torch.arange(5, 69).view(2, 32)
    with torch.no_grad():
        before = opened.model(tokens).logits
        rotate_residual(opened.model, rotation(hidden))
        after = opened.model(tokens).logits
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("gpt2", "no norm by the root mean square"),
        ("falcon", "no norm by the root mean square"),
        ("mixtral", "no linear layer takes what .*post_attention_layernorm"),
    ],
)
def test_models_whose_stream_is_another_kind_are_refused_and_left_alone(family: str, said: str) -> None:
    model = tiny_model(family)
    weights = {name: part.clone() for name, part in model.state_dict().items()}
    with pytest.raises(ModelError, match=f"cannot rotate: .*{said}"):
        rotate_residual(model, rotation())
    assert all(torch.equal(part, weights[name]) for name, part in model.state_dict().items())


def test_a_model_that_reads_its_stream_elsewhere_is_put_back() -> None:
    """The head's output depends on one feature of the stream: all adds up in the run, and the logits tell."""
    model = tiny_model("llama", tie_word_embeddings=True)
    spread_gains(model)
    model.lm_head.register_forward_hook(lambda module, args, output: output + args[0][..., :1])
    weights = {name: part.clone() for name, part in model.state_dict().items()}
    with pytest.raises(ModelError, match="something else reads or writes"):
        rotate_residual(model, rotation())
    assert all(torch.equal(part, weights[name]) for name, part in model.state_dict().items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


def test_other_sizes_and_dtypes_are_refused() -> None:
    with pytest.raises(ModelError, match="a rotation of 32 features for a hidden size of 64"):
        rotate_residual(tiny_model("llama"), rotation(32))
    with pytest.raises(ModelError, match="not all in float32"):
        rotate_residual(tiny_model("llama").bfloat16(), rotation())
