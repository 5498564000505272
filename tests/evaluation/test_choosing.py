"""Tokens drawn: as often as they should be, from the set that top_p leaves, each row for itself."""

from __future__ import annotations

import pytest
import torch
from transformers import TopPLogitsWarper

from strop.evaluation.choosing import choose_tokens, text_generator


def test_the_likeliest_is_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -1.0, 5.0]])
    assert choose_tokens(logits, [], temperature=0).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    logits, rows = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf]), 4000
    generator = text_generator(1, 0)
    drawn = choose_tokens(logits.expand(rows, -1), [generator] * rows, temperature=temperature)
    counts = torch.bincount(drawn, minlength=5)
    expected = rows * torch.softmax(logits / temperature, dim=-1)
    assert counts[4] == 0
    assert ((counts - expected)[:4] ** 2 / expected[:4]).sum() < 16.3  # chi-square, 3 degrees: 1 in 1000


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_only_what_top_p_leaves_is_drawn_and_all_of_it(top_p: float) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    kept = (
        torch.isfinite(TopPLogitsWarper(top_p)(torch.LongTensor(), torch.FloatTensor(logits))).nonzero()[:, 1].tolist()
    )
    generator = text_generator(7, 0)
    drawn = choose_tokens(logits.expand(20000, -1), [generator] * 20000, temperature=1.0, top_p=top_p)
    assert sorted(set(drawn.tolist())) == kept


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))

    def draw(rows: list[int]) -> list[int]:
        return choose_tokens(logits[rows], [text_generator(9, row) for row in rows], temperature=1.0).tolist()

    together = draw([0, 1, 2, 3, 4])
    assert [draw([row])[0] for row in range(5)] == together
    assert draw([3, 1]) == [together[3], together[1]]


def test_texts_and_seeds_draw_apart() -> None:
    first = [torch.rand(1, generator=text_generator(seed, place)).item() for seed in range(4) for place in range(50)]
    assert len(set(first)) == len(first)
    assert text_generator(-3, 0).initial_seed() != text_generator(3, 0).initial_seed()
