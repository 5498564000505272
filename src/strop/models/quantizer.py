"""transformers' side of a `Plan`: the quantizer that stands in its table, and the configuration that carries the plan.

Registration with transformers is explicit (`register`) and happens once per process, when a model is first opened.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from strop.models.hook import Plan, PlannedOperation, RoundingPlan, SkeletonPlan

QUANT_METHOD = "strop"
"""The name under which the hook stands in transformers' table of quantizers."""


class StropConfig(QuantizationConfigMixin):
    """Carries a `Plan` through `from_pretrained`; never written to a file."""

    def __init__(self, plan: Plan) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.plan = plan

    def to_dict(self) -> dict[str, Any]:
        """What transformers logs of it."""
        return {"quant_method": QUANT_METHOD}

    def __deepcopy__(self, memo: dict[int, Any]) -> StropConfig:
        return self


class StropQuantizer(HfQuantizer):
    """transformers' side of a `Plan`."""

    def __init__(self, quantization_config: StropConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plan = quantization_config.plan
        self.pre_quantized = self.plan.reads_codes

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: object
    ) -> PreTrainedModel:
        self.plan.prepare(model, checkpoint_files or [])
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> PreTrainedModel:
        self.plan.install(model)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: object) -> bool:
        """Whether the plan rounds this weight."""
        return param_name in self.plan.weights

    def get_quantize_ops(self) -> ConversionOps:
        """The operation on each weight that the plan chose."""
        assert isinstance(self.plan, RoundingPlan | SkeletonPlan)
        return self.plan.operation()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None for tensors of a quantized layer, which must arrive as they are stored."""
        operations = getattr(converter, "operations", ())
        if any(isinstance(operation, PlannedOperation) for operation in operations):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Our converters first: the first that matches a name has it."""
        return [*self.plan.converters(), *weight_conversions]

    def is_serializable(self) -> bool:  # type: ignore[override]
        """Whether transformers may save the model itself; it may not, strop's writers do."""
        return False

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        """Adapters train on top."""
        return True


def register() -> None:
    """Make the hook known to transformers; a second call changes nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(StropConfig)
        register_quantizer(QUANT_METHOD)(StropQuantizer)


def detach(model: PreTrainedModel) -> None:
    """Take the hook's traces off an opened model, so that transformers sees a plain one."""
    for holder, attribute in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if hasattr(holder, attribute):
            delattr(holder, attribute)
    model.is_quantized = False  # type: ignore[assignment]
    used = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [  # type: ignore[assignment]
        entry
        for entry in used
        if not any(isinstance(operation, PlannedOperation) for operation in getattr(entry, "operations", ()))
    ]
