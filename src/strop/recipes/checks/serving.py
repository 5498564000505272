"""Does training see what `chat` and `predict` will ask? Token by token, on the rows themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from strop.data.records import Record
from strop.data.templates import Sample, prompt_ids, template_hash
from strop.recipes.checks.finding import Finding, count
from strop.recipes.session import Session


def check_template(session: Session, *, rows: int) -> list[Finding]:
    """Compare the prompts of up to `rows` training rows with what serving would ask; nothing for plain texts.

    For each answer of a row the conversation before it is written as `chat` and `predict` write it; those ids must be
    the row's own, up to where the answer begins.
    """
    records, samples = session.splits.train, session.train_set.samples
    texts = {place for place, record in enumerate(records) if record.messages is None}
    chats = [place for place, sample in enumerate(samples) if sample.index not in texts]
    chosen = [samples[place] for place in chats[:: max(1, len(chats) // rows)][:rows]]
    if not chosen:
        return []
    digest = template_hash(session.tokenizer)
    prompts = 0
    for sample in chosen:
        asked = _prompts(records[sample.index], session.tokenizer)
        for start in _beginnings(sample, asked):
            prompts += 1
            wrong = _difference(sample, start, asked)
            if wrong is not None:
                return [_mismatch(session, sample, start, wrong, digest)]
    return [
        Finding(
            "fine",
            "template",
            f"training and serving write the same tokens ({count(prompts, 'prompt')} of {count(len(chosen), 'row')} "
            f"compared; template {digest[:12]})",
            "",
            {"template_sha256": digest, "rows": len(chosen), "prompts": prompts},
        )
    ]


def _prompts(record: Record, tokenizer: Any) -> list[list[int]]:
    """What serving asks for each learned answer; an answer that nothing comes before is never asked for."""
    assert record.messages is not None
    return [
        prompt_ids(record.messages[:place], tokenizer)
        for place, message in enumerate(record.messages)
        if message.role == "assistant"
        and message.supervise
        and place
        and record.messages[place - 1].role != "assistant"
    ]


def _beginnings(sample: Sample, asked: Sequence[list[int]]) -> list[int]:
    """Where answers begin. A template's marks may cut one into several ranges: only whole answers are asked for."""
    starts = [start for start, _ in sample.answers]
    if len(starts) <= len(asked):
        return starts
    lengths = {len(prompt) for prompt in asked}
    return [start for start in starts if start in lengths] or starts[:1]


def _difference(sample: Sample, start: int, asked: Sequence[list[int]]) -> list[int] | None:
    """None where a prompt is the row's beginning, else the prompt that goes along with it furthest."""
    beginning = sample.input_ids[:start]
    if beginning in asked:
        return None
    return max(asked, key=lambda prompt: _common(prompt, beginning), default=[])


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def _mismatch(session: Session, sample: Sample, start: int, prompt: list[int], digest: str | None) -> Finding:
    place = _common(prompt, sample.input_ids[:start])
    record = session.splits.train[sample.index]
    trained, served = (session.tokenizer.decode(ids[place : place + 8]) for ids in (sample.input_ids[:start], prompt))
    return Finding(
        "refuse",
        "template",
        f"{record.source}, row {record.row}: serving asks with other tokens than training saw: from token {place + 1} "
        f"on {served!r} instead of {trained!r}",
        "train and serve with the same chat template (--chat-template at both, or save it with the tokenizer)",
        {"template_sha256": digest, "row": record.row, "token": place, "trained": trained, "served": served},
    )
