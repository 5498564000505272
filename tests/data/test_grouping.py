"""Padding saved, by packing and by length: how many of the positions that are computed hold tokens."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import strop.demo
from strop.config import TuneConfig
from strop.data.batches import BatchStream
from strop.data.records import read_records
from strop.data.samples import SampleSet, prepare
from strop.errors import ConfigError, TrainingError
from strop.recipes.session import open_session
from strop.training.shapes import at_common_width, common_width
from tests.data.test_batches import LENGTHS, make_samples, same
from tests.tiny import tiny_chat_file, tiny_folder

CHATS = ("lf_v1_sft_demo.jsonl", "lf_alpaca_en_demo.json", "lf_glaive_toolcall_en_demo.json")
_PREPARED: dict[tuple[str, int, str], SampleSet] = {}


def real_samples(material: Path, name: str, max_length: int, tokenizer: str = "demo") -> SampleSet:
    key = (name, max_length, tokenizer)
    if key not in _PREPARED:
        demo = Path(strop.demo.__file__).parent / "model"
        folder, template = (demo, None) if tokenizer == "demo" else (material / "models" / "stories260K", "plain")
        records = read_records(material / "data" / name)[:2_000]
        reader = AutoTokenizer.from_pretrained(folder)
        _PREPARED[key] = prepare(records, reader, max_length=max_length, chat_template=template)
    return _PREPARED[key]


def share_of_tokens(stream: BatchStream) -> float:
    """What an epoch's batches hold as they are collated and brought to a common width."""
    tokens = positions = 0
    for _ in range(stream.steps_per_epoch):
        for batch in stream.next_step():
            tokens += batch.tokens
            positions += at_common_width(batch, limit=None).input_ids.numel()
    return tokens / positions


@pytest.mark.parametrize("tokenizer", ["demo", "stories260K"])
@pytest.mark.parametrize("max_length", [512, 1024])
@pytest.mark.parametrize("name", CHATS)
def test_packing_uses_over_95_percent_of_the_positions_on_real_chats(
    material: Path, name: str, max_length: int, tokenizer: str
) -> None:
    samples = real_samples(material, name, max_length, tokenizer)
    stream = BatchStream(samples, batch_size=8, packing=True, max_length=max_length)
    told = stream.used_positions(lambda width: common_width(width, limit=None))
    assert told > 0.95
    assert share_of_tokens(stream) == told
    assert stream.epoch == 1
    assert share_of_tokens(stream) > 0.95  # the next epoch too


def test_packing_of_real_chats_goes_on_bit_for_bit_where_its_state_was_taken(material: Path) -> None:
    samples = real_samples(material, CHATS[0], 512)

    def stream() -> BatchStream:
        return BatchStream(samples, batch_size=8, packing=True, max_length=512, seed=3)

    straight = stream()
    for _ in range(straight.steps_per_epoch // 2):
        straight.next_step()
    resumed = stream()
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for _ in range(straight.steps_per_epoch):
        assert same(straight.next_step(), resumed.next_step())


@pytest.mark.parametrize(("name", "max_length"), [("banking77_train.csv", 256), (CHATS[1], 1024)])
def test_grouping_by_length_halves_the_padding_and_takes_the_same_rows(
    material: Path, name: str, max_length: int
) -> None:
    samples = real_samples(material, name, max_length)
    plain, grouped = (
        BatchStream(samples, batch_size=8, max_length=max_length, group_by_length=group) for group in (False, True)
    )
    padding = [1 - stream.used_positions() for stream in (plain, grouped)]
    assert padding[1] < padding[0] / 2
    rows = [
        Counter(r for _ in range(s.steps_per_epoch) for b in s.next_step() for r in b.rows) for s in (plain, grouped)
    ]
    assert rows[0] == rows[1]


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, batch_size=st.integers(1, 5), accumulation=st.integers(1, 3), seed=st.integers(0, 9))
def test_grouped_rows_come_exactly_once_an_epoch_and_no_step_is_a_remnant(
    lengths: list[int], batch_size: int, accumulation: int, seed: int
) -> None:
    samples = make_samples(lengths)
    stream = BatchStream(
        samples, batch_size=batch_size, accumulation=accumulation, group_by_length=True, max_length=24, seed=seed
    )
    for _ in range(2):
        told, tokens, positions = stream.used_positions(), 0, 0
        seen: Counter[int] = Counter()
        sizes = []
        for _ in range(stream.steps_per_epoch):
            step = stream.next_step()
            assert len(step) <= accumulation
            sizes.append(sum(len(batch.rows) for batch in step))
            for batch in step:
                assert len(batch.rows) <= batch_size
                tokens, positions = tokens + batch.tokens, positions + batch.input_ids.numel()
                seen.update(index for row in batch.rows for index in row)
        assert seen == Counter(range(len(samples)))
        assert max(sizes) - min(sizes) <= 1
        assert told == tokens / positions


