"""Blocks that write in one call: transformers' tokens on every instruction set, and what is left alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from strop import kernels
from strop.evaluation import by_transformers
from strop.evaluation.decoding import Decoder, decodes
from strop.evaluation.generation import generate_answers
from strop.evaluation.steps import find_steps, in_steps
from strop.evaluation.writing import Manner, write_texts
from strop.layers.surgery import attach_lora, block_lists, detach_lora, quantize_linears
from strop.numerics.scheme import parse_scheme
from tests.tiny import tiny_config, tiny_tokenizer

INSTRUCTION_SETS = kernels.in_use().runnable

pytestmark = pytest.mark.skipif(kernels.in_use().name == "reference", reason=kernels.in_use().reason)


@pytest.fixture(params=INSTRUCTION_SETS or [None], ids=str)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.forced(request.param):
        yield request.param


def model_of(family: str = "llama", text: str | None = "int4-g32", **changes: Any) -> Any:
    """A tiny model whose norms and biases are no ones and zeros, its linear layers rounded; None leaves them."""
    common = tiny_config("llama").to_dict() | changes
    common = {key: value for key, value in common.items() if key not in ("model_type", "architectures", "head_dim")}
    extra = {"qwen3": {"head_dim": 24}}.get(family, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(common | extra))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "embed" not in name:
                parameter.mul_(6.0)  # so that what blocks do decides the next token
    if text is not None:
        quantize_linears(model, parse_scheme(text))
    return model


def prompts(rows: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(rows)
    vocabulary = tiny_config("llama").vocab_size
    return [torch.randint(vocabulary, (3 + 2 * row,), generator=generator).tolist() for row in range(rows)]


def written(model: Any, asked: list[list[int]], new: int = 12) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    with in_steps(model):
        for step in write_texts(model, asked, Manner((), new, None, len(asked))):
            for one in step:
                found.setdefault(one.place, []).append(one.token)
    return found


def by_generate(model: Any, asked: list[list[int]], new: int = 12) -> dict[int, list[int]]:
    manner = Manner((), new, None, 1)
    return {
        place: tokens
        for batch in by_transformers.write_batches(model, asked, manner, None, 0)
        for place, tokens in batch
    }


def one_step(model: Any, asked: list[list[int]], *, steps: bool) -> Tensor:
    """The logits after one written token of each text."""
    with in_steps(model) if steps else torch.inference_mode():
        decoder = Decoder(model, len(asked))
        decoder.read(asked)
        return decoder.write(torch.arange(len(asked)))


@pytest.mark.parametrize("rows", [1, 3, 5, 8])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_texts_are_those_of_transformers_in_float32(instruction_set: str, family: str, rows: int) -> None:
    model, asked = model_of(family), prompts(rows)
    assert len(find_steps(model)) == len(block_lists(model)[0])
    assert written(model, asked) == by_generate(model, asked)


@pytest.mark.parametrize("text", ["int8", "int4-g64-asym", "nf4", "int3-g32", "int4-tensor-asym"])
def test_a_step_gives_the_logits_of_the_blocks_own_forward(instruction_set: str, text: str) -> None:
    model = model_of("qwen2", text)
    assert find_steps(model)
    for rows in (1, 2, 4, 6, 9):
        own, ours = (one_step(model, prompts(rows), steps=steps) for steps in (False, True))
        assert apart(ours, own) < 1e-5, rows


@pytest.mark.parametrize("text", ["int8", "int4-g64-asym", "nf4"])
def test_a_step_in_bfloat16_is_as_near_to_float32_as_the_blocks_own_forward(instruction_set: str, text: str) -> None:
    model = model_of("qwen2", text).bfloat16()
    assert find_steps(model)
    counts = (1, 2, 4, 6, 9)
    found = [[one_step(model, prompts(rows), steps=steps) for rows in counts] for steps in (False, True)]
    model.float()
    exact = torch.cat([one_step(model, prompts(rows), steps=False) for rows in counts])
    own, ours = (apart(torch.cat(logits), exact) for logits in found)
    assert 0 < ours < 1.5 * own


def apart(found: Tensor, expected: Tensor) -> float:
    """The root mean square of the difference, relative to the spread of what is expected."""
    return float((found.double() - expected).norm() / (expected.double() - expected.mean()).norm())


@pytest.mark.parametrize("rows", [1, 4])
def test_the_number_of_threads_changes_no_bit(instruction_set: str, rows: int) -> None:
    model, before = model_of("llama", hidden_size=256, intermediate_size=512), torch.get_num_threads()
    step = find_steps(model)[0].step
    generator = torch.Generator().manual_seed(0)
    heads, size, columns = model.config.num_key_value_heads, 256 // model.config.num_attention_heads, 300
    x, cos, sin = (torch.randn(rows, width, generator=generator) for width in (256, size, size))
    cache = torch.randn(2, rows, columns, heads, size, generator=generator)
    index = torch.arange(rows) * columns + columns - 1 - torch.arange(rows)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(step(x, cos, sin, cache[0].clone(), cache[1].clone(), index))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_text_does_not_depend_on_those_beside_it() -> None:
    model, asked = model_of(), prompts(4)
    together = one_step(model, asked, steps=True)
    for row, prompt in enumerate(asked):
        with in_steps(model):
            decoder = Decoder(model, 1)
            decoder.read([prompt])
            alone = decoder.write(torch.tensor([row]))
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)


def test_the_cache_grows_while_texts_are_written() -> None:
    model, asked = model_of(max_position_embeddings=256), prompts(2)
    assert written(model, asked, 90) == by_generate(model, asked, 90)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "gelu"}, {"text": None}, {"text": "nf4-dq"}, {"family": "gemma2", "head_dim": 16}],
    ids=str,
)
def test_blocks_of_another_kind_keep_their_forward(changes: dict[str, Any]) -> None:
    model, asked = model_of(**changes), prompts(2)
    assert find_steps(model) == {}
    if decodes(model, 40):
        assert written(model, asked) == by_generate(model, asked)


def test_a_block_with_an_adapter_keeps_its_forward_until_it_is_gone() -> None:
    model = model_of()
    layers = len(find_steps(model))
    attach_lora(model, "q_proj", rank=2, alpha=4.0)
    assert find_steps(model) == {}
    detach_lora(model)
    assert len(find_steps(model)) == layers > 0


def test_a_layer_that_changes_is_noticed() -> None:
    model, asked = model_of(), prompts(2)
    before = written(model, asked)
    norms = [module for name, module in model.named_modules() if name.endswith("input_layernorm")]
    with torch.no_grad():
        for norm in norms:
            norm.weight.mul_(-1.0)
    after = written(model, asked)
    assert after == by_generate(model, asked)
    assert after != before


def test_a_hook_inside_a_block_is_called() -> None:
    model, calls = model_of(), list[int]()
    layer: nn.Module = model.model.layers[0].mlp.up_proj
    with in_steps(model):
        decoder = Decoder(model, 1)
        decoder.read(prompts(1))
        decoder.write(torch.tensor([1]))
        handle = layer.register_forward_hook(lambda *_: calls.append(1))
        decoder.write(torch.tensor([2]))
        handle.remove()
        decoder.write(torch.tensor([3]))
    assert calls == [1]


def test_blocks_have_their_own_forward_again_afterwards() -> None:
    model = model_of()
    with in_steps(model):
        assert all("forward" in vars(block) for block in block_lists(model)[0])
    assert not any("forward" in vars(block) for block in block_lists(model)[0])


def test_answers_are_written_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, steps = model_of(), []
    from strop.kernels.step import Step

    own = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, *given: steps.append(1) or own(self, *given))
    find_steps(model)
    tried = len(steps)
    answers = generate_answers(model, tiny_tokenizer(), prompts(2), stop_ids=[], max_new_tokens=5)
    assert len(answers) == 2
    assert len(steps) >= tried + 4 * len(block_lists(model)[0])
