"""What each row of a data set means, whichever of the field's habits it follows: fields into records.

A `Record` is either a conversation (`messages`) or a plain `text`. Recognised by their field names:

    messages                      a list of {role, content}; content a text or a list of text parts
    conversations                 sharegpt: a list of {from, value}; beside it `system` and `tools`
    instruction, input, output    alpaca; beside it `system` and `history`
    prompt, completion            texts, or lists of messages
    question, answer
    text, category (or label, intent)   a classification row: the label is the answer
    text                          plain text

Everything else is refused with the field that is wrong; preference pairs (chosen, rejected) are refused by name. This
module opens no file, reads no chat template and no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from strop.data.pieces import split_text
from strop.data.readers import RawRow, kind_of, parse_json
from strop.data.tools import call_text, read_calls, read_tools, with_functions
from strop.errors import nearest

Role = Literal["system", "user", "assistant", "tool"]

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}

_ANSWERS = ("category", "label", "intent")

_KNOWN_SHAPES = (
    "messages; conversations; instruction and output; prompt and completion; question and answer; "
    "text with category, label or intent; text"
)

KNOWN_FIELDS = (
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "question",
    "answer",
    "text",
    *_ANSWERS,
)


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: Who speaks.
        content: The whole turn as text; calls, and functions that can be called, are written out in it.
        supervise: False where the data say that the turn is context only (loss_weight 0).
        marked: Whether the data say of this turn if it is learned.
        calls: The functions that the turn calls, each as JSON `{name, arguments}`.
        tools: On the first turn, the functions that can be called in the conversation: a JSON list of schemas.
        said: Where there are calls or tools, the text beside them.
    """

    role: Role
    content: str
    supervise: bool = True
    marked: bool = False
    calls: tuple[str, ...] = ()
    tools: str = ""
    said: str = ""


@dataclass(frozen=True)
class Record:
    """One row: a conversation or a text, and where it came from.

    Attributes:
        source: The file or dataset.
        row: The 1-based line (jsonl, csv, txt) or position (json, parquet, datasets).
        messages: The conversation, or None.
        text: The plain text, or None.
        ends: For a text, whether it ends here; False for a piece that the next record continues.
    """

    source: str
    row: int
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    ends: bool = True


class RowError(Exception):
    """A row that cannot be understood; the text names the field."""


def _text_of(value: Any, where: str) -> str:
    """The text of a field: a string, or a list of text parts that are joined."""
    if isinstance(value, list) and value:
        parts: list[str] = []
        for index, part in enumerate(value):
            if isinstance(part, str):
                parts.append(part)
                continue
            if not isinstance(part, Mapping):
                raise RowError(f"{where}[{index}] is {kind_of(part)}; a part must be a text or {{type, text}}")
            kind = part.get("type", "text")
            inner = next((part[name] for name in ("text", "value", "content") if part.get(name) is not None), None)
            if kind != "text":
                raise RowError(f"{where}[{index}] is a part of type {kind!r}; only text parts can be trained on")
            if not isinstance(inner, str):
                raise RowError(f"{where}[{index}] has no text ({kind_of(inner)})")
            parts.append(inner)
        value = "".join(parts)
    if not isinstance(value, str):
        raise RowError(f"{where} is {kind_of(value)}; it must be a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"{where} holds half of a surrogate pair at character {error.start}; write the whole one"
        ) from None
    if "\0" in value:
        raise RowError(f"{where} holds a NUL at character {value.index(chr(0))}; take it out")
    return value


def _filled_text(value: Any, where: str) -> str:
    text = _text_of(value, where)
    if not text.strip():
        raise RowError(f"{where} is empty; give it a text or leave the row out")
    return text


def _optional_text(fields: Mapping[str, Any], name: str) -> str:
    """A field that may be missing, null or empty."""
    value = fields.get(name)
    return "" if value is None else _text_of(value, f"field {name!r}").strip()


