"""What the fields of PEFT's adapter_config.json mean: which layers are targeted, and whether an adapter is plain LoRA.

Nothing here knows of tensors or files; `peft_adapter.py` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from strop.errors import FileFormatError

_READ = {
    "base_model_name_or_path",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "r",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "use_rslora",
    "merge_only",
}
"""Settings that are read."""

_WITHOUT_EFFECT = {
    "auto_mapping",
    "fan_in_fan_out",  # follows from the layer's own type
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",  # of use_qalora
    "revision",
    "runtime_config",
    "task_type",
    "eva_config",  # how the adapter began
}
"""Settings that say nothing about what a trained adapter computes."""

_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is."""


def not_plain(fields: Mapping[str, Any]) -> list[str]:
    """Why an adapter is not plain LoRA over the untouched base."""
    reasons = []
    if fields.get("peft_type") != "LORA":
        reasons.append(f"peft_type {fields.get('peft_type')!r}")
    start = fields.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        reasons.append(f"init_lora_weights {start!r} changes the base; save it as a difference on the untouched base")
    if fields.get("bias", "none") != "none":
        reasons.append(f"bias {fields['bias']!r}")
    known = _READ | _WITHOUT_EFFECT | {"peft_type", "init_lora_weights", "bias"}
    reasons += [f"{name} {value!r}" for name, value in fields.items() if name not in known and value]
    return reasons


def targeted(targets: str | tuple[str, ...], fields: Mapping[str, Any], linears: Iterable[str]) -> list[str]:
    """The linear layers that `target_modules` asks for, by PEFT's rules."""
    matches = _matcher(targets)
    excluded = fields.get("exclude_modules")
    excludes = _matcher(tuple(excluded) if isinstance(excluded, list) else excluded) if excluded else None
    indices = fields.get("layers_to_transform")
    if isinstance(indices, int):
        indices = [indices]
    patterns = fields.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    chosen = []
    for name in linears:
        if not matches(name) or (excludes is not None and excludes(name)):
            continue
        if indices and not isinstance(targets, str):
            found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name) for pattern in patterns)
            index = next((int(match[1]) for match in found if match), None)
            if index not in indices:
                continue
        chosen.append(name)
    return chosen


def _matcher(targets: str | tuple[str, ...]) -> Callable[[str], bool]:
    if targets == "all-linear":
        return lambda name: True
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise FileFormatError(f"adapter_config.json: {targets!r} is not a regular expression ({error})") from None
        return lambda name: pattern.fullmatch(name) is not None
    return lambda name: any(name == target or name.endswith(f".{target}") for target in targets)


def by_pattern(patterns: Mapping[str, float], layer: str, default: float) -> float:
    """The value whose pattern fits a layer's name, as PEFT matches `rank_pattern`; `default` where none does."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", layer):
                return value
        except re.error as error:
            raise FileFormatError(f"adapter_config.json: {pattern!r} is not a regular expression ({error})") from None
    return default
