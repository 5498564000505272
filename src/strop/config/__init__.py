"""What a user may set for `tune`: typed, strict, with the names of the field accepted, every problem reported at once.

In a YAML file and as keyword arguments the settings are flat (`method: lora`, `rank: 8`, `epochs: 2`). Inside they are
grouped, so that no invalid combination can be held: `TuneConfig.method` is one of `Full`, `Lora`, `QLora`, `Qat`,
`QatLora`, each with its own settings, and `TuneConfig.length` one of `Steps`, `Epochs`, `Minutes`. A setting of another
method, an unknown key, a wrong type, a key given twice under two names: all are collected into one `ConfigError`.

Keyword arguments (the command line's flags) beat the file, which beats the defaults below. `to_yaml` writes what
`load_config` reads back to an equal `TuneConfig`. What only the model can tell (does the format fit its shapes, do the
targets match anything) is checked by the recipes. Nothing here imports torch.
"""

from __future__ import annotations

from strop.config.building import TuneConfig, load_config, read_yaml, to_yaml
from strop.config.names import ALIASES, DEFAULT_METHOD, KEYS
from strop.config.schema import json_schema
from strop.config.settings import (
    ALL_LINEAR,
    DataPart,
    Distillation,
    Epochs,
    Full,
    Length,
    Lora,
    LowRank,
    Machine,
    Method,
    Minutes,
    Optimization,
    Qat,
    QatLora,
    QLora,
    Rounded,
    Samples,
    Serving,
    Steps,
    Watch,
    data_name,
)
from strop.config.stages import Stage, StagesConfig, load_stages

__all__ = [
    "ALIASES",
    "ALL_LINEAR",
    "DEFAULT_METHOD",
    "KEYS",
    "DataPart",
    "Distillation",
    "Epochs",
    "Full",
    "Length",
    "Lora",
    "LowRank",
    "Machine",
    "Method",
    "Minutes",
    "Optimization",
    "QLora",
    "Qat",
    "QatLora",
    "Rounded",
    "Samples",
    "Serving",
    "Stage",
    "StagesConfig",
    "Steps",
    "TuneConfig",
    "Watch",
    "data_name",
    "json_schema",
    "load_config",
    "load_stages",
    "read_yaml",
    "to_yaml",
]
