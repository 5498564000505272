"""Conversations into tokens and labels, through the chat template that will serve them.

What is trained is what is served: the tokens of a prompt (`prompt_ids`) are, bit for bit, the beginning of the tokens
that training saw for the same conversation (`render`). Both cut the rendered text at the same places, where an answer
begins and where it ends, and both keep tokens from crossing a cut.

An answer begins where the serving prompt ends: the template is rendered up to the turn with `add_generation_prompt`,
and that text must be a prefix of the whole. It ends with the turn's stop token, the special token that the template
writes after the content (or after its `{% generation %}` mark). Labels are -100 where nothing is learned; they are not
shifted, and the first token, which nothing predicts, is never supervised.

Not done here: truncation and counting (`samples.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

from strop.data.records import ROLES, Message, Record
from strop.data.sandbox import ChatTemplate, Rendered, TemplateLimitError, compiled
from strop.errors import DataError, MissingInputError, nearest

IGNORED = -100

TrainOn = Literal["answers", "all"]

BUILT_IN = ("chatml", "plain")

_NO_TEMPLATE = (
    "the tokenizer has no chat template, so it is not known how a conversation is written for this model; "
    "pass --chat-template chatml, --chat-template plain, or --chat-template FILE (a Jinja file)"
)


@dataclass(frozen=True)
class Sample:
    """Tokens to train on.

    Attributes:
        input_ids: Token ids [T].
        labels: The same ids where they are learned, else -100 [T]; not shifted: `labels[t]` is predicted from position
            t - 1, and `labels[0]` is always -100.
        index: The position of the record in the list that was prepared.
        answers: Half-open token ranges of the supervised answers, stop token included.
    """

    input_ids: list[int]
    labels: list[int]
    index: int = 0
    answers: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """How many tokens are learned."""
        return sum(label != IGNORED for label in self.labels)


class PrefixError(DataError):
    """A template writes a turn differently once later turns follow, so that serving and training would differ."""


@dataclass(frozen=True)
class Layout:
    """A rendered conversation: its text, where it is cut, and which ranges are learned (characters)."""

    text: str
    cuts: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]


# --- the template -----------------------------------------------------------------------------------------------------


def _writes_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts a BOS in front of a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def built_in_template(tokenizer: Any, name: str) -> str:
    r"""The Jinja text of a built-in template, made for a tokenizer.

    ``chatml`` is `<|im_start|>role\ncontent<|im_end|>\n`; where the tokenizer does not hold `<|im_end|>` as one
    token, an answer is closed by the tokenizer's own end token instead, so that there is one token to stop at.
    ``plain`` is `Role: content\n\n`, an answer closed by the end token. Both begin with BOS if the tokenizer adds one
    to a text.

    Raises:
        DataError: If the tokenizer has no end token that could close an answer.
    """
    added = set(_added_tokens(tokenizer))
    stop = "<|im_end|>" if name == "chatml" and "<|im_end|>" in added else tokenizer.eos_token
    if not stop:
        raise DataError(
            f"the tokenizer has no end token, which the built-in template {name!r} needs to close an answer; "
            "set eos_token in tokenizer_config.json"
        )
    bos = "{{ bos_token }}" if _writes_bos(tokenizer) else ""
    if name == "chatml":
        header, space, other, gap, prompt = (
            "'<|im_start|>' + message.role + '\\n'",
            "",
            "<|im_end|>",
            "\\n",
            "<|im_start|>assistant\n",
        )
    else:
        header, space, other, gap, prompt = "message.role | capitalize + ':'", "' ' + ", "", "\\n\\n", "Assistant:"
    return (
        f"{bos}{{%- for message in messages -%}}"
        f"{{{{ ({header}) }}}}"
        "{%- if message.role == 'assistant' -%}"
        f"{{% generation %}}{{{{ {space}message.content + {stop!r} }}}}{{% endgeneration %}}"
        "{%- else -%}"
        f"{{{{ {space}message.content + {other!r} }}}}"
        "{%- endif -%}"
        f"{{{{ '{gap}' }}}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{ {prompt!r} }}}}{{%- endif -%}}"
    )


def chat_template_text(tokenizer: Any, name_or_file: str | Path | None = None) -> str:
    """The Jinja text that writes conversations for a tokenizer.

    Args:
        tokenizer: A transformers tokenizer.
        name_or_file: ``chatml``, ``plain``, a file, a Jinja text, or None for the tokenizer's own.

    Raises:
        DataError: If the tokenizer has none, or the text is not valid Jinja.
        MissingInputError: If the name is not known and there is no such file.
    """
    if name_or_file is None:
        own = tokenizer.chat_template
        if isinstance(own, Mapping):
            own = own.get("default")
        if not own:
            raise DataError(_NO_TEMPLATE)
        source, origin = str(own), "the tokenizer's chat template"
    elif str(name_or_file) in BUILT_IN:
        return built_in_template(tokenizer, str(name_or_file))
    elif "{%" in str(name_or_file) or "{{" in str(name_or_file):
        source, origin = str(name_or_file), "the chat template"
    else:
        path = Path(name_or_file)
        if not path.is_file():
            raise MissingInputError(
                f"chat template {str(name_or_file)!r}: not a built-in name ({', '.join(BUILT_IN)})"
                f"{nearest(str(name_or_file), BUILT_IN)}, and no such file"
            )
        try:
            source, origin = path.read_text(encoding="utf-8"), str(path)
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(f"{path}: the chat template cannot be read as UTF-8 text ({error})") from error
    _compile(source, origin)
    return source


def set_chat_template(tokenizer: Any, name_or_file: str | Path) -> str:
    """Give a tokenizer a chat template, so that it is used from here on and saved with the model; return its text."""
    source = chat_template_text(tokenizer, name_or_file)
    tokenizer.chat_template = source
    return source


def _compile(source: str, origin: str = "the chat template") -> ChatTemplate:
    try:
        return compiled(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{origin}, line {error.lineno}: not valid Jinja: {error.message}") from error
    except (jinja2.TemplateError, RecursionError) as error:
        raise DataError(f"{origin}: refused: {error}") from error


def _added_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Texts that the tokenizer takes as one token wherever they stand, whitespace ones aside; longest first."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return tuple(sorted((text for text in texts if text.strip()), key=len, reverse=True))


class ChatFormat:
    """A chat template bound to a tokenizer: lays conversations out and finds their answers.

    Args:
        tokenizer: A transformers tokenizer.
        chat_template: As for `chat_template_text`.
    """

    def __init__(self, tokenizer: Any, chat_template: str | Path | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = _compile(chat_template_text(tokenizer, chat_template))
        self.variables = {str(name): str(token) for name, token in tokenizer.special_tokens_map.items()}
        alternatives = "|".join(re.escape(text) for text in _added_tokens(tokenizer))
        # Without special tokens at all, nothing matches.
        self._stop_after = re.compile(rf"\s*(?:{alternatives})" if alternatives else r"(?!)")
        self._stop_last = re.compile(rf"(?:{alternatives})\s*\Z" if alternatives else r"(?!)")
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
            try:
                ranges = self._find(messages, index, whole, position)
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
        return Layout(whole.text, tuple(sorted(cuts)), tuple(answers))

    def _find(self, messages: Sequence[Message], index: int, whole: Rendered, position: int) -> list[tuple[int, int]]:
        """The character ranges of one answer in the whole text, the first from the end of its prompt on."""
        text = whole.text
        asked = self.write(messages[:index], prompt=True).text if index else self._opening(text)
        start = len(asked)
        if not text.startswith(asked) or start < position:
            raise PrefixError(
                f"turn {index + 1} (assistant): in the whole conversation the chat template writes what comes before "
                "it differently from when that turn is asked for, so training would not match serving; use a "
                "template that only appends, or another with --chat-template"
            )
        last = index == len(messages) - 1
        closed = text if last else self.write(messages[: index + 1]).text
        known_end = len(closed) if text.startswith(closed) and len(closed) > start else None
        marks = [(max(begin, start), end) for begin, end in whole.marks if end > start]
        if marks and known_end is not None:
            marks = [(begin, end) for begin, end in marks if begin < known_end]
        elif marks:
            marks = marks[:1]
        if marks:
            ends = self._extend_to_stop(text, marks[-1][1], index)
            marks[-1] = (marks[-1][0], ends)
            return [(start, marks[0][1]), *marks[1:]]
        if known_end is None:
            known_end = self._locate(text, start, messages[index], index)
        stop = self._stop_last.search(text, start, known_end)
        if stop is None:
            raise self._no_stop(text[start:known_end], index)
        return [(start, start + len(text[start : stop.end()].rstrip()))]

    def _opening(self, text: str) -> str:
        """What a conversation that begins with an answer opens with."""
        empty = self.write([], prompt=True).text
        return empty if text.startswith(empty) else ""

    def _locate(self, text: str, start: int, message: Message, index: int) -> int:
        """The end of an answer that later turns changed: after its content and the special token behind it."""
        for content in (message.content, message.content.strip()):
            found = text.find(content, start)
            if found >= 0:
                stop = self._stop_after.match(text, found + len(content))
                if stop is None:
                    raise self._no_stop(text[start : found + len(content) + 20], index)
                return stop.end()
        raise PrefixError(
            f"turn {index + 1} (assistant): the chat template does not write the answer as it stands once later turns "
            "follow (some templates drop reasoning from earlier turns), so training would not match serving"
        )

    def _extend_to_stop(self, text: str, end: int, index: int) -> int:
        """The end of a generation mark, moved past the stop token if the mark leaves it out."""
        after = self._stop_after.match(text, end)
        within = self._stop_last.search(text[:end])
        if within is not None:
            return end
        if after is None:
            raise self._no_stop(text[max(0, end - 40) : end + 20], index)
        return after.end()

    def _no_stop(self, text: str, index: int) -> DataError:
        return DataError(
            f"turn {index + 1} (assistant): the chat template writes no special token after the answer "
            f"({text[-60:]!r}), so the model could not learn to stop; write {{{{ eos_token }}}} after the content, or "
            "pass --chat-template chatml or plain"
        )


# --- tokens -----------------------------------------------------------------------------------------------------------


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, with nothing added."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that goes on from another, without the space that some tokenizers put before a first word."""
    for anchor in ("\n", "a", "."):
        head, both = _encode(tokenizer, [anchor, anchor + text])
        if both[: len(head)] == head:
            return both[len(head) :]
    return _encode(tokenizer, [text])[0]


