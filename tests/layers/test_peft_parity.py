"""The same adapter gives the same logits here and in PEFT, on every family."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from strop.layers import surgery
from tests.tiny import FAMILIES, tiny_input, tiny_model

# PEFT asks transformers by a name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_pefts_with_the_same_adapter(family, rank_stabilised):
    ours, theirs = tiny_model(family), tiny_model(family)
    names = surgery.attach_lora(ours, rank=4, alpha=8.0, rank_stabilised=rank_stabilised)
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=suffixes, use_rslora=rank_stabilised, fan_in_fan_out=family == "gpt2"
    )
    peft_model = get_peft_model(theirs, config).eval()
    generator = torch.Generator().manual_seed(0)
    matched = 0
    for name, module in peft_model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and name in names:
            adapter = surgery.lora_modules(ours)[name]
            adapter.lora_B.data.normal_(std=0.1, generator=generator)
            module.lora_A["default"].weight.data.copy_(adapter.lora_A)
            module.lora_B["default"].weight.data.copy_(adapter.lora_B)
            matched += 1
    assert matched == len(names)
    with torch.no_grad():
        plain, a, b = (model(tiny_input()).logits for model in (tiny_model(family), ours, peft_model))
    assert torch.allclose(a, b, atol=1e-5)
    assert not torch.allclose(a, plain, atol=1e-2)
