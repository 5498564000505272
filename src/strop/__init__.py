"""strop trains the file you ship, and proves it on your task.

The public names are loaded on first use, so that `import strop` costs nothing until a verb is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from strop.models import OpenedModel, load
    from strop.numerics.qtensor import QuantizedTensor
    from strop.numerics.scheme import Scheme, parse_format
    from strop.recipes.bench import bench
    from strop.recipes.compare import compare
    from strop.recipes.doctor import doctor
    from strop.recipes.export import export
    from strop.recipes.generate import predict
    from strop.recipes.merge import merge
    from strop.recipes.patch import apply, diff
    from strop.recipes.plan import plan
    from strop.recipes.prove import prove
    from strop.recipes.prove_result import Fail, Pass, Undecided
    from strop.recipes.quantize import quantize
    from strop.recipes.stages import tune_stages
    from strop.recipes.tune import tune
    from strop.recipes.verify import verify

__version__ = "0.1.0"

_HOMES = {
    "Fail": "strop.recipes.prove_result",
    "OpenedModel": "strop.models",
    "Pass": "strop.recipes.prove_result",
    "QuantizedTensor": "strop.numerics.qtensor",
    "Scheme": "strop.numerics.scheme",
    "Undecided": "strop.recipes.prove_result",
    "apply": "strop.recipes.patch",
    "bench": "strop.recipes.bench",
    "compare": "strop.recipes.compare",
    "diff": "strop.recipes.patch",
    "doctor": "strop.recipes.doctor",
    "export": "strop.recipes.export",
    "load": "strop.models",
    "merge": "strop.recipes.merge",
    "parse_format": "strop.numerics.scheme",
    "plan": "strop.recipes.plan",
    "predict": "strop.recipes.generate",
    "prove": "strop.recipes.prove",
    "quantize": "strop.recipes.quantize",
    "tune": "strop.recipes.tune",
    "tune_stages": "strop.recipes.stages",
    "verify": "strop.recipes.verify",
}

__all__ = [  # noqa: RUF022  the version stands last
    "Fail",
    "OpenedModel",
    "Pass",
    "QuantizedTensor",
    "Scheme",
    "Undecided",
    "apply",
    "bench",
    "compare",
    "diff",
    "doctor",
    "export",
    "load",
    "merge",
    "parse_format",
    "plan",
    "predict",
    "prove",
    "quantize",
    "tune",
    "tune_stages",
    "verify",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Import the module that holds a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'strop' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