def _tokens(tokenizer: Any, layouts: Sequence[Layout]) -> list[tuple[list[int], list[int]]]:
    """Tokenize texts so that no token crosses a cut: for each `(ids, positions of its cuts in ids)`.

    Each text is tokenized up to every cut. Where that ends as the longer text goes on, it is simply the tokenizer's own
    reading of the text; where the tokenizer would join characters across the cut, the part after the cut is tokenized
    as a continuation. Either way the ids up to a cut depend on the text up to that cut alone, which makes a prompt the
    prefix of its training row.
    """
    prefixes: list[str] = []
    for layout in layouts:
        prefixes += [layout.text[:cut] for cut in layout.cuts if 0 < cut < len(layout.text)] + [layout.text]
    encoded = iter(_encode(tokenizer, prefixes))
    result: list[tuple[list[int], list[int]]] = []
    for layout in layouts:
        ids: list[int] = []
        exact: list[int] = []  # the tokenizer's own ids of the text so far
        begin, places = 0, []
        for cut in layout.cuts:
            if 0 < cut < len(layout.text):
                exact, ids = _advance(tokenizer, ids, exact, next(encoded), layout.text[begin:cut])
                begin = cut
            places.append(len(ids) if cut < len(layout.text) else -1)
        _, ids = _advance(tokenizer, ids, exact, next(encoded), layout.text[begin:])
        result.append((ids, [len(ids) if place < 0 else place for place in places]))
    return result


