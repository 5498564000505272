"""A real model, stories260K: opens, writes fluent text, and loses to rounding in the known order."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from strop.errors import FormatError
from strop.models import OpenedModel, load

STORY_WORDS = {"the", "a", "and", "to", "was", "she", "he", "they", "her", "his", "day", "it", "in", "with", "said"}


def _nll(opened: OpenedModel, text: str) -> float:
    """Mean negative log-likelihood in nats per token, over windows of 256 tokens."""
    ids = opened.require_tokenizer()(text, add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    bos = torch.full((len(windows), 1), opened.model.config.bos_token_id)
    with torch.no_grad():
        logits = opened.model(torch.cat([bos, windows], dim=1)[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1), windows.flatten()).item()


@pytest.fixture(scope="module")
def text(material) -> str:
    return (material / "data" / "tinystories_4M_lowercase.txt").read_text(encoding="utf-8")[:12_000]


def test_it_writes_fluent_text(material):
    opened = load(material / "models" / "stories260K")
    tokenizer = opened.require_tokenizer()
    prompt = tokenizer("Once upon a time, there was a little girl", return_tensors="pt")
    ids = opened.model.generate(**prompt, max_new_tokens=80, do_sample=False)
    words = tokenizer.decode(ids[0], skip_special_tokens=True).split()
    known = sum(word.strip(".,!?\"'").lower() in STORY_WORDS for word in words)
    assert len(words) > 30
    assert known / len(words) > 0.25


def test_likelihood_is_the_models_and_rounding_costs_in_order(material, text):
    folder = material / "models" / "stories260K"
    exact = _nll(load(folder), text)
    assert 2.2 < exact < 3.0  # 2.73 on the whole file, 2.39 on its beginning
    int8, int4, int3, int2 = (_nll(load(folder, form), text) for form in ("int8", "int4", "int3", "int2"))
    assert abs(int8 - exact) < 0.01
    assert exact < int4 < int3 < int2
    assert int4 - exact < 0.4


def test_a_width_of_172_is_refused_for_groups_of_32_layer_by_layer(material):
    with pytest.raises(FormatError, match=r"layers\.4\.mlp\.down_proj: in_features 172 .* use 2, 4 or 43"):
        load(material / "models" / "stories260K", "int4-g32")
