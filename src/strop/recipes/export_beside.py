"""What stands beside a GGUF file: its card, its receipt, and an Ollama Modelfile.

    model.gguf.md          what it is, what it was made of (by hash), what was lost, how it was proved, how to run it
    model.gguf.json        the same as plain values, tensor by tensor
    model.gguf.Modelfile   for `ollama create NAME -f model.gguf.Modelfile`

Ollama's templates are not Jinja. `ollama_template` finds one by what the model's own template writes around turns, and
keeps it only if it writes the same text for several conversations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from strop import __version__
from strop.config import load_config
from strop.data.layout import added_tokens
from strop.data.records import Message
from strop.data.templates import chat_format
from strop.errors import DataError, FileFormatError, MissingInputError, StropError
from strop.recipes.manifest import load_manifest
from strop.recipes.provenance import merged_adapter

CARD, RECEIPT, MODELFILE = ".md", ".json", ".Modelfile"
"""Endings after the file's own name."""

_MARKS: Final = ("strop-system", "strop-first", "strop-answer", "strop-second")


def origin(folder: Path) -> dict[str, Any]:
    """What is recorded of how a folder was made: a run's data and settings, a quantized model's method and rows."""
    found: dict[str, Any] = {}
    merged = merged_adapter(folder)
    for place in (folder, folder.parent, *(() if merged is None else (merged, merged.parent))):
        try:
            manifest = load_manifest(place)
        except (MissingInputError, FileFormatError):
            continue
        if manifest.get("kind") == "run":
            inputs = manifest["inputs"]
            found["run"] = {
                "data": _nameable(inputs["data"]),
                "rows_sha256": inputs["rows"]["sha256"],
                "base": _nameable(inputs["base"]),
                "template_sha256": inputs["template"]["sha256"],
                "configuration_sha256": inputs["configuration"]["sha256"],
                "method": _method(place),
            }
            break
    receipt = folder / "receipt.json"
    if receipt.is_file():
        fields = json.loads(receipt.read_text(encoding="utf-8"))
        found["quantized"] = {key: fields.get(key) for key in ("source", "requested", "settings", "held_out")}
    return found


