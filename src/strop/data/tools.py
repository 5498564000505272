"""Functions that a conversation may call, and calls of them: read from the data, and given to a chat template.

A conversation carries its functions on its first turn (`Message.tools`) and its calls on the turns that make them
(`Message.calls`), both as JSON text beside the plain text that stands for them in `content`. A template that knows
tools gets them as transformers passes them (`tools=[...]`, `tool_calls`, the role `tool`); any other gets the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strop.data.records import Message


def _parsed(value: Any) -> Any:
    """The JSON value of a text; None where it is none."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return None


def _named(value: Any) -> Mapping[str, Any] | None:
    """The object with the name: the value itself or its `function`."""
    inner = value.get("function", value) if isinstance(value, Mapping) else None
    return inner if isinstance(inner, Mapping) and isinstance(inner.get("name"), str) else None


def read_tools(value: Any) -> tuple[str, str]:
    """A row's `tools`: the text that stands for them, and the same as a JSON list of schemas.

    Args:
        value: A list of functions (`{name, description, parameters}`, or that inside `{type, function}`), one of them,
            or either as JSON text.

    Returns:
        Two texts, both empty where there are no tools; the second empty too where they are not a list of functions.
    """
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | Mapping) and value else value
    if not isinstance(text, str) or text.strip() in ("", "[]", "{}", "null"):
        return "", ""
    tools = _parsed(value)
    listed = [tools] if isinstance(tools, Mapping) else tools
    functions = [_named(tool) for tool in listed] if isinstance(listed, list) else [None]
    if None in functions:
        return text.strip(), ""
    return text.strip(), json.dumps([{"type": "function", "function": f} for f in functions], ensure_ascii=False)


def with_functions(said: str, functions: str) -> str:
    """The text of a first turn with the functions that can be called, for a template that knows no tools."""
    return "\n\n".join(text for text in (said, f"Functions that can be called:\n{functions}" * bool(functions)) if text)


def read_calls(value: Any) -> tuple[str, ...]:
    """Calls, or a text that holds them, each as JSON `{name, arguments}`; none where they are not of that form."""
    value = _parsed(value)
    calls = [_named(call) for call in (value if isinstance(value, list) else [value])]
    if not calls or None in calls:
        return ()
    return tuple(call_text(call["name"], call.get("arguments", {})) for call in calls if call is not None)


def call_text(name: str, arguments: Any) -> str:
    """One call as JSON text; arguments that are JSON text themselves are taken apart."""
    parsed = _parsed(arguments)
    return json.dumps({"name": name, "arguments": arguments if parsed is None else parsed}, ensure_ascii=False)


def as_turns(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """A conversation as transformers gives it to a template that knows tools: its turns, and its functions.

    Calls are numbered from the beginning (`000000001`; some templates ask for nine letters or digits), and an answer of
    a tool bears the number and the name of the earliest call that is still open.
    """
    turns: list[dict[str, Any]] = []
    tools: list[Any] | None = None
    made, waiting = 0, []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tools:
            tools, turn["content"] = json.loads(message.tools), message.said
            if not message.said:
                continue
        if message.calls:
            calls = [json.loads(call) for call in message.calls]
            numbers = [f"{made + place:09d}" for place in range(1, len(calls) + 1)]
            made += len(calls)
            waiting = [(number, call["name"]) for number, call in zip(numbers, calls, strict=True)]
            turn["content"] = message.said
            turn["tool_calls"] = [
                {"id": number, "type": "function", "function": call}
                for number, call in zip(numbers, calls, strict=True)
            ]
        elif message.role == "tool" and waiting:
            turn["tool_call_id"], turn["name"] = waiting.pop(0)
        turns.append(turn)
    return turns, tools
