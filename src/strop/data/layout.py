"""Conversations laid out as text by a chat template, with the places where answers begin and end.

An answer begins where the serving prompt ends: the template is rendered up to the turn with `add_generation_prompt`,
and that text must be a prefix of the whole. It ends with the turn's stop token, the special token that the template
writes after the content (or after its `{% generation %}` mark).

Positions here are characters; tokens are `templates.py`'s part, and the process that renders is `rendering.py`'s.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from strop.data.literals import control_tokens, guarded, unguarded, without_literals
from strop.data.records import Message
from strop.data.rendering import (
    Job,
    TemplateRefusedError,
    TemplateStoppedError,
    TemplateSyntaxError,
    View,
    check_template,
    render_jobs,
)
from strop.data.tools import as_turns
from strop.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class PrefixError(DataError):
    """A template writes a turn differently once later turns follow, so that serving and training would differ."""


class StoppedError(DataError):
    """A template hit a limit. `place` is the position of the conversation that it was writing."""

    def __init__(self, message: str, place: int = 0) -> None:
        super().__init__(message)
        self.place = place


@dataclass(frozen=True)
class Layout:
    """A rendered conversation, in characters.

    Attributes:
        text: What the template wrote.
        cuts: Where answers begin and end, and places within literal control tokens, in order; no token crosses them.
        answers: The ranges [start, end) that are learned.
        anchors: Where special tokens begin; the tokenizer reads what lies between them independently.
        turns: Ranges of other turns that are learned; tokens may cross their ends.
    """

    text: str
    cuts: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    anchors: tuple[int, ...] = ()
    turns: tuple[tuple[int, int], ...] = ()


@functools.lru_cache(maxsize=32)
def compile_template(source: str, origin: str = "the chat template") -> None:
    """Compile a Jinja text, in the process that will render it.

    Raises:
        DataError: If it is not valid Jinja, or too large; `origin` says where it came from.
    """
    try:
        check_template(source)
    except TemplateSyntaxError as error:
        raise DataError(f"{origin}, {error}") from error
    except TemplateStoppedError as error:
        raise DataError(f"{origin}: refused: {error}") from error


def added_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Texts that the tokenizer takes as one token wherever they stand, whitespace ones aside; longest first."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return tuple(sorted((text for text in texts if text.strip()), key=len, reverse=True))


_TOOL = {
    "type": "function",
    "function": {
        "name": "strop_tool",
        "description": "a",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "b"}}, "required": []},
    },
}
_CALL = Message("assistant", "", calls=('{"name": "strop_call", "arguments": {"a": "b"}}',))
_CALLING = (Message("user", "a"), _CALL, Message("tool", "strop-probe"), Message("assistant", "c"))


class ChatFormat:
    """A chat template with a tokenizer's special tokens: lays conversations out and finds their answers.

    Args:
        tokenizer: A transformers tokenizer.
        source: The Jinja text.

    Attributes:
        takes_tools: Whether the template writes out `tools`, `tool_calls` and the role `tool`; if not, calls and
            functions are given to it as text.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        compile_template(source)
        self.source = source
        self.variables = {str(name): str(token) for name, token in tokenizer.special_tokens_map.items()}
        self._marked = _GENERATION.search(source) is not None
        texts = "|".join(re.escape(text) for text in added_tokens(tokenizer)) or "(?!)"  # (?!) never matches
        self._special = re.compile(texts)
        self._control = control_tokens(tokenizer)
        self._stop_after = re.compile(rf"\s*(?:{texts})")
        self._stop_last = re.compile(rf"(?:{texts})(?=\s*\Z)")
        plain = [{"role": m.role, "content": m.content or "b"} for m in _CALLING]
        self._tool_role = self._writes(Job(plain), "strop-probe")
        calling = Job(as_turns(_CALLING)[0], variables={"tools": [_TOOL]})
        self.takes_tools = self._writes(calling, "strop_tool", "strop_call", "strop-probe")

    def _render(self, jobs: Sequence[Job]) -> list[View | TemplateRefusedError]:
        try:
            views = render_jobs(self.source, self.variables, jobs)
            return [
                unguarded(view, job.guard) if isinstance(view, View) else view
                for job, view in zip(jobs, views, strict=True)
            ]
        except TemplateStoppedError as error:
            message = f"the chat template was stopped: {error}; use another with --chat-template"
            raise StoppedError(message, error.place) from error

    def _writes(self, job: Job, *words: str) -> bool:
        """Whether all the words stand in what the template makes of a conversation."""
        [view] = self._render([job])
        return isinstance(view, View) and all(word in view.text for word in words)

    def turns(self, messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[Any] | None]:
        """What the template sees as `messages` and as `tools`."""
        if self.takes_tools:
            return as_turns(messages)
        roles = ["user" if m.role == "tool" and not self._tool_role else m.role for m in messages]
        return [{"role": role, "content": m.content} for role, m in zip(roles, messages, strict=True)], None

    def _job(self, messages: Sequence[Message], *, prompt: bool) -> Job:
        turns, tools = self.turns(messages)
        left_out = len(messages) - len(turns)  # a first turn that holds the functions alone
        parts: list[tuple[int, bool]] = []
        for index in _answers(messages):
            parts += [(index - left_out, True), (index + 1 - left_out, False)]
        return guarded(Job(turns, prompt, parts, {"tools": tools} if tools else {}), self._control)

    def lay_out_all(
        self, conversations: Sequence[Sequence[Message]], learned: Sequence[frozenset[int]], *, prompt: bool = False
    ) -> list[Layout | DataError]:
        """Render conversations and find where each answer begins and ends.

        Answers that are context only are looked for too, since they cut the text for the tokenizer, but they need not
        be found.

        Args:
            conversations: The turns of each.
            learned: For each, the positions of the turns that are learned.
            prompt: Whether the header of the assistant's next turn follows.

        Returns:
            For each its layout, or what is wrong with it: a `PrefixError` if a learned answer does not stand in the
            text as serving would have prompted for it, another `DataError` if the template writes no stop token after
            an answer, or refuses the turns.

        Raises:
            StoppedError: If the template hits a limit.
        """
        results: list[Layout | DataError] = []
        jobs = [self._job(messages, prompt=prompt) for messages in conversations]
        views = self._render(jobs)
        for place, view in enumerate(views):
            if isinstance(view, TemplateRefusedError):
                results.append(self._refusal(jobs[place], str(view)))
                continue
            try:
                results.append(self._layout(conversations[place], learned[place], jobs[place], view))
            except StoppedError as error:
                raise StoppedError(str(error), place) from error
            except DataError as error:
                results.append(error)
        return results

    def _refusal(self, job: Job, words: str) -> DataError:
        roles = ", ".join(turn["role"] for turn in job.turns)
        advice = "order the turns as the template asks, or use another with --chat-template"
        if job.turns and job.turns[0]["role"] == "system":
            [rest] = self._render([replace(job, turns=job.turns[1:], prompt=False, parts=())])
            if isinstance(rest, View):
                advice = (
                    "it takes no system turn: move that text into the first user turn, "
                    "or use another with --chat-template"
                )
        return DataError(f"the chat template refuses the turns ({roles}): {words}; {advice}")

    def _layout(self, messages: Sequence[Message], learned: frozenset[int], job: Job, view: View) -> Layout:
        cuts: set[int] = set(view.literals)
        answers: list[tuple[int, int]] = []
        position = 0
        for index, asked, closed in zip(_answers(messages), view.parts[::2], view.parts[1::2], strict=True):
            last = index == len(messages) - 1 and not job.prompt
            try:
                if isinstance(asked, str) and index:
                    turns = job.turns[: index - (len(messages) - len(job.turns))]
                    raise self._refusal(replace(job, turns=turns), asked)
                begin = asked if isinstance(asked, int) else None
                if not index and begin is None:  # most templates look at the first turn: there is no prompt to ask with
                    begin = max(0, view.text.find(messages[0].content.strip()))
                end = len(view.text) if last else closed if isinstance(closed, int) else None
                ranges = self._find(messages[index], index, view, begin, end, position)
            except DataError:
                if index in learned:
                    raise
                continue
            for start, end in ranges:
                cuts.update((start, end))
                position = end
                if index in learned:
                    answers.append((start, end))
        if job.prompt:
            cuts.add(len(view.text))
        others = sorted(index for index in learned if messages[index].role != "assistant")
        turns = tuple(self._other_turn(job, view, index, len(messages)) for index in others)
        anchors = tuple(match.start() for match in self._special.finditer(without_literals(view)))
        return Layout(view.text, tuple(sorted(cuts)), tuple(answers), anchors, turns)

    def _find(
        self, message: Message, index: int, view: View, start: int | None, closed: int | None, position: int
    ) -> list[tuple[int, int]]:
        """The character ranges of one answer in the whole text, the first from the end of its prompt on."""
        text, seen = view.text, without_literals(view)
        if start is None or start < position:
            raise PrefixError(
                f"turn {index + 1} (assistant): in the whole conversation the chat template writes what comes before "
                "it differently from when that turn is asked for, so training would not match serving; use a "
                "template that only appends, or another with --chat-template"
            )
        end = closed if closed is not None and closed > start else None
        if self._marked:
            marks = [mark for mark in view.marks if mark[1] > start and (end is None or mark[0] < end)]
            return self._by_marks(seen, start, marks if end is not None else marks[:1], index)
        if end is None:
            return [(start, self._locate(text, seen, start, message, index))]
        stop = self._stop_last.search(seen, start, end)
        if stop is None:
            raise self._no_stop(text[start:end], index)
        return [(start, stop.end())]

    def _other_turn(self, job: Job, view: View, index: int, count: int) -> tuple[int, int]:
        """The range of a turn that is not the assistant's: its content and what closes it.

        The content is what changes when it is another: it begins where the two texts part, and ends where they meet.
        """
        place = index - (count - len(job.turns))
        content = str(job.turns[place]["content"]) if place >= 0 else ""
        edges = {content[:1], content[-1:], content.strip()[:1], content.strip()[-1:]}
        other = next(digit for digit in "01234" if digit not in edges)
        changed = [{**turn, "content": other} if at == place else turn for at, turn in enumerate(job.turns)]
        end_of_turn = (place + 1, False)
        plain = replace(job, prompt=False, parts=())
        [with_other, again] = self._render([replace(plain, turns=changed), replace(plain, parts=[end_of_turn])])
        text, seen = view.text, without_literals(view)
        begin = end = 0
        if isinstance(with_other, View):
            begin = _shared(text, with_other.text)
            end = len(text) - _shared(text[begin:][::-1], with_other.text[begin:][::-1])
        if begin >= end:
            raise DataError(
                f"turn {index + 1} ({job.turns[place]['role']}): it is marked to be learned, but the chat template "
                "does not write it out; take its mark away"
            )
        stop = self._stop_after.match(seen, end)
        closed = again.parts[0] if isinstance(again, View) else None
        whole = closed if isinstance(closed, int) and closed >= end else end
        return begin, stop.end() if stop is not None else whole

    def _by_marks(self, text: str, start: int, marks: list[tuple[int, int]], index: int) -> list[tuple[int, int]]:
        """The marked ranges of an answer, from the end of its prompt to its stop token; none if it is unmarked."""
        if not marks:
            return []
        end = marks[-1][1]
        within = self._stop_last.search(text, max(marks[-1][0], start), end)
        after = self._stop_after.match(text, end)
        if within is not None:
            end = within.end()
        elif after is not None:
            end = after.end()
        else:
            raise self._no_stop(text[start : end + 20], index)
        return [
            (start if place == 0 else begin, end if place == len(marks) - 1 else until)
            for place, (begin, until) in enumerate(marks)
        ]

    def _locate(self, text: str, seen: str, start: int, message: Message, index: int) -> int:
        """The end of an answer that later turns changed: after its content and the special token behind it."""
        for content in (message.content, message.content.strip()):
            found = text.find(content, start)
            if found >= 0 and self._special.search(seen, start, found) is None:  # still within this turn
                stop = self._stop_after.match(seen, found + len(content))
                if stop is None:
                    raise self._no_stop(text[start : found + len(content) + 20], index)
                return stop.end()
        raise PrefixError(
            f"turn {index + 1} (assistant): the chat template does not write the answer as it stands once later turns "
            "follow (some templates drop reasoning from earlier turns), so training would not match serving"
        )

    def _no_stop(self, text: str, index: int) -> DataError:
        return DataError(
            f"turn {index + 1} (assistant): the chat template writes no special token after the answer "
            f"({text[-60:]!r}), so the model could not learn to stop; write {{{{ eos_token }}}} after the content, or "
            "pass --chat-template chatml or plain"
        )


def _answers(messages: Sequence[Message]) -> list[int]:
    """The positions of the assistant's turns."""
    return [index for index, message in enumerate(messages) if message.role == "assistant"]


def _shared(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    differing = (at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differing, min(len(first), len(second)))