def _weight(turn: Mapping[str, Any], where: str) -> bool | None:
    """Whether a turn is learned: `loss_weight` or `weight` of 0 or 1, `train` true or false; None: it is not said."""
    for name in ("loss_weight", "weight", "train"):
        value = turn.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise RowError(f"{where}.{name} is {value!r}; only 0 (context) and 1 (learned) are supported")
        return bool(value)
    return None


def _tool_calls(turn: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Calls of functions, each as JSON `{name, arguments}`."""
    calls = turn.get("tool_calls")
    if not calls:
        return ()
    if not isinstance(calls, list):
        raise RowError(f"{where}.tool_calls is {kind_of(calls)}; it must be a list")
    lines: list[str] = []
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}.tool_calls[{index}] has no function name")
        lines.append(call_text(function["name"], function.get("arguments", {})))
    return tuple(lines)


def _turn(turn: Any, where: str) -> Message | None:
    """One turn of messages or conversations; None for a system turn without text."""
    if not isinstance(turn, Mapping):
        raise RowError(f"{where} is {kind_of(turn)}; it must be an object with role and content")
    role_name = "role" if "role" in turn else "from"
    content_name = "content" if "content" in turn or "value" not in turn else "value"
    if role_name not in turn:
        raise RowError(f"{where} has no role (fields: {', '.join(map(str, turn)) or 'none'})")
    role = turn[role_name]
    if not isinstance(role, str) or role.lower() not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise RowError(f"{where}.{role_name} is {role!r}; known roles: {', '.join(ROLES)}{hint}")
    known_role = ROLES[role.lower()]
    calls, weight = _tool_calls(turn, where), _weight(turn, where)
    learned, marked = weight is not False, weight is not None
    content = turn.get(content_name)
    field = f"{where}.{content_name}"
    if calls:
        said = "" if content is None else _text_of(content, field).strip()
        whole = "\n".join([said, *calls]).strip()
        return Message("assistant", whole, learned, marked, calls=calls, said=said)
    if content_name not in turn:
        raise RowError(f"{field} is missing")
    if known_role == "system":
        text = _text_of(content, field)
        return Message("system", text, learned, marked) if text.strip() else None
    if role.lower() not in ("function_call", "tool_call"):
        return Message(known_role, _filled_text(content, field), learned, marked)
    if isinstance(content, Mapping | list):
        content = json.dumps(content, ensure_ascii=False)
    text = _filled_text(content, field)
    return Message(known_role, text, learned, marked, calls=read_calls(text))


def _turns(value: Any, name: str) -> list[Message]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:  # a csv cell or a parquet column may hold the list as JSON
            value = parse_json(value)
        except ValueError as error:
            raise RowError(f"field {name!r} looks like a JSON list but is not valid JSON ({error})") from None
    if not isinstance(value, list):
        raise RowError(f"field {name!r} is {kind_of(value)}; it must be a list of turns")
    if not value:
        raise RowError(f"field {name!r} is empty; it needs at least one turn")
    turns = [_turn(turn, f"{name}[{index}]") for index, turn in enumerate(value)]
    kept = [turn for turn in turns if turn is not None]
    spoken = next((turn for turn in kept if turn.role != "system"), None)
    if name != "completion" and spoken is not None and spoken.role == "tool":
        raise RowError(f"field {name!r} begins with a tool's answer, and nothing was called; put the call before it")
    return kept


def _with_system(fields: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Put the row's `system` text and `tools` in front, merged into the conversation's own system turn."""
    system = _optional_text(fields, "system")
    told, tools = read_tools(fields.get("tools"))
    first = Message("system", "")
    if messages and messages[0].role == "system":
        first, messages = messages[0], messages[1:]
    said = "\n\n".join(text for text in (first.content, system) if text)
    content = with_functions(said, told)
    if not content:
        return messages
    return [replace(first, content=content, tools=tools, said=said if tools else ""), *messages]


def _from_messages(fields: Mapping[str, Any]) -> list[Message]:
    return _with_system(fields, _turns(fields["messages"], "messages"))


def _from_conversations(fields: Mapping[str, Any]) -> list[Message]:
    return _with_system(fields, _turns(fields["conversations"], "conversations"))


def _from_alpaca(fields: Mapping[str, Any]) -> list[Message]:
    question = _filled_text(fields["instruction"], "field 'instruction'")
    addition = _optional_text(fields, "input")
    messages: list[Message] = []
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise RowError(f"field 'history' is {kind_of(history)}; it must be a list of [question, answer] pairs")
    for index, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"history[{index}] must be a pair [question, answer]")
        messages.append(Message("user", _filled_text(pair[0], f"history[{index}][0]")))
        messages.append(Message("assistant", _filled_text(pair[1], f"history[{index}][1]")))
    messages.append(Message("user", f"{question}\n{addition}" if addition else question))
    messages.append(Message("assistant", _filled_text(fields["output"], "field 'output'")))
    return _with_system(fields, messages)