def test_grouped_steps_are_decided_by_seed_and_epoch_and_differ_between_epochs() -> None:
    samples = make_samples([2 + place * 7 % 23 for place in range(400)])

    def steps(seed: int) -> list[frozenset[tuple[int, ...]]]:
        stream = BatchStream(samples, batch_size=4, group_by_length=True, max_length=24, seed=seed)
        return [frozenset(r for b in stream.next_step() for r in b.rows) for _ in range(2 * stream.steps_per_epoch)]

    order = steps(1)
    assert order == steps(1)
    assert order != steps(2)
    first, second = set(order[:100]), set(order[100:])
    assert len(first & second) < 10  # a step's rows are drawn anew, not only the steps' order
    longest = [max(len(samples[row[0]]) for row in step) for step in order[:100]]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))  # lengths come mixed


@pytest.mark.parametrize("stop", [0, 3, 11, 12, 15])
def test_a_grouped_stream_goes_on_exactly_where_its_state_was_taken(stop: int) -> None:
    samples = make_samples([3 + place % 9 for place in range(47)])

    def stream() -> BatchStream:
        return BatchStream(samples, batch_size=2, accumulation=2, group_by_length=True, max_length=12, seed=5)

    straight, resumed = stream(), stream()
    for _ in range(stop):
        straight.next_step()
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for _ in range(14):
        assert same(straight.next_step(), resumed.next_step())
    other = BatchStream(samples, batch_size=2, accumulation=2, max_length=12, seed=5)
    with pytest.raises(TrainingError, match="group_by_length was True and is False"):
        other.load_state_dict(straight.state_dict())


def test_grouping_beside_packing_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match=r"packing and group_by_length both save padding.*set one"):
        TuneConfig.from_flat({"model": "m", "data": "d", "packing": True, "group_by_length": True})
    with pytest.raises(ConfigError, match="set one"):
        BatchStream(make_samples([3]), batch_size=1, max_length=8, packing=True, group_by_length=True)


class Notes:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)

    warn = note


@pytest.mark.parametrize(
    "change", [{}, {"group_by_length": True}, {"packing": True}], ids=["plain", "grouped", "packed"]
)
@pytest.mark.parametrize("long", [False, True], ids=["alike", "some long"])
def test_a_run_says_at_its_start_which_share_of_the_positions_holds_tokens(
    tmp_path: Path, change: dict, long: bool
) -> None:
    notes = Notes()
    data = tiny_chat_file(tmp_path / "data.jsonl", rows=40)
    if long:
        turns = [{"role": "user", "content": "the fox " * 40}, {"role": "assistant", "content": "yes"}]
        lines = data.read_text().splitlines()
        data.write_text("\n".join(line for short in lines for line in (short, json.dumps({"messages": turns}))))
    values = {"model": str(tiny_folder(tmp_path, "llama")), "data": str(data), "method": "lora", "max_steps": 1}
    session = open_session(TuneConfig.from_flat({**values, **change}), reporter=notes)  # type: ignore[arg-type]  # told only
    assert session.stream.group_by_length == bool(change.get("group_by_length"))
    tokens = positions = 0
    for _ in range(session.stream.steps_per_epoch):
        for batch in session.stream.next_step():
            tokens, positions = tokens + batch.tokens, positions + at_common_width(batch, limit=256).input_ids.numel()
    [said] = [line for line in notes.lines if "of the positions" in line]
    assert said.startswith(f"{tokens / positions:.1%} of the positions that are computed hold tokens")
    assert ("packing" in said) == (long and not change)