def _nameable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of an input without where it lay on this machine: the file is sent to others."""
    return {key: value for key, value in record.items() if key not in ("path", "from_run")}


def _method(run: Path) -> dict[str, Any] | None:
    """How a run trained, from its config.yaml; None where that cannot be read any more."""
    try:
        return load_config(run / "config.yaml").method.model_dump(mode="json", exclude_none=True)
    except StropError:
        return None


def card(name: str, receipt: Mapping[str, Any], summary: Sequence[str], *, prompt: bool, adapter: bool = False) -> str:
    """The model card, Markdown.

    Args:
        name: the file's name.
        receipt: as `export` makes it.
        summary: what became of the tensors, in sentences.
        prompt: whether the model has a chat template.
        adapter: the file holds an adapter alone, which runs beside its base's file.
    """
    made = receipt["made_by"]
    run = receipt["origin"].get("run")
    lines = [
        "---",
        "library_name: gguf",
        f"base_model: {json.dumps(run['base']['name'] if run else receipt['model'])}",
        "tags: [gguf, strop]",
        "---",
        "",
        f"# {name}",
        "",
        f"`{receipt['model']}` as one GGUF file, `{receipt['format']}`, written by strop {made['strop']} in "
        f"{made['seconds']:.1f} s with {made['peak_bytes'] / 1e6:,.0f} MB of memory.",
        "",
        "| | |",
        "|-|-|",
        f"| file | {name}, {receipt['bytes']:,} bytes, SHA-256 `{receipt['sha256']}` |",
        f"| made of | `{receipt['model']}`, SHA-256 of configuration and weights `{receipt['base_sha256']}` |",
        *_origin_rows(receipt),
        "",
        "## What was lost",
        "",
        *(f"- {line}" for line in summary),
        *(f"- {note}" for note in receipt["notes"]),
        "",
        f"Tensor by tensor: `{name}{RECEIPT}`.",
        "",
        "## Proof",
        "",
        *(f"- {line}" for line in receipt["proof"]),
        "",
        "## How to run it",
        "",
        "```sh",
        *_commands(name, prompt=prompt, adapter=adapter),
        "```",
        "",
    ]
    return "\n".join(lines)


def _commands(name: str, *, prompt: bool, adapter: bool) -> list[str]:
    if adapter:
        return [f"llama-cli -m BASE.gguf --lora {name}", f"llama-server -m BASE.gguf --lora {name}"]
    return [
        f"llama-cli -m {name}" + (" -cnv" if prompt else " -p 'Once upon a time'"),
        f"llama-server -m {name}",
        f"strop chat {name}",
    ]


def _origin_rows(receipt: Mapping[str, Any]) -> list[str]:
    rows = []
    run = receipt["origin"].get("run")
    if run:
        data = run["data"]
        rows.append(f"| trained on | {data['name']}, SHA-256 of the rendered rows `{run['rows_sha256']}` |")
        rows.append(f"| trained from | {run['base']['name']}, SHA-256 `{run['base']['sha256']}` |")
        if run["method"] is not None:
            rows.append(f"| method | {_method_words(run['method'])} |")
        rows.append(f"| settings | SHA-256 `{run['configuration_sha256']}` |")
    quantized = receipt["origin"].get("quantized")
    if quantized:
        settings = quantized.get("settings") or {}
        held = quantized.get("held_out") or {}
        figure = f", KL {held['kl']:.2e} on held-out rows" if isinstance(held.get("kl"), float) else ""
        rows.append(f"| quantized before | {quantized['requested']} by {settings.get('method')}{figure} |")
    importance = receipt.get("importance")
    if importance:
        rows.append(
            f"| columns weighed by | {importance['data']}: {importance['rows']} rows, {importance['tokens']:,} tokens, "
            f"SHA-256 `{importance['sha256']}` |"
        )
    return rows


def _method_words(method: Mapping[str, Any]) -> str:
    """`lora: rank 8, alpha 16, targets all-linear`; what is off is left out."""
    words = []
    for key, value in method.items():
        if key == "name" or value is False or value == 0:
            continue
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        what = key.replace("_", " ")
        words.append(what if value is True else f"{what} {shown:g}" if isinstance(value, float) else f"{what} {shown}")
    return ": ".join([str(method["name"]), *([", ".join(words)] if words else [])])


def modelfile(name: str, tokenizer: Any, stops: Sequence[str], *, adds_bos: bool, context: int) -> str:
    """An Ollama Modelfile.

    Args:
        name: the GGUF file's name, in the same folder.
        tokenizer: the model's; None where transformers opens none.
        stops: texts that end an answer.
        adds_bos: whether the runtime puts the first token before the text.
        context: tokens that fit.
    """
    lines = [f"# written by strop {__version__}: ollama create NAME -f {name}{MODELFILE}", f"FROM ./{name}"]
    if tokenizer is not None and tokenizer.chat_template:
        template = ollama_template(tokenizer, adds_bos=adds_bos)
        if template is None:
            lines.append("# The chat template cannot be written as Ollama's; it stands in the GGUF file itself.")
        else:
            lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join([*lines, ""])


def ollama_template(tokenizer: Any, *, adds_bos: bool) -> str | None:
    """The chat template in Ollama's language; None where it cannot be said there.

    Found from what stands before, between and behind the turns of one conversation, and held against three others.
    """
    system, first, answer, second = _MARKS
    chat = [Message("user", first), Message("assistant", answer), Message("user", second)]
    text = _prompt(tokenizer, chat)
    if text is None or any(text.count(mark) != 1 for mark in _MARKS[1:]):
        return None
    before, rest = text.split(first)
    asked, rest = rest.split(answer)
    between, after = rest.split(second)
    if not asked.startswith(after):
        return None
    opened = asked.removeprefix(after)  # what stands before an answer that is there, and not where one is asked for
    begin, user = _common(before, between, added_tokens(tokenizer))
    end = between.removesuffix(user)
    with_system = _prompt(tokenizer, [Message("system", system), chat[0]])
    says: tuple[str, str] | None = None
    if with_system is not None and with_system.count(system) == 1 and with_system.count(first) == 1:
        head, rest = with_system.split(system)
        middle, _ = rest.split(first)
        if head.startswith(begin) and middle.endswith(user):
            says = (head.removeprefix(begin), middle.removesuffix(user))

    def written(messages: Sequence[Message]) -> str | None:
        parts = [begin]
        for turn in messages:
            if turn.role == "system":
                if says is None:
                    return None
                parts.append(says[0] + turn.content + says[1])
            elif turn.role == "user":
                parts.append(user + turn.content + after)
            else:
                parts.append(opened + turn.content + end)
        return "".join(parts)

    tests = [chat, [*chat, Message("assistant", "b"), Message("user", "c\nd")], [Message("user", "é {x}")]]
    if says is not None:
        tests.append([Message("system", "be brief"), *chat])
    if any(written(messages) != _prompt(tokenizer, messages) for messages in tests):
        return None
    bos = tokenizer.bos_token
    opening = begin.removeprefix(bos) if adds_bos and bos else begin
    roles = [] if says is None else [f'eq .Role "system" }}}}{_go(says[0])}{{{{ .Content }}}}{_go(says[1])}']
    roles += [
        f'eq .Role "user" }}}}{_go(user)}{{{{ .Content }}}}{_go(after)}',
        f'eq .Role "assistant" }}}}{_go(opened)}{{{{ .Content }}}}{_go(end)}',
    ]
    body = "{{ if " + "{{ else if ".join(roles) + "{{ end }}"
    template = f"{_go(opening)}{{{{ range .Messages }}}}{body}{{{{ end }}}}"
    return None if '"""' in template else template


def _common(before: str, between: str, tokens: Sequence[str]) -> tuple[str, str]:
    """What stands before the first user's turn alone, and what before each: the longest ending that both have.

    No special token is cut in two.
    """
    length = 0
    while length < min(len(before), len(between)) and before[-1 - length] == between[-1 - length]:
        length += 1
    while _cuts_token(before, len(before) - length, tokens) or _cuts_token(between, len(between) - length, tokens):
        length -= 1
    return before[: len(before) - length], before[len(before) - length :]


def _cuts_token(text: str, place: int, tokens: Sequence[str]) -> bool:
    return any(
        text.startswith(token, start) for token in tokens for start in range(max(0, place - len(token) + 1), place)
    )


def _go(text: str) -> str:
    """Literal text in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def _prompt(tokenizer: Any, messages: Sequence[Message]) -> str | None:
    """What the template writes to ask for the next answer; None where it refuses."""
    try:
        [layout] = chat_format(tokenizer).lay_out_all([list(messages)], [frozenset()], prompt=True)
    except DataError:
        return None
    return None if isinstance(layout, DataError) else layout.text