def _from_prompt(fields: Mapping[str, Any]) -> list[Message]:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _with_system(fields, [*_turns(prompt, "prompt"), *_turns(completion, "completion")])
    question = Message("user", _filled_text(prompt, "field 'prompt'"))
    return _with_system(fields, [question, Message("assistant", _filled_text(completion, "field 'completion'"))])


def _from_question(fields: Mapping[str, Any]) -> list[Message]:
    question = Message("user", _filled_text(fields["question"], "field 'question'"))
    return _with_system(fields, [question, Message("assistant", _filled_text(fields["answer"], "field 'answer'"))])


def _from_label(fields: Mapping[str, Any]) -> list[Message]:
    name = max((name for name in _ANSWERS if name in fields), key=lambda name: fields[name] is not None)
    label = fields[name]
    if isinstance(label, int) and not isinstance(label, bool):
        label = str(label)
    question = Message("user", _filled_text(fields["text"], "field 'text'"))
    return [question, Message("assistant", _filled_text(label, f"field {name!r}"))]


_SHAPES: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], list[Message]]], ...] = (
    (("messages",), _from_messages),
    (("conversations",), _from_conversations),
    (("instruction", "output"), _from_alpaca),
    (("prompt", "completion"), _from_prompt),
    (("question", "answer"), _from_question),
    *((("text", answer), _from_label) for answer in _ANSWERS),
)


def _unrecognised(fields: Mapping[str, Any]) -> str:
    names = [str(name) for name in fields]
    for needed, _ in _SHAPES:
        missing = [name for name in needed if name not in fields]
        if len(needed) > len(missing) > 0 and needed[0] != "text":
            return (
                f"field {missing[0]!r} is missing beside {', '.join(repr(n) for n in needed if n in fields)} "
                f"(fields: {', '.join(names)})"
            )
    hint = next((nearest(name, KNOWN_FIELDS) for name in names if nearest(name, KNOWN_FIELDS)), "")
    return f"fields {', '.join(names) or '(none)'} are not a known kind of row{hint}; known: {_KNOWN_SHAPES}"


def to_records(row: RawRow, source: str) -> Iterator[Record]:
    """What a row means: one record; several for a text without line ends that is too long to be read at once.

    Raises:
        RowError: If it is not understood; the text names the field.
    """
    fields = row.fields
    if "chosen" in fields and "rejected" in fields:
        raise RowError(
            "fields 'chosen' and 'rejected' make a preference pair; preference pairs (DPO and its kin) are not "
            "supported yet: keep the chosen answers as messages to fine-tune on them"
        )
    filled = {name for name, value in fields.items() if value is not None}
    for names in (filled, set(fields)):  # in tables a null may stand for a field that is not there
        for needed, convert in _SHAPES:
            if names.issuperset(needed):
                yield Record(source, row.number, messages=tuple(convert(fields)))
                return
    if "text" not in fields:
        raise RowError(_unrecognised(fields))
    parts = split_text(_filled_text(fields["text"], "field 'text'"))
    for place, part in enumerate(parts, start=1):
        yield Record(source, row.number, text=part, ends=row.ends and place == len(parts))
