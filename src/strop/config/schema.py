"""The JSON schema of the YAML file, for editors."""

from __future__ import annotations

from typing import cast

from strop.config.names import (
    ALIASES,
    DEFAULT_METHOD,
    GROUPS,
    KEYS,
    LENGTHS,
    METHODS,
    OTHER_NAMES,
    fields_of,
)
from strop.config.settings import DataPart, Top


def _names(key: str) -> list[str]:
    return [key, *OTHER_NAMES.get(key, "").split()]


def json_schema() -> dict[str, object]:
    """A JSON schema (draft 2020-12) of the YAML file, for editors: every key, alias and forbidden pair."""
    properties: dict[str, object] = {}
    for group in (Top, *METHODS.values(), *LENGTHS.values(), *GROUPS.values()):
        fields = group.model_json_schema()["properties"]
        for key in fields_of(group):
            properties[key] = {name: value for name, value in fields[key].items() if name != "title"}
    names_or_text = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    properties["targets"] = names_or_text | {"description": "all-linear, or names, suffixes and patterns of layers."}
    part = DataPart.model_json_schema()
    properties["data"] = {
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string", "minLength": 1}, part]}},
        ],
        "description": cast("dict[str, object]", properties["data"])["description"],
    }
    properties["method"] = {
        "enum": list(METHODS),
        "default": DEFAULT_METHOD,
        "description": "Trained: every weight, an adapter, one over a quantized base, or either through the rounding.",
    }
    for alias, key in ALIASES.items():
        properties[alias] = cast("dict[str, object]", properties[key]) | {"description": f"The same as {key}."}
    rules: list[object] = []
    for method, group in METHODS.items():
        foreign = [key for key, owner in KEYS.items() if owner and key not in fields_of(group)]
        matches: dict[str, object] = {"properties": {"method": {"const": method}}}
        if method != DEFAULT_METHOD:
            matches["required"] = ["method"]
        refused = [{"required": [name]} for key in foreign for name in _names(key)]
        rules.append({"if": matches, "then": {"not": {"anyOf": refused}}})
    lengths = [name for key in LENGTHS for name in _names(key)]
    one_length = [{"required": [name]} for name in lengths]
    rules.append({"oneOf": [*one_length, {"not": {"anyOf": one_length}}]})
    of_teacher = [{"required": [name]} for key in ("distill", "teacher_logits") for name in _names(key)]
    rules.append({"if": {"anyOf": of_teacher}, "then": {"anyOf": [{"required": [n]} for n in _names("teacher")]}})
    properties["stages"] = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "object", "properties": {"name": {"type": "string"}}},
        "description": "Stages one after the other, each with its own settings; those beside it are their defaults.",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "strop tune",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "if": {"not": {"required": ["stages"]}},
        "then": {"allOf": rules},
    }
