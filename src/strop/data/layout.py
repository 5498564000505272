"""Conversations laid out as text by a chat template, with the places where answers begin and end.

An answer begins where the serving prompt ends: the template is rendered up to the turn with `add_generation_prompt`,
and that text must be a prefix of the whole. It ends with the turn's stop token, the special token that the template
writes after the content (or after its `{% generation %}` mark).

Positions here are characters; tokens are `templates.py`'s part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from strop.data.records import Message
from strop.data.sandbox import ChatTemplate, Rendered, TemplateLimitError, compiled
from strop.errors import DataError


class PrefixError(DataError):
    """A template writes a turn differently once later turns follow, so that serving and training would differ."""


@dataclass(frozen=True)
class Layout:
    """A rendered conversation, in characters.

    Attributes:
        text: What the template wrote.
        cuts: Where answers begin and end, in order; no token crosses them.
        answers: The ranges [start, end) that are learned.
        anchors: Where special tokens begin; the tokenizer reads what lies between them independently.
    """

    text: str
    cuts: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    anchors: tuple[int, ...] = ()


def compile_template(source: str, origin: str = "the chat template") -> ChatTemplate:
    """Compile a Jinja text (compiled ones are kept).

    Raises:
        DataError: If it is not valid Jinja, or too large; `origin` says where it came from.
    """
    try:
        return compiled(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{origin}, line {error.lineno}: not valid Jinja: {error.message}") from error
    except (jinja2.TemplateError, RecursionError) as error:
        raise DataError(f"{origin}: refused: {error}") from error


def added_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Texts that the tokenizer takes as one token wherever they stand, whitespace ones aside; longest first."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return tuple(sorted((text for text in texts if text.strip()), key=len, reverse=True))


class ChatFormat:
    """A chat template with a tokenizer's special tokens: lays conversations out and finds their answers.

    Args:
        tokenizer: A transformers tokenizer.
        source: The Jinja text.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.template = compile_template(source)
        self.variables = {str(name): str(token) for name, token in tokenizer.special_tokens_map.items()}
        texts = "|".join(re.escape(text) for text in added_tokens(tokenizer)) or "(?!)"  # (?!) never matches
        self._special = re.compile(texts)
        self._stop_after = re.compile(rf"\s*(?:{texts})")
        self._stop_last = re.compile(rf"(?:{texts})(?=\s*\Z)")
        self._tool_role = self._accepts_tools()

    def _accepts_tools(self) -> bool:
        """Whether the template writes out turns of the role `tool`; if not, they are given as the user's."""
        probe = [("user", "a"), ("assistant", "b"), ("tool", "strop-probe"), ("assistant", "c")]
        try:
            text = self.template.render([{"role": role, "content": text} for role, text in probe], self.variables).text
        except jinja2.TemplateError:
            return False
        return "strop-probe" in text

    def write(self, messages: Sequence[Message], *, prompt: bool = False) -> Rendered:
        """Render turns to text; with `prompt`, followed by the header of the assistant's next turn.

        Raises:
            DataError: If the template raises; the message says on which roles.
        """
        chat = [
            {"role": "user" if m.role == "tool" and not self._tool_role else m.role, "content": m.content}
            for m in messages
        ]
        try:
            return self.template.render(chat, {**self.variables, "add_generation_prompt": prompt})
        except TemplateLimitError as error:
            raise DataError(f"the chat template was stopped: {error}; use another with --chat-template") from error
        except jinja2.TemplateError as error:
            roles = ", ".join(turn["role"] for turn in chat)
            advice = "order the turns as the template asks, or use another with --chat-template"
            if chat and chat[0]["role"] == "system" and self._refuses_system(chat):
                advice = (
                    "it takes no system turn: move that text into the first user turn, "
                    "or use another with --chat-template"
                )
            raise DataError(f"the chat template refuses the turns ({roles}): {error}; {advice}") from error

    def _refuses_system(self, chat: list[dict[str, str]]) -> bool:
        try:
            self.template.render(chat[1:], {**self.variables, "add_generation_prompt": False})
        except jinja2.TemplateError:
            return False
        return True

    def lay_out(self, messages: Sequence[Message], *, prompt: bool = False) -> Layout:
        """Render a conversation and find where each answer begins and ends.

        Answers that are context only (`supervise` False) are looked for too, since they cut the text for the tokenizer,
        but they need not be found.

        Raises:
            PrefixError: If a supervised answer does not stand in the text as serving would have prompted for it.
            DataError: If the template writes no stop token after an answer, or refuses the turns.
        """
        whole = self.write(messages, prompt=prompt)
        cuts: set[int] = set()
        answers: list[tuple[int, int]] = []
        position = 0
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            last = index == len(messages) - 1 and not prompt
            try:
                ranges = self._find(messages, index, whole, position, last=last)
            except DataError:
                if message.supervise and not prompt:
                    raise
                continue
            for start, end in ranges:
                cuts.update((start, end))
                position = end
                if message.supervise:
                    answers.append((start, end))
        if prompt:
            cuts.add(len(whole.text))
        anchors = tuple(match.start() for match in self._special.finditer(whole.text))
        return Layout(whole.text, tuple(sorted(cuts)), tuple(answers), anchors)

    def _find(
        self, messages: Sequence[Message], index: int, whole: Rendered, position: int, *, last: bool
    ) -> list[tuple[int, int]]:
        """The character ranges of one answer in the whole text, the first from the end of its prompt on."""
        text, message = whole.text, messages[index]
        asked = self.write(messages[:index], prompt=True).text if index else self._opening(message, text)
        start = len(asked)
        if not text.startswith(asked) or start < position:
            raise PrefixError(
                f"turn {index + 1} (assistant): in the whole conversation the chat template writes what comes before "
                "it differently from when that turn is asked for, so training would not match serving; use a "
                "template that only appends, or another with --chat-template"
            )
        closed = text if last else self.write(messages[: index + 1]).text
        end = len(closed) if text.startswith(closed) and len(closed) > start else None
        if self.template.has_marks:
            marks = [mark for mark in whole.marks if mark[1] > start and (end is None or mark[0] < end)]
            return self._by_marks(text, start, marks if end is not None else marks[:1], index)
        if end is None:
            return [(start, self._locate(text, start, message, index))]
        stop = self._stop_last.search(text, start, end)
        if stop is None:
            raise self._no_stop(text[start:end], index)
        return [(start, stop.end())]

    def _opening(self, message: Message, text: str) -> str:
        """What stands before the answer of a conversation that begins with it."""
        try:
            return self.write([], prompt=True).text
        except DataError:  # most templates look at the first turn
            return text[: max(0, text.find(message.content.strip()))]

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

    def _locate(self, text: str, start: int, message: Message, index: int) -> int:
        """The end of an answer that later turns changed: after its content and the special token behind it."""
        for content in (message.content, message.content.strip()):
            found = text.find(content, start)
            if found >= 0 and self._special.search(text, start, found) is None:  # still within this turn
                stop = self._stop_after.match(text, found + len(content))
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