def _advance(
    tokenizer: Any, ids: list[int], exact: list[int], longer: list[int], piece: str
) -> tuple[list[int], list[int]]:
    if ids == exact and longer[: len(exact)] == exact:
        return longer, longer
    return longer, ids + (_encode_continuation(tokenizer, piece) if piece else [])


def _one_bos(tokenizer: Any, ids: list[int]) -> int:
    """How many leading BOS tokens are too many."""
    bos = tokenizer.bos_token_id
    count = 0
    while bos is not None and count < len(ids) and ids[count] == bos:
        count += 1
    return max(0, count - 1)


def _sample(tokenizer: Any, layout: Layout, ids: list[int], places: list[int], train_on: TrainOn) -> Sample:
    where = dict(zip(layout.cuts, places, strict=True))
    extra = _one_bos(tokenizer, ids)
    answers = tuple((max(1, where[start] - extra), where[end] - extra) for start, end in layout.answers)
    ids = ids[extra:]
    if train_on == "all":
        labels = [IGNORED, *ids[1:]]
    else:
        labels = [IGNORED] * len(ids)
        for start, end in answers:
            labels[start:end] = ids[start:end]
    return Sample(ids, labels, answers=answers)


def _text_sample(tokenizer: Any, record: Record) -> Sample:
    """A plain text: everything learned; BOS in front if the tokenizer adds one, the end token behind if it ends."""
    assert record.text is not None
    ids = _encode(tokenizer, [record.text])[0]
    if _writes_bos(tokenizer):
        ids = [tokenizer.bos_token_id, *ids]
    ids = ids[_one_bos(tokenizer, ids) :]
    if record.ends and tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    return Sample(ids, [IGNORED, *ids[1:]], answers=((min(1, len(ids)), len(ids)),))


