"""Several formats in one model: a group of layers each in compressed-tensors' `config_groups`, by full names.

What one group says is `compressed_tensors`' part; here a model's groups are put together, and a layer's own is found.
All groups of layers must be packed the same way, since a configuration has one `format` that every reader knows. Beside
a group of embeddings, which cannot be packed, every group says its own, and the configuration `mixed-precision`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from strop.errors import FormatError
from strop.files import compressed_tensors, embedding_tensors
from strop.numerics.formats import CodebookFormat
from strop.numerics.scheme import Scheme


def check_together(schemes: Sequence[Scheme]) -> None:
    """Refuse formats that no file holds beside each other.

    Raises:
        FormatError: codebooks beside other formats, zero points by group, or 8-bit floats beside integers.
    """
    different = list(dict.fromkeys(schemes))
    if len(different) < 2:
        return
    names = ", ".join(scheme.name for scheme in different)
    if any(isinstance(scheme.format, CodebookFormat) for scheme in different):
        raise FormatError(f"one model cannot mix {names}: codebooks stand alone in bitsandbytes' files; use integers")
    widened = [scheme.name for scheme in different if not compressed_tensors.opens_packed(scheme)]
    if widened:
        raise FormatError(
            f"one model cannot mix {names}: transformers dequantizes {', '.join(widened)} while loading, and would "
            "read every layer by one of the formats; use symmetric ones (int4-g32, int4-g32-full)"
        )
    kinds = {compressed_tensors.config_for(scheme, [])["format"] for scheme in different}
    if len(kinds) > 1:
        raise FormatError(f"one model cannot mix {names}: {' and '.join(sorted(kinds))} are packed differently")


def config_for(
    schemes: Mapping[str, Scheme],
    ignore: Sequence[str],
    *,
    packed: bool | None = None,
    embeddings: Mapping[str, Scheme] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of a model whose layers have the formats that `schemes` gives by full name.

    Args:
        schemes: layer to its scheme; with one scheme for all it is `compressed_tensors.config_for`'s.
        ignore: full names of the linear layers that stay as they are.
        packed: as for `compressed_tensors.config_for`.
        embeddings: embedding, or head that is tied to one, to its scheme.

    Raises:
        FormatError: as `check_together` and `compressed_tensors.check_scheme`.
    """
    check_together([*schemes.values(), *(embeddings or {}).values()])
    different = list(dict.fromkeys(schemes.values()))
    configs = [compressed_tensors.config_for(scheme, ignore, packed=packed) for scheme in different]
    if len(configs) == 1 and not embeddings:
        return configs[0]
    groups: dict[str, Any] = {}
    for scheme, config in zip(different, configs, strict=True):
        ((name, group),) = config["config_groups"].items()
        groups[name] = {**group, "targets": [layer for layer, own in schemes.items() if own == scheme]}
    if not embeddings:
        return {**configs[0], "config_groups": groups}
    groups = {name: {**group, "format": configs[0]["format"]} for name, group in groups.items()}
    for scheme in dict.fromkeys(embeddings.values()):
        targets = [name for name, own in embeddings.items() if own == scheme]
        groups |= embedding_tensors.group_for(scheme, targets)
    return {**configs[0], "format": "mixed-precision", "config_groups": groups}


def config_of(config: Mapping[str, Any], layer: str) -> Mapping[str, Any]:
    """The configuration as if the group that a layer belongs to were the only one.

    A layer belongs to the first group that names it, in full or by a pattern (`re:...`), else to the first that names a
    class of layers, as the library has it.

    Raises:
        FormatError: no group is meant for it.
    """
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) < 2:
        return config
    for by_class in (False, True):
        for name, group in groups.items():
            targets = group.get("targets", []) if isinstance(group, Mapping) else []
            if any(_meant(target, layer, by_class=by_class) for target in targets):
                return _alone(config, name, group)
    raise FormatError(f"{layer}: none of the groups {', '.join(groups)} names it")


def groups_of(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The configuration once for each of its groups."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) < 2:
        return [config]
    return [_alone(config, name, group) for name, group in groups.items()]


def _alone(config: Mapping[str, Any], name: str, group: object) -> Mapping[str, Any]:
    own = group.get("format") if isinstance(group, Mapping) else None
    return {**config, "config_groups": {name: group}, **({"format": own} if own else {})}


def _meant(target: object, layer: str, *, by_class: bool) -> bool:
    if not isinstance(target, str):
        return False
    if by_class:
        return "." not in target and not target.startswith("re:")
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), layer) is not None
    return target == layer
