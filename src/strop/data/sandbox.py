"""Chat templates, rendered in a sandbox with limits on time and size.

A chat template is a Jinja program that comes with a model, so it is not to be trusted. Here it runs in Jinja's
immutable sandbox (no attribute that leads out, no method that changes its arguments) with the functions that
transformers gives templates (`raise_exception`, `strftime_now`, `tojson`, `namespace`, `{% generation %}` blocks), and
on top of it:

- every pass of a loop and every call of a macro counts, and checks the processor time spent;
- everything written, in captured blocks too, counts against a size limit;
- operators, calls and filters that could make one huge value (`'a' * 10**9`, `ljust`, `format`) are checked first.

A template that goes over a limit raises `TemplateLimitError`. Text is the same as transformers renders it. All of this
runs in a process of its own (`rendering.py`), which the operating system limits as well.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 2.0  # of this thread's processor time, so that a busy machine stops nothing
MAX_CHARACTERS = 8_000_000
MAX_TEMPLATE_CHARACTERS = 400_000
MAX_STEPS = 50_000

# Marks around a generation block in the raw output: halves of surrogate pairs, which no valid text holds.
_START, _END = "\ud8f0", "\ud8f1"


class TemplateLimitError(jinja2.TemplateError):
    """A template took too long or wrote too much."""


@dataclass(frozen=True)
class Rendered:
    """What a template wrote, and the character ranges [start, end) of its generation blocks."""

    text: str
    marks: tuple[tuple[int, int], ...]


class _Meter:
    """Counts steps, characters and seconds of one rendering."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.steps = 0
        self.characters = 0
        self.deadline = time.thread_time() + MAX_SECONDS

    def step(self, characters: int = 0) -> str:
        """Count one pass of a loop or one call that writes `characters` of fixed text."""
        self.steps += 1
        if self.steps > MAX_STEPS or (self.steps % 64 == 0 and time.thread_time() > self.deadline):
            raise TemplateLimitError(f"the template runs too long (more than {MAX_STEPS} steps or {MAX_SECONDS:g} s)")
        self.write(characters)
        return ""

    def write(self, characters: int) -> None:
        self.characters += characters
        if self.characters > MAX_CHARACTERS:
            raise TemplateLimitError(f"the template writes more than {MAX_CHARACTERS} characters")


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise TemplateLimitError(f"the template builds a value of more than {MAX_CHARACTERS} characters")


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 1


def _check_arguments(values: Sequence[Any]) -> None:
    """Refuse widths and counts that only serve to make something huge, in numbers and in format specifications."""
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_CHARACTERS:
            raise TemplateLimitError(f"the template passes the number {value}, above the limit of {MAX_CHARACTERS}")


def _check_format(text: str) -> None:
    """Refuse a format specification with a width or precision that only serves to make something huge."""
    pieces = re.findall(r"%[-#0 +^_]*[\d.]+|:[^{}]*", text)
    _check_arguments([int(width[:12]) for piece in pieces for width in re.findall(r"\d+", piece)])