def located(record: Record, error: DataError) -> DataError:
    """The same error with the record's place in front."""
    return type(error)(f"{record.source}, row {record.row}: {error}")


def render_all(
    records: Iterable[Record], tokenizer: Any, *, train_on: TrainOn = "answers", chat_template: str | Path | None = None
) -> list[Sample | DataError]:
    """Render many records at once (one call of the tokenizer): for each its sample, or what is wrong with it.

    Args:
        records: Conversations and texts.
        tokenizer: A transformers tokenizer.
        train_on: ``answers`` supervises assistant turns with their stop tokens, ``all`` every token but the first.
        Texts
            are supervised whole either way.
        chat_template: As for `chat_template_text`.

    Raises:
        DataError: If there are conversations and no usable template.
    """
    results: list[Sample | DataError | None] = []
    layouts: list[Layout] = []
    places: list[int] = []
    form: ChatFormat | None = None
    for record in records:
        if record.messages is None:
            results.append(_text_sample(tokenizer, record))
            continue
        form = form or ChatFormat(tokenizer, chat_template)
        try:
            layouts.append(form.lay_out(record.messages))
            places.append(len(results))
            results.append(None)
        except DataError as error:
            results.append(located(record, error))
    for place, layout, (ids, cuts) in zip(places, layouts, _tokens(tokenizer, layouts), strict=True):
        results[place] = _sample(tokenizer, layout, ids, cuts, train_on)
    return [result for result in results if result is not None]


def render(
    record: Record, tokenizer: Any, *, train_on: TrainOn = "answers", chat_template: str | Path | None = None
) -> Sample:
    """Turn one record into tokens and labels; see `render_all`.

    Raises:
        DataError: If the template refuses the turns, writes no stop token, or breaks the prefix property
        (`PrefixError`).
    """
    result = render_all([record], tokenizer, train_on=train_on, chat_template=chat_template)[0]
    if isinstance(result, DataError):
        raise result
    return result


def as_messages(messages: Sequence[Message | Mapping[str, str]]) -> tuple[Message, ...]:
    """Messages from messages or from mappings with `role` and `content`."""
    result: list[Message] = []
    for message in messages:
        if isinstance(message, Message):
            result.append(message)
            continue
        role, content = message.get("role"), message.get("content")
        if role is None or role not in ROLES or not isinstance(content, str):
            raise DataError(f"a message needs a role ({', '.join(ROLES)}) and a text as content; got {dict(message)!r}")
        result.append(Message(ROLES[role], content))
    return tuple(result)


def prompt_ids(
    messages: Sequence[Message | Mapping[str, str]], tokenizer: Any, *, chat_template: str | Path | None = None
) -> list[int]:
    """Token ids that ask for the assistant's next turn, as training saw them before that turn.

    Args:
        messages: The conversation so far, ending with a turn that is not the assistant's.
        tokenizer: A transformers tokenizer.
        chat_template: As for `chat_template_text`.

    Raises:
        DataError: If there is no template, or it refuses the turns.
    """
    layout = ChatFormat(tokenizer, chat_template).lay_out(as_messages(messages), prompt=True)
    ids = _tokens(tokenizer, [layout])[0][0]
    return ids[_one_bos(tokenizer, ids) :]


def stop_ids(tokenizer: Any, *, chat_template: str | Path | None = None) -> list[int]:
    """Ids at which an answer ends: the tokenizer's end token, and the one the chat template closes an answer with."""
    stops = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    try:
        chat = (Message("user", "a"), Message("assistant", "b"))
        sample = render(Record("probe", 1, messages=chat), tokenizer, chat_template=chat_template)
    except DataError:
        return stops
    last = sample.input_ids[sample.answers[-1][1] - 1]
    return stops if last in stops else [*stops, last]
