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

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

from strop.data.built_in import BUILT_IN, built_in_template, writes_bos
from strop.data.layout import ChatFormat, Layout, StoppedError, compile_template
from strop.data.records import ROLES, Message, Record
from strop.data.tools import read_calls, read_tools, with_functions
from strop.errors import DataError, MissingInputError, nearest

IGNORED = -100

TrainOn = Literal["answers", "last", "all", "custom"]

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
        return len(self.labels) - self.labels.count(IGNORED)


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
    compile_template(source, origin)
    return source


def set_chat_template(tokenizer: Any, name_or_file: str | Path) -> str:
    """Give a tokenizer a chat template, so that it is used from here on and saved with the model; return its text."""
    source = chat_template_text(tokenizer, name_or_file)
    tokenizer.chat_template = source
    return source


def template_hash(tokenizer: Any, chat_template: str | Path | None = None) -> str:
    """SHA-256 of what writes conversations for a tokenizer: the template's text and the special tokens, as hex digits.

    Args:
        tokenizer: A transformers tokenizer; where it has no template and none is passed, the text is empty.
        chat_template: As for `chat_template_text`.
    """
    known = chat_template is not None or tokenizer.chat_template
    source = chat_template_text(tokenizer, chat_template) if known else ""
    special = {str(name): str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([source, special], sort_keys=True).encode()).hexdigest()


_FORMATS: WeakKeyDictionary[Any, dict[tuple[Any, ...], ChatFormat]] = WeakKeyDictionary()


def chat_format(tokenizer: Any, chat_template: str | Path | None = None) -> ChatFormat:
    """The chat format of a tokenizer, kept with it and made anew when its special tokens or its template change."""
    source = chat_template_text(tokenizer, chat_template)
    key = (source, len(tokenizer), *tokenizer.special_tokens_map.items())
    known = _FORMATS.setdefault(tokenizer, {})
    if key not in known:
        known[key] = ChatFormat(tokenizer, source)
    return known[key]


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


@dataclass(frozen=True)
class _Piece:
    """The text between two cuts, and from where it is read: `anchor` lies at or before its beginning.

    The anchor is the last special token before the piece, so that a long conversation is not read again for each turn.
    """

    anchor: int
    begin: int
    end: int


def _pieces(layout: Layout) -> list[_Piece]:
    ends = [cut for cut in layout.cuts if 0 < cut < len(layout.text)] + [len(layout.text)]
    pieces: list[_Piece] = []
    begin = 0
    for end in ends:
        before = bisect_left(layout.anchors, begin)
        pieces.append(_Piece(layout.anchors[before - 1] if before else 0, begin, end))
        begin = end
    return pieces


def _tokens(tokenizer: Any, layouts: Sequence[Layout]) -> list[tuple[list[int], list[int]]]:
    """Tokenize texts so that no token crosses a cut: for each `(ids, positions of its cuts in ids)`.

    Each piece is read together with the text before it. Where the reading up to the cut stays the same, the piece's ids
    are simply the tokenizer's own; where the tokenizer would join characters across the cut, the piece is read as a
    continuation. Either way the ids up to a cut depend on the text up to that cut alone, which makes a prompt the
    prefix of its training row.
    """
    cut_up = [_pieces(layout) for layout in layouts]
    texts: dict[str, list[int]] = {"": []}  # a conversation's pieces share what they are read with, and so do rows
    for layout, pieces in zip(layouts, cut_up, strict=True):
        for piece in pieces:
            texts[layout.text[piece.anchor : piece.begin]] = []
            texts[layout.text[piece.anchor : piece.end]] = []
    texts.update(zip(texts, _encode(tokenizer, [*texts]), strict=True))
    result: list[tuple[list[int], list[int]]] = []
    for layout, pieces in zip(layouts, cut_up, strict=True):
        ids: list[int] = []
        places = {0: 0}
        for piece in pieces:
            shorter, longer = (texts[layout.text[piece.anchor : place]] for place in (piece.begin, piece.end))
            if longer[: len(shorter)] == shorter and ids[len(ids) - len(shorter) :] == shorter:
                ids = ids + longer[len(shorter) :]
            else:
                ids = ids + _encode_continuation(tokenizer, layout.text[piece.begin : piece.end])
            places[piece.end] = len(ids)
        result.append((ids, [places[cut] for cut in layout.cuts]))
    return result


