"""Texts of control tokens that a conversation itself holds: read as the plain text they are.

A user who writes `<|im_end|>` must not end the turn: training on it would teach forged turns, and serving would obey
them. Before the template sees the turns, a guard (a character that no text has) is put behind the first letter of each
such text; afterwards it is taken out again and its places become cuts, which no token crosses. So the tokenizer reads
the text in two ordinary parts, in training and in serving alike. Tokens that the tokenizer does not count among the
special ones (`<think>`, `<tool_call>`) are content and stay what they are, and so does everything in rows of plain
text, where whoever wrote them wrote the tokens too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from strop.data.rendering import Job, View

# Unicode's noncharacters, set aside for a program's own use: no text holds them.
_GUARDS: Final = tuple(map(chr, range(0xFDD0, 0xFDF0)))


def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """What finds the texts that a tokenizer takes as control tokens."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts |= set(tokenizer.all_special_tokens)
    kept = sorted((text for text in texts if text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, kept)) or "(?!)")  # (?!) never matches


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for inner in pair for text in _texts(inner)]
    return [text for inner in value for text in _texts(inner)] if isinstance(value, list) else []


def _guarded(value: Any, control: re.Pattern[str], guard: str) -> Any:
    if isinstance(value, str):
        return control.sub(lambda found: f"{found[0][0]}{guard}{found[0][1:]}", value)
    if isinstance(value, dict):
        return {_guarded(key, control, guard): _guarded(inner, control, guard) for key, inner in value.items()}
    return [_guarded(inner, control, guard) for inner in value] if isinstance(value, list) else value


def guarded(job: Job, control: re.Pattern[str]) -> Job:
    """The job with a guard in each text of a control token that its turns or functions hold."""
    held = [text for value in (list(job.turns), dict(job.variables)) for text in _texts(value)]
    if not any(control.search(text) for text in held):
        return job
    guard = next((guard for guard in _GUARDS if not any(guard in text for text in held)), _GUARDS[0])
    turns: Sequence[Any] = _guarded(list(job.turns), control, guard)
    return replace(job, turns=turns, variables=_guarded(dict(job.variables), control, guard), guard=guard)


def unguarded(view: View, guard: str) -> View:
    """What the template would have written without guards, and where they stood."""
    if not guard or guard not in view.text:
        return view
    stood = [match.start() for match in re.finditer(guard, view.text)]

    def moved(place: int) -> int:
        return place - sum(at < place for at in stood)

    return View(
        view.text.replace(guard, ""),
        tuple((moved(start), moved(end)) for start, end in view.marks),
        tuple(moved(part) if isinstance(part, int) else part for part in view.parts),
        tuple(place - number for number, place in enumerate(stood)),
    )


def without_literals(view: View) -> str:
    """The text, as long as it is, with those texts made unrecognisable; for finding the tokens of the template."""
    text = view.text
    if not view.literals:
        return text
    pieces, begin = [], 0
    for place in view.literals:
        pieces += [text[begin:place], _GUARDS[0]]
        begin = place + 1
    return "".join([*pieces, text[begin:]])
