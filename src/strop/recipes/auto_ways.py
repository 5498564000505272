"""The ways to a quantized model that `tune --method auto` tries, in the order of what they cost.

    search     rounding to nearest, scales searched; no rows
    gptq       GPTQ on training rows, then all scales trained together; at 2 bits block by block
    scales     the scales alone are fine-tuned on the task, over the codes of the best folder so far
    qat-lora   an adapter through the rounding of its sum with the weights
    qat        every weight through the rounding, from the best folder so far, scales learned

Ways that a format or a model rules out are named with the reason and passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import nn

from strop.config import AutoConfig, TuneConfig
from strop.errors import ConfigError
from strop.files import compressed_tensors
from strop.layers.quant_experts import expert_weights
from strop.layers.surgery import experts
from strop.numerics.formats import CodebookFormat
from strop.numerics.scheme import Scheme, parse_format

SCALE_STEPS: Final = 100
"""Steps that train all scales together after rounding; `benchmarks/RESULTS.md` has what they gain."""

_ADAPTER_RATE: Final = 10.0  # an adapter's learning rate over that of whole weights, as in their defaults


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        number: its place, from 1.
        name: what it is called.
        method: a method of `quantize` or of `tune`.
        does: what it does, in words.
        trains: whether it is a run of `tune`.
        settings: what the method is told beside the format.
        starts: whether it begins from the best folder so far.
        passed_over: why it cannot be taken; None where it can.
    """

    number: int
    name: str
    method: str
    does: str
    trains: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    starts: bool = False
    passed_over: str | None = None

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"{self.number}-{self.name}"

    def line(self) -> str:
        """The way in one line."""
        return f"{self.folder}: {self.does}" + (f"; passed over: {self.passed_over}" if self.passed_over else "")

    def run(self, config: AutoConfig, *, output: str, start: str | None, resume: bool) -> TuneConfig:
        """The settings of its run.

        Raises:
            ConfigError: they do not go together.
        """
        rate = config.optimization.learning_rate
        if self.method == "qat-lora" and rate is not None:
            rate *= _ADAPTER_RATE
        return config.run(
            self.method,
            output=output,
            learning_rate=rate,
            start=start if self.starts else None,
            resume=resume or None,
            **self.settings,
        )


def scheme_to_end_on(config: AutoConfig) -> Scheme:
    """The grid of a configuration's format.

    Raises:
        FormatError: it is unknown, or no model's folder can hold it.
    """
    scheme = parse_format(config.method.format).scheme
    if not isinstance(scheme.format, CodebookFormat):
        compressed_tensors.check_scheme(scheme)
    return scheme


def plan_ways(config: AutoConfig, plain: nn.Module | None = None) -> list[Way]:
    """All ways, those that cannot be taken with their reason.

    Args:
        config: the settings.
        plain: the model's architecture; None looks at the format alone.

    Raises:
        FormatError: as `scheme_to_end_on`.
        ConfigError: a run's settings do not go together.
    """
    scheme = scheme_to_end_on(config)
    real = scheme.has_real_scales
    coded = f"the scales of {scheme} are codes themselves, and cannot be trained"
    no_training = _why_not_trained(scheme, plain)
    no_scales = no_training or (None if real else coded)
    blockwise = scheme.bits <= 2
    steps = SCALE_STEPS if real and scheme.activations is None else 0
    calibrated = "block by block" if blockwise else "GPTQ"
    learned: dict[str, Any] = {"scales": "learned"} if real else {}
    ways = [
        Way(1, "search", "search", "rounding to nearest, scales searched", trains=False),
        Way(
            2,
            "blockwise" if blockwise else "gptq",
            "blockwise" if blockwise else "gptq",
            f"{calibrated} on training rows" + (f", then {steps} steps for all scales" if steps else ""),
            trains=False,
            settings={"scale_steps": steps},
        ),
        Way(
            3,
            "scales",
            "qat",
            "the scales alone fine-tuned, over the best codes so far",
            trains=True,
            settings={"train": "scales"},
            starts=True,
            passed_over=no_scales,
        ),
        Way(
            4,
            "qat-lora",
            "qat-lora",
            f"an adapter of rank {config.method.rank} through the rounding of its sum with the weights",
            trains=True,
            settings={"rank": config.method.rank, "alpha": config.method.alpha},
            passed_over=no_training,
        ),
        Way(
            5,
            "qat",
            "qat",
            "every weight through the rounding" + (", from the best codes so far, scales learned" if learned else ""),
            trains=True,
            settings=learned,
            starts=bool(learned),
            passed_over=no_training,
        ),
    ]
    for way in ways:
        if way.trains and way.passed_over is None:
            way.run(config, output="output", start="start", resume=False)
    return ways


def _why_not_trained(scheme: Scheme, plain: nn.Module | None) -> str | None:
    """Why a model is not trained for a format."""
    if scheme.activations is not None:
        return f"training stores no rounding of activations, which {scheme} has"
    if plain is not None and (experts(plain) or expert_weights(plain)):
        return "experts are rounded after training only, so that a trained model would not end on the format"
    return None


def refuse_unknown_format(config: AutoConfig) -> None:
    """Refuse what can be told from the settings alone, before the model is looked for.

    Raises:
        FormatError, ConfigError: as `plan_ways`.
    """
    if config.output is None and config.resume:
        raise ConfigError("output: name the folder that is to be resumed (-o OUT)")
    plan_ways(config)
