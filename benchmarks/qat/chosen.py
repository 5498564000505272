"""What each arm is run with at each grid, chosen on the development rows of seed 100, which no table holds.

The trials stand in `results/score.jsonl` too (split "dev"). An arm that is not named for a grid is not run there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

CHOSEN: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    "int4-g32": {
        "full": {},
        "rtn": {},
        "gptq": {"scale_steps": 60, "max_rows": 256},
        "qat": {"learning_rate": 5e-4, "scales": "learned"},
        "torchao": {"learning_rate": 5e-4},
        "torchao-8da4w": {"learning_rate": 5e-4, "activations": "int8"},
    },
    "int3-g32": {
        "full": {},
        "rtn": {},
        "gptq": {"scale_steps": 60, "max_rows": 256},
        "qat": {"learning_rate": 5e-4, "scales": "learned"},
        "torchao": {"learning_rate": 5e-4},
    },
    "int3": {
        "full": {},
        "rtn": {},
        "gptq": {"scale_steps": 60, "max_rows": 256},
        "qat": {"learning_rate": 1e-3, "scales": "learned"},
        "torchao": {"learning_rate": 1e-3},
    },
    "int2-g32": {
        "full": {},
        "rtn": {},
        "gptq": {"scale_steps": 60, "max_rows": 256},
        "qat": {"learning_rate": 1e-3, "scales": "learned"},
        "torchao": {"learning_rate": 1e-3},
    },
    "int2": {
        "full": {},
        "rtn": {},
        "gptq": {"scale_steps": 60, "max_rows": 256},
        "qat": {"learning_rate": 1e-3, "scales": "learned"},
        "torchao": {"learning_rate": 1e-3},
    },
}
