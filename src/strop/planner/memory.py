"""The bytes that a training step needs, part by part, for every method.

For a model in elements of b bytes (2 in bf16, 4 in fp32), a micro batch of T tokens, hidden size h, N parameters:

| part | bytes |
|---|---|
| full | 16 N: fp32 master weight 4, AdamW's moments 8, bf16 weight 2, gradient 2 (in fp32: 4 + 4 + 8) |
| full-bf16 | 8 N: weight, gradient and both moments in bf16; updates below 0.2 to 0.4% of a weight vanish in it |
| qat | as full, and the rounded copy of each linear weight, b a weight, until the backward pass |
| lora | b a frozen parameter; 16 a trained one (fp32 weight, gradient, moments) and b for its copy in the product |
| qlora | the same, with the linear layers' weights in the bits of their format |
| activations | `activations.Block.kept_bytes` a token and block; with checkpointing b h, each block's input |
| backward of one block | the gradients at its widest point; with checkpointing also what it computes again |
| logits | `LOGIT_BYTES` a logit, for the rows in flight at once |
| scratch | the largest weight, dequantized, b an element |

The peak is weights + gradients + optimizer + activations + scratch + the larger of (logits, backward of one block): the
logits are gone when the backward pass of the blocks begins. Left out: the interpreter and its libraries
(`RUNTIME_BYTES`), the allocator's rounding, and attention scores, which the usual attention kernels never hold whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from strop.errors import FormatError
from strop.numerics.groups import plan_shape
from strop.numerics.scheme import Scheme, parse_scheme
from strop.planner.activations import blocks
from strop.planner.hardware import Dtype
from strop.planner.parameters import LinearShape, ModelShape, block_of, lora_parameters

Method = Literal["full", "full-bf16", "lora", "qlora", "qat"]
METHODS: tuple[Method, ...] = get_args(Method)

GIB = 2**30
RUNTIME_BYTES = 400 * 10**6
"""What Python, torch and transformers hold before a model is opened (380 MB measured)."""
LOGIT_BYTES = 18
"""Per logit in flight: the bf16 value, its fp32 copy, log-probabilities, their gradients in fp32 and bf16."""
_ADAMW_BYTES = 16


@dataclass(frozen=True)
class Step:
    """What is asked of one training step.

    Args:
        rows: rows in a micro batch; accumulation adds none.
        length: tokens in a row.
        checkpointing: keep each block's input only, and compute the rest again in the backward pass.
        rank: the adapters' rank (lora, qlora).
        format: the grid of the linear layers (qlora, qat).
        dtype: what weights and activations are computed in.
        logit_rows: the most tokens whose logits exist at once; None for those of the whole micro batch.
    """

    rows: int = 1
    length: int = 512
    checkpointing: bool = False
    rank: int = 16
    format: str = "nf4-dq"
    dtype: Dtype = "bfloat16"
    logit_rows: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens in a micro batch."""
        return self.rows * self.length

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return 2 if self.dtype == "bfloat16" else 4


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes of one method's step, part by part.

    `kept_wide` names the linear layers that the format does not fit and that stay in `step.dtype`.
    """

    method: Method
    step: Step
    trainable_parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    block_backward_bytes: int
    scratch_bytes: int
    kept_wide: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once."""
        held = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes
        return held + self.scratch_bytes + max(self.logits_bytes, self.block_backward_bytes)

    def fits(self, available_bytes: int) -> bool:
        """Say whether it fits beside the interpreter and its libraries."""
        return self.peak_bytes + RUNTIME_BYTES <= available_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return every part in bytes, the peak among them, and the step's settings that this method has."""
        fields = asdict(self)
        step = fields.pop("step")
        fields["kept_wide"] = list(self.kept_wide)
        if self.method not in ("qlora", "qat"):
            step.pop("format")
        if self.method not in ("lora", "qlora"):
            step.pop("rank")
        return fields | {"peak_bytes": self.peak_bytes, "step": step}