def _surplus_bos(tokenizer: Any, ids: list[int]) -> int:
    """How many leading BOS tokens are too many."""
    bos = tokenizer.bos_token_id
    count = 0
    while bos is not None and count < len(ids) and ids[count] == bos:
        count += 1
    return max(0, count - 1)


def learned_turns(messages: Sequence[Message], train_on: TrainOn) -> frozenset[int]:
    """The positions of the turns that are learned.

    ``answers`` and ``all``: the assistant's, but for those marked as context. ``last``: of these the conversation's
    last assistant turn alone. ``custom``: exactly the turns that the data mark as learned, whoever speaks.

    Raises:
        DataError: For ``custom``, if the data mark no turn at all.
    """
    if train_on == "custom":
        if not any(message.marked for message in messages):
            raise DataError(
                "train_on is custom, but no turn says whether it is learned; give the turns that are a loss_weight "
                "(or weight, or train) of 1 and the others 0, or train on answers"
            )
        return frozenset(index for index, message in enumerate(messages) if message.marked and message.supervise)
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    chosen = answers[-1:] if train_on == "last" else answers
    return frozenset(index for index in chosen if messages[index].supervise)


def _turn_places(tokenizer: Any, layout: Layout, ids: list[int]) -> list[tuple[int, int]]:
    """The token ranges of `layout.turns`: the tokens that the text up to a place and the whole text have in common.

    A token that crosses the beginning counts as within, one that crosses the end does not.
    """
    places: list[int] = []
    for place in (place for turn in layout.turns for place in turn):
        before = replace(layout, text=layout.text[:place], cuts=tuple(cut for cut in layout.cuts if cut <= place))
        shorter = _tokens(tokenizer, [before])[0][0]
        differing = (at for at, pair in enumerate(zip(shorter, ids, strict=False)) if pair[0] != pair[1])
        places.append(next(differing, len(shorter)))
    return list(zip(places[::2], places[1::2], strict=True))


def _sample(tokenizer: Any, layout: Layout, ids: list[int], places: list[int], train_on: TrainOn) -> Sample:
    where = dict(zip(layout.cuts, places, strict=True))
    extra = _surplus_bos(tokenizer, ids)
    ranges = [(where[start], where[end]) for start, end in layout.answers] + _turn_places(tokenizer, layout, ids)
    answers = tuple((max(1, start - extra), end - extra) for start, end in sorted(ranges))
    ids = ids[extra:]
    if train_on == "all":
        labels = [IGNORED, *ids[1:]]
    else:
        labels = [IGNORED] * len(ids)
        for start, end in answers:
            labels[start:end] = ids[start:end]
    return Sample(ids, labels, answers=answers)


