"""Padding by place, steps that can be replayed, every row once an epoch."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.data.batches import Batch, BatchStream, eval_batches, padded_batch
from strop.data.packing import pack, packed_attention
from strop.data.records import Message, Record
from strop.data.samples import prepare
from strop.data.templates import IGNORED, Sample, prompt_ids
from strop.errors import ConfigError, DataError, TrainingError
from tests.tiny import tiny_model, tiny_tokenizer


def make_samples(lengths: list[int]) -> list[Sample]:
    """Samples whose tokens tell which sample they come from; every second token is learned."""
    samples = []
    for index, length in enumerate(lengths):
        ids = [5 + (index * 7 + place) % 290 for place in range(length)]
        labels = [IGNORED if place % 2 == 0 else token for place, token in enumerate(ids)]
        samples.append(Sample(ids, labels, index=index))
    return samples


LENGTHS = st.lists(st.integers(2, 24), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    packing=st.booleans(),
    seed=st.integers(0, 9),
)
def test_every_row_comes_exactly_once_an_epoch_and_no_step_is_a_remnant(
    lengths: list[int], batch_size: int, accumulation: int, packing: bool, seed: int
) -> None:
    samples = make_samples(lengths)
    stream = BatchStream(
        samples, batch_size=batch_size, accumulation=accumulation, packing=packing, max_length=24, seed=seed
    )
    for epoch in range(3):
        assert stream.epoch == epoch
        seen: Counter[int] = Counter()
        sizes = []
        for _ in range(stream.steps_per_epoch):
            step = stream.next_step()
            assert 1 <= len(step) <= accumulation
            assert all(1 <= len(batch.rows) <= batch_size for batch in step)
            sizes.append(sum(len(batch.rows) for batch in step))
            for batch in step:
                for row in batch.rows:
                    seen.update(row)
        assert seen == Counter(range(len(samples)))
        assert sum(sizes) == stream.rows_per_epoch
        assert max(sizes) - min(sizes) <= 1


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, packing=st.booleans())
def test_a_batch_holds_the_tokens_and_labels_of_its_rows(lengths: list[int], packing: bool) -> None:
    samples = make_samples(lengths)
    stream = BatchStream(samples, batch_size=3, packing=packing, max_length=24, seed=1, pad_id=0)
    for _ in range(stream.steps_per_epoch):
        for batch in stream.next_step():
            for place, row in enumerate(batch.rows):
                ids = [token for index in row for token in samples[index].input_ids]
                labels = [label for index in row for label in samples[index].labels]
                count = len(ids)
                assert batch.lengths[place] == count
                assert batch.input_ids[place, :count].tolist() == ids
                assert batch.labels[place, :count].tolist() == labels
                assert (batch.labels[place, count:] == IGNORED).all()
                assert (batch.input_ids[place, count:] == 0).all()
            assert batch.supervised_tokens == sum(samples[i].supervised for row in batch.rows for i in row)
            assert batch.tokens == sum(len(samples[i]) for row in batch.rows for i in row)


def test_the_order_is_decided_by_seed_and_epoch_alone() -> None:
    samples = make_samples([5] * 30)

    def order(seed: int, epochs: int = 2) -> list[list[int]]:
        stream = BatchStream(samples, batch_size=4, max_length=8, seed=seed)
        steps = [stream.next_step() for _ in range(epochs * stream.steps_per_epoch)]
        return [sorted(row[0] for batch in step for row in batch.rows) for step in steps]

    assert order(3) == order(3)
    assert order(3) != order(4)
    assert order(3)[:8] != order(3)[8:]
    torch.manual_seed(99)
    assert order(3) == order(3)  # the global generator plays no part


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        a.rows == b.rows
        and torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.labels, b.labels)
        and (a.position_ids is None) == (b.position_ids is None)
        and (a.position_ids is None or b.position_ids is None or torch.equal(a.position_ids, b.position_ids))
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 9])
def test_a_stream_goes_on_exactly_where_its_state_was_taken(stop: int, packing: bool) -> None:
    samples = make_samples([3 + place % 9 for place in range(23)])

    def stream() -> BatchStream:
        return BatchStream(samples, batch_size=2, accumulation=3, packing=packing, max_length=12, seed=5)

    straight = stream()
    for _ in range(stop):
        straight.next_step()
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = stream()
    resumed.next_step()
    resumed.load_state_dict(state)
    for _ in range(7):
        assert same(straight.next_step(), resumed.next_step())
        assert straight.epoch == resumed.epoch


def test_a_state_of_other_data_or_settings_is_refused_with_every_difference() -> None:
    samples = make_samples([5, 6, 7])
    state = BatchStream(samples, batch_size=2, max_length=8, seed=1).state_dict()
    other = BatchStream(make_samples([5, 6, 8]), batch_size=1, max_length=8, seed=2)
    with pytest.raises(TrainingError) as caught:
        other.load_state_dict(state)
    for part in ("seed was 1 and is 2", "batch_size was 2 and is 1", "samples_sha256 was"):
        assert part in str(caught.value)
    same_data = BatchStream(samples, batch_size=2, max_length=8, seed=1)
    with pytest.raises(TrainingError, match="step"):
        same_data.load_state_dict({**state, "step": 99})
    with pytest.raises(TrainingError, match="epoch"):
        same_data.load_state_dict({key: value for key, value in state.items() if key != "epoch"})


def test_changed_labels_alone_change_the_state() -> None:
    [sample] = make_samples([6])
    other = Sample(sample.input_ids, [IGNORED, *sample.input_ids[1:]])
    states = [BatchStream([s], batch_size=1, max_length=8).state_dict() for s in (sample, other)]
    assert states[0]["samples_sha256"] != states[1]["samples_sha256"]


def test_sizes_and_lengths_that_cannot_work_are_refused() -> None:
    samples = make_samples([5])
    with pytest.raises(ConfigError, match="batch_size is 0"):
        BatchStream(samples, batch_size=0, max_length=8)
    with pytest.raises(ConfigError, match="accumulation is -1"):
        BatchStream(samples, batch_size=1, accumulation=-1, max_length=8)
    with pytest.raises(DataError, match="no sample"):
        BatchStream([], batch_size=1, max_length=8)
    with pytest.raises(DataError, match="a sample has 5 tokens, above max_length 4"):
        BatchStream(samples, batch_size=1, max_length=4)


def test_padding_is_told_apart_by_its_place_never_by_its_id() -> None:
    # The pad id is the end token, which is also a token to be learned.
    short, long = Sample([7, 8, 2], [IGNORED, 8, 2]), Sample([7, 2, 9, 2, 2], [IGNORED, 2, 9, 2, 2])
    batch = padded_batch([short, long], [0, 1], pad_id=2)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]  # type: ignore[union-attr]
    assert batch.labels.tolist() == [[IGNORED, 8, 2, IGNORED, IGNORED], [IGNORED, 2, 9, 2, 2]]
    assert batch.supervised_tokens == 6
    assert set(batch.inputs()) == {"input_ids", "attention_mask", "use_cache"}
    assert batch.inputs()["use_cache"] is False


@pytest.mark.parametrize("packing", [False, True])
def test_a_model_whose_pad_token_is_its_end_token_learns_to_stop(packing: bool) -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    questions = ["red", "green blue", "brown", "black and white", "pink", "grey", "a", "the fox"]
    rows = [
        Record("f", place, messages=(Message("user", text), Message("assistant", text.split()[0] * (1 + place % 3))))
        for place, text in enumerate(questions, start=1)
    ]
    prepared = prepare(rows, tokenizer, max_length=64, chat_template="plain")
    model = tiny_model("llama", seed=1)
    stream = BatchStream(
        prepared, batch_size=8, packing=packing, max_length=64, pad_id=2, attention=packed_attention(model, 64)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(40):
        [batch] = stream.next_step()
        logits = model(**batch.inputs()).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for row, sample in zip(rows, prepared, strict=True):
        assert row.messages is not None
        ids = prompt_ids(row.messages[:1], tokenizer, chat_template="plain")
        expected = sample.input_ids[slice(*sample.answers[0])]
        with torch.no_grad():
            for _ in range(len(expected) + 3):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == 2:
                    break
        assert ids == sample.input_ids[: sample.answers[0][1]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_a_padded_row_reads_as_it_does_alone(family: str) -> None:
    model = tiny_model(family)
    samples = make_samples([4, 9, 6])
    batch = padded_batch(samples, [0, 1, 2], pad_id=2)
    with torch.no_grad():
        together = model(**batch.inputs()).logits
        for place, sample in enumerate(samples):
            alone = model(input_ids=torch.tensor([sample.input_ids])).logits[0]
            torch.testing.assert_close(together[place, : len(sample)], alone, atol=1e-5, rtol=1e-5)


def test_within_a_step_rows_of_like_length_share_a_micro_batch() -> None:
    samples = make_samples([20, 3, 20, 3, 20, 3, 20, 3])
    stream = BatchStream(samples, batch_size=4, accumulation=2, max_length=24, seed=0)
    assert [batch.input_ids.shape[1] for batch in stream.next_step()] == [3, 20]


@pytest.mark.parametrize("packing", [False, True])
def test_a_first_token_is_never_learned_even_if_a_label_says_so(packing: bool) -> None:
    samples = [Sample([5, 6, 7], [5, 6, 7]), Sample([8, 9], [8, 9])]
    batch = BatchStream(samples, batch_size=2, packing=packing, max_length=5).next_step()[0]
    assert batch.supervised_tokens == 3
    assert not set(batch.labels.flatten().tolist()) & {5, 8}


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_packs_hold_everything_once_fit_and_are_few(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in row) for row in rows]
    assert all(total <= capacity for total in totals)
    assert rows == pack(lengths, capacity)
    # Best fit leaves at most one row at most half full, which bounds the count by twice the volume.
    assert sum(2 * total <= capacity for total in totals) <= 1


def test_packing_fills_rows_better_than_order_of_arrival() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 200, (2_000,), generator=generator).tolist()
    rows = pack(lengths, 256)
    assert sum(lengths) / (256 * len(rows)) > 0.98
    first_fit_in_order, room = 1, 256
    for length in lengths:
        if length > room:
            first_fit_in_order, room = first_fit_in_order + 1, 256
        room -= length
    assert len(rows) < 0.85 * first_fit_in_order


def test_packs_differ_between_epochs_but_not_in_number() -> None:
    samples = make_samples([4] * 12 + [8] * 6)
    stream = BatchStream(samples, batch_size=1, packing=True, max_length=12, seed=0)
    epochs = [{batch.rows for _ in range(stream.steps_per_epoch) for batch in stream.next_step()} for _ in range(2)]
    assert len(epochs[0]) == len(epochs[1]) == 8
    assert epochs[0] != epochs[1]


@settings(deadline=None, max_examples=30)
@given(lengths=LENGTHS, batch_size=st.integers(1, 6))
def test_evaluation_takes_every_sample_once_longest_first_and_says_which(lengths: list[int], batch_size: int) -> None:
    samples = make_samples(lengths)
    batches = list(eval_batches(samples, batch_size, pad_id=2))
    places = [row[0] for batch in batches for row in batch.rows]
    assert sorted(places) == list(range(len(samples)))
    assert [lengths[place] for place in places] == sorted(lengths, reverse=True)
    for batch in batches:
        for row, (place,) in enumerate(batch.rows):
            assert batch.input_ids[row, : lengths[place]].tolist() == samples[place].input_ids


def test_a_batch_moves_to_a_device_and_keeps_its_rows() -> None:
    samples = make_samples([4, 5])
    for packing in (False, True):
        batch = BatchStream(samples, batch_size=2, packing=packing, max_length=12).next_step()[0]
        moved = batch.to("cpu")
        assert moved.rows == batch.rows
        assert torch.equal(moved.input_ids, batch.input_ids)
        assert (moved.documents is None) == (not packing)