def plan_memory(
    shape: ModelShape, method: Method, step: Step, *, adapted: Sequence[LinearShape] | None = None
) -> MemoryPlan:
    """Return the bytes of one step.

    Args:
        shape: the model.
        method: how it is trained.
        step: the micro batch and its settings.
        adapted: the layers that carry adapters (lora, qlora); None for all linear layers.

    Raises:
        FormatError: `step.format` is not a format.
    """
    adapted = shape.linears if adapted is None else adapted
    trained = lora_parameters(adapted, step.rank) if method in ("lora", "qlora") else shape.parameters
    element = step.element_bytes
    kept_wide: tuple[str, ...] = ()
    if method == "full-bf16":
        weights, gradients, optimizer = 2 * trained, 2 * trained, 4 * trained
    elif method in ("full", "qat"):
        weights, gradients = element * trained, element * trained
        optimizer = _ADAMW_BYTES * trained - weights - gradients
    else:
        frozen = element * shape.parameters
        if method == "qlora":
            saved, kept_wide = _saved_by_format(shape, parse_scheme(step.format), element)
            frozen -= saved
        weights, gradients, optimizer = frozen + 4 * trained, 4 * trained, 8 * trained
    activations, working = _activation_bytes(shape, method, step, adapted)
    logit_rows = step.tokens if step.logit_rows is None else min(step.logit_rows, step.tokens)
    largest = max((linear.weights for linear in shape.linears), default=0)
    return MemoryPlan(
        method=method,
        step=step,
        trainable_parameters=trained,
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        activations_bytes=activations,
        logits_bytes=LOGIT_BYTES * shape.vocabulary * logit_rows,
        block_backward_bytes=working,
        scratch_bytes=element * largest if method == "qlora" else 0,
        kept_wide=kept_wide,
    )


def format_bytes(shape: ModelShape, scheme: Scheme, element_bytes: int = 2) -> tuple[int, tuple[str, ...]]:
    """Return a quantized model's bytes, and the linear layers whose shape the format does not fit.

    Those, the embeddings, the head, norms, biases and experts stay in `element_bytes` a parameter.
    """
    saved, kept_wide = _saved_by_format(shape, scheme, element_bytes)
    return element_bytes * shape.parameters - saved, kept_wide


def _saved_by_format(shape: ModelShape, scheme: Scheme, element_bytes: int) -> tuple[int, tuple[str, ...]]:
    """Return the bytes that a format saves on the linear layers, and the names of those that it does not fit."""
    saved_bits, kept_wide = 0.0, []
    for linear in shape.linears:
        size = (linear.out_features, linear.in_features)
        try:
            plan_shape(size, scheme)
        except FormatError:
            kept_wide.append(linear.name)
            continue
        saved_bits += (8 * element_bytes - scheme.bits_per_weight(size)) * linear.weights
    return round(saved_bits / 8), tuple(kept_wide)


def _activation_bytes(shape: ModelShape, method: Method, step: Step, adapted: Sequence[LinearShape]) -> tuple[int, int]:
    """Return what is kept until the backward pass, and what one block's backward pass needs on top."""
    element = step.element_bytes
    ranks: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    if method in ("lora", "qlora"):
        for linear in adapted:
            ranks[block_of(linear.name)] += step.rank
            if step.dtype == "bfloat16":  # fp32 adapters are multiplied as bf16 copies
                copies[block_of(linear.name)] += element * linear.adapter_parameters(step.rank)
    elif method == "qat":
        for linear in shape.linears:
            copies[block_of(linear.name)] += element * linear.weights  # the rounded weight
    kept: list[float] = []
    gradients: list[float] = []
    for name, block in blocks(shape).items():
        of_tokens = block.kept_bytes(
            element_bytes=element, trained=method not in ("lora", "qlora"), adapter_features=ranks[name]
        )
        kept.append(step.tokens * of_tokens + copies[name])
        gradients.append(step.tokens * block.backward_bytes(element_bytes=element))
    if step.checkpointing:
        again = max((one + other for one, other in zip(kept, gradients, strict=True)), default=0)
        return element * shape.hidden_size * step.tokens * len(kept), int(again)
    return int(sum(kept)), int(max(gradients, default=0))