def _text_samples(tokenizer: Any, records: Sequence[Record]) -> list[Sample]:
    """Plain texts, all learned: BOS in front if the tokenizer adds one, the end token behind if the text ends."""
    samples: list[Sample] = []
    bos = [tokenizer.bos_token_id] if records and writes_bos(tokenizer) else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for record, read in zip(records, _encode(tokenizer, [str(record.text) for record in records]), strict=True):
        ids = [*bos, *read]
        ids = [*ids[_surplus_bos(tokenizer, ids) :], *(end if record.ends else [])]
        samples.append(Sample(ids, [IGNORED, *ids[1:]], answers=((min(1, len(ids)), len(ids)),)))
    return samples


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
        train_on: ``answers`` supervises assistant turns with their stop tokens, ``last`` only a conversation's last
            one, ``custom`` the turns that the data mark, ``all`` every token but the first. Texts are supervised whole
            in any case.
        chat_template: As for `chat_template_text`.

    Raises:
        DataError: If there are conversations and no usable template.
    """
    results: dict[int, Sample | DataError] = {}
    chats: dict[int, Record] = {}
    learned: list[frozenset[int]] = []
    texts: dict[int, Record] = {}
    for place, record in enumerate(records):
        if record.messages is None:
            texts[place] = record
            continue
        try:
            learned.append(learned_turns(record.messages, train_on))
            chats[place] = record
        except DataError as error:
            results[place] = located(record, error)
    layouts: dict[int, Layout] = {}
    for place, laid_out in zip(chats, _lay_out(chats, learned, tokenizer, chat_template), strict=True):
        if isinstance(laid_out, Layout):
            layouts[place] = laid_out
        else:
            results[place] = laid_out
    for place, layout, (ids, cuts) in zip(
        layouts, layouts.values(), _tokens(tokenizer, [*layouts.values()]), strict=True
    ):
        results[place] = _sample(tokenizer, layout, ids, cuts, train_on)
    results.update(zip(texts, _text_samples(tokenizer, [*texts.values()]), strict=True))
    return [results[place] for place in range(len(results))]


def _lay_out(
    chats: Mapping[int, Record], learned: Sequence[frozenset[int]], tokenizer: Any, chat_template: str | Path | None
) -> list[Layout | DataError]:
    """Layouts of conversations, or what is wrong with each, with its place in front."""
    if not chats:
        return []
    rows = [*chats.values()]
    try:
        form = chat_format(tokenizer, chat_template)
        laid_out = form.lay_out_all([record.messages or () for record in rows], learned)
    except StoppedError as error:
        raise located(rows[error.place], error) from error
    return [
        located(record, result) if isinstance(result, DataError) else result
        for record, result in zip(rows, laid_out, strict=True)
    ]


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


def as_messages(
    messages: Sequence[Message | Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[Message, ...]:
    """Messages from messages or from mappings with `role`, `content` and perhaps `tool_calls`.

    Args:
        messages: The turns.
        tools: Schemas of the functions that can be called; they are put on the first turn, as in a row with `tools`.

    Raises:
        DataError: If a turn or a function is not of that form.
    """
    result: list[Message] = []
    for message in messages:
        if isinstance(message, Message):
            result.append(message)
            continue
        role, content = message.get("role"), message.get("content")
        if message.get("tool_calls"):
            calls, said = read_calls(message["tool_calls"]), content or ""
            if not calls or not isinstance(said, str):
                raise DataError(f"tool_calls need a function with a name each, beside a text; got {dict(message)!r}")
            result.append(Message("assistant", "\n".join([said, *calls]).strip(), calls=calls, said=said))
            continue
        if role is None or role not in ROLES or not isinstance(content, str):
            raise DataError(f"a message needs a role ({', '.join(ROLES)}) and a text as content; got {dict(message)!r}")
        result.append(Message(ROLES[role], content))
    if tools:
        told, schemas = read_tools(list(tools))
        if not schemas:
            raise DataError("tools must be a list of functions, each an object with a name")
        first = result.pop(0) if result and result[0].role == "system" else Message("system", "")
        content = with_functions(first.content, told)
        result.insert(0, replace(first, content=content, tools=schemas, said=first.content))
    return tuple(result)


def prompt_ids(
    messages: Sequence[Message | Mapping[str, Any]],
    tokenizer: Any,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    chat_template: str | Path | None = None,
) -> list[int]:
    """Token ids that ask for the assistant's next turn, as training saw them before that turn.

    Args:
        messages: The conversation so far, ending with a turn that is not the assistant's.
        tokenizer: A transformers tokenizer.
        tools: Functions that can be called, for mappings; a record's messages hold theirs already.
        chat_template: As for `chat_template_text`.

    Raises:
        DataError: If there is no template, it refuses the turns, or there is nothing to answer.
    """
    chat = as_messages(messages, tools=tools)
    if not chat or chat[-1].role == "assistant":
        raise DataError("there is nothing to answer: the conversation must end with a turn that is not the assistant's")
    [layout] = chat_format(tokenizer, chat_template).lay_out_all([chat], [frozenset()], prompt=True)
    if isinstance(layout, DataError):
        raise layout
    ids = _tokens(tokenizer, [layout])[0][0]
    return ids[_surplus_bos(tokenizer, ids) :]


def stop_ids(tokenizer: Any, *, chat_template: str | Path | None = None) -> list[int]:
    """Ids at which an answer ends: the end token, and those the chat template closes an answer and a call with."""
    stops = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    asked, call = Message("user", "a"), '{"name": "a", "arguments": {}}'
    for said in (Message("assistant", "b"), Message("assistant", call, calls=(call,))):
        try:
            sample = render(Record("probe", 1, messages=(asked, said)), tokenizer, chat_template=chat_template)
        except DataError:
            continue
        last = sample.input_ids[sample.answers[-1][1] - 1]
        if last not in stops:
            stops.append(last)
    return stops