class _Generation(ext.Extension):
    """`{% generation %}...{% endgeneration %}`: the part of a turn that the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012  the attribute's form is Jinja's

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [
            nodes.Output([nodes.TemplateData(_START)]).set_lineno(line),
            *body,
            nodes.Output([nodes.TemplateData(_END)]).set_lineno(line),
        ]


class _Namespace(jinja2.utils.Namespace):
    """A namespace that holds no name with an underscore in front, so that none of Python's internals is reached."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the name {name!r}")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a meter."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, meter: _Meter) -> None:
        self.meter = meter
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols], finalize=self._finalize
        )
        for name, function in list(self.filters.items()):
            self.filters[name] = _guarded(function)
        self.filters["tojson"] = _to_json
        del self.globals["lipsum"]
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=lambda form: datetime.now().strftime(form),
            namespace=_Namespace,
            dict=lambda *args, **kwargs: dict(*args, **kwargs),
            _strop_step=meter.step,
        )

    def _finalize(self, value: Any) -> Any:
        self.meter.write(len(value) if isinstance(value, str) else 16)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                _check_size(max(abs(left).bit_length(), abs(right).bit_length()))
            else:
                sequence, count = (left, right) if not isinstance(left, int) else (right, left)
                if isinstance(count, int):
                    _check_size(_size(sequence) * count)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_size(left.bit_length() * abs(right))
        elif operator == "+":
            _check_size(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            _check_arguments(list(right) if isinstance(right, tuple) else [right])
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        _check_arguments([*args, *kwargs.values()])
        method = getattr(obj, "__wrapped__", obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if obj is self.globals["strftime_now"] and args:
            _check_format(str(args[0]))
        if isinstance(owner, str):
            if name in ("format", "format_map"):
                _check_format(owner)
            if name == "replace" and len(args) >= 2:
                _check_size(len(owner) + owner.count(args[0]) * _size(args[1]))
            if name == "join" and args and isinstance(args[0], Sequence):
                _check_size(len(owner) * len(args[0]) + sum(_size(item) for item in args[0]))
        return super().call(context, obj, *args, **kwargs)


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that checks its arguments and counts its result; Jinja's marks (pass_environment, ...) are kept."""

    def filtered(*args: Any, **kwargs: Any) -> Any:
        _check_arguments([*args, *kwargs.values()])
        if function.__name__ == "do_format" and args:
            _check_format(str(args[0]))
        if function.__name__ == "do_replace" and len(args) >= 4:
            _check_size(len(str(args[1])) + str(args[1]).count(str(args[2])) * len(str(args[3])))
        if function.__name__ in ("sync_do_join", "do_join") and len(args) >= 2 and isinstance(args[1], Sequence):
            glue = str(args[2]) if len(args) > 2 else str(kwargs.get("d", ""))
            _check_size(len(glue) * len(args[1]) + sum(_size(item) for item in args[1]))
        return function(*args, **kwargs)

    filtered.__dict__.update(getattr(function, "__dict__", {}))
    filtered.__name__ = getattr(function, "__name__", "filter")
    return filtered


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  the signature is the one templates call
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    if indent is not None and int(indent) > 64:
        raise TemplateLimitError(f"tojson with an indent of {indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _fixed_characters(body: Sequence[nodes.Node]) -> int:
    return sum(
        len(data.data)
        for node in body
        for data in [node, *node.find_all(nodes.TemplateData)]
        if isinstance(data, nodes.TemplateData)
    )


def _meter_tree(tree: nodes.Template) -> nodes.Template:
    """Put a step into the body of every loop, macro and call block, and make `~` an operator that is checked."""
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)
        cost = nodes.Const(_fixed_characters(node.body))
        call = nodes.Call(nodes.Name("_strop_step", "load"), [cost], [], None, None)
        step = nodes.ExprStmt(call).set_lineno(node.lineno)
        step.set_environment(tree.environment)  # type: ignore[arg-type]
        node.body.insert(0, step)
    for node in list(tree.find_all(nodes.Concat)):
        # `a ~ b` in a loop doubles as well as `a + b` does: as a join filter it is checked like one.
        items = nodes.List(list(node.nodes), lineno=node.lineno)
        node.nodes = [nodes.Filter(items, "join", [], [], None, None, lineno=node.lineno)]
        node.set_environment(tree.environment)  # type: ignore[arg-type]
    return tree


class ChatTemplate:
    """A compiled template.

    Args:
        source: The Jinja text.

    Raises:
        jinja2.TemplateError: If the text is not valid Jinja or longer than `MAX_TEMPLATE_CHARACTERS`.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise TemplateLimitError(f"the template has {len(source)} characters, above {MAX_TEMPLATE_CHARACTERS}")
        self._meter = _Meter()
        environment = _Environment(self._meter)
        self._template = environment.from_string(_meter_tree(environment.parse(source)))
        self.has_marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Rendered:
        """Render a conversation.

        Args:
            messages: Turns with ``role`` and ``content``, and perhaps ``tool_calls``.
            variables: Everything else the template sees: special tokens, ``tools``, ``add_generation_prompt``.

        Raises:
            jinja2.TemplateError: If the template raises, or goes over a limit.
        """
        self._meter.reset()
        chat, variables = _without_marks(list(messages)), _without_marks(dict(variables))
        try:
            raw = "".join(self._blocks(chat, variables))
        except jinja2.TemplateError:
            raise
        except (RecursionError, MemoryError, OverflowError) as error:
            raise TemplateLimitError(f"the template runs out of bounds ({type(error).__name__})") from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ZeroDivisionError) as error:
            raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
        rendered = _split_marks(raw) if self.has_marks else Rendered(raw, ())
        try:
            rendered.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise jinja2.TemplateRuntimeError(f"it writes half of a surrogate pair ({error.reason})") from error
        return rendered

    def _blocks(self, chat: list[dict[str, Any]], variables: Mapping[str, Any]) -> Iterator[str]:
        values = {"tools": None, "documents": None, **variables, "messages": chat}
        size = 0
        for block in self._template.generate(values):
            size += len(block)
            _check_size(size)
            yield block


def _without_marks(value: Any) -> Any:
    """The same value with no mark in any of its texts."""
    if isinstance(value, str):
        return value.replace(_START, "").replace(_END, "") if _START in value or _END in value else value
    if isinstance(value, dict):
        return {_without_marks(key): _without_marks(inner) for key, inner in value.items()}
    return [_without_marks(inner) for inner in value] if isinstance(value, list) else value


def _split_marks(raw: str) -> Rendered:
    """Take the marks out of the output and note where they stood."""
    pieces: list[str] = []
    marks: list[tuple[int, int]] = []
    position, start = 0, None
    for piece in re.split(f"({_START}|{_END})", raw):
        if piece == _START:
            start = position
        elif piece == _END:
            if start is not None and position > start:
                marks.append((start, position))
            start = None
        else:
            pieces.append(piece)
            position += len(piece)
    return Rendered("".join(pieces), tuple(marks))


@lru_cache(maxsize=32)
def compiled(source: str) -> ChatTemplate:
    """The compiled template of a text; the last 32 are kept."""
    return ChatTemplate(source)
