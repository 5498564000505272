"""The bytes that a training step needs, part by part, for every method.

For a model of N parameters, P of them in its linear layers, in products of b bytes (2 in bf16, 4 in fp32):

| part | bytes |
|---|---|
| full | 16 N: fp32 weight 4, gradient 4, AdamW's two moments 8 |
| adamw-8bit | 10.03 in place of every 16: moments of 2 + 8/256 bytes |
| full-bf16 | 8 N: weight, gradient and both moments in bf16; updates below 0.2 to 0.4% of a weight vanish in it |
| qat | 16 N, as full |
| lora | b a frozen parameter; 16 a trained one |
| qlora | the same, with the linear layers' weights in the bits of their format |
| qat-lora | as lora, or as qlora where the base is held in fewer bits; three fp32 copies of the largest layer |
| copies | in bf16, 2 for every fp32 weight that enters a product (linear, adapter, head); qat in fp32: 4 P |
| activations | `activations.Block.kept_bytes` a token and block; of a recomputed block its input only |
| backward of one block | the gradients at its widest point; where it is recomputed also what it computes again |
| logits | `LOGIT_BYTES` a logit, for those computed at once; b where blocks are one piece: the loss is in place too |
| scratch | the largest weight, dequantized, b an element |
| session, products, allocator, trial | `process.py` |

The peak is the sum of all these, with the larger one of logits and backward of one block: the logits are gone when the
backward pass of the blocks begins. The usual count for mixed precision, bf16 weight and gradient and fp32 master and
moments, is 16 a parameter too. Left out: the interpreter and its libraries (`RUNTIME_BYTES`), and on an accelerator the
allocator's rounding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from strop.errors import FormatError
from strop.layers.block_products import TILE_VALUES
from strop.numerics.dynamic8 import BYTES_EACH
from strop.numerics.formats import CodebookFormat
from strop.numerics.groups import plan_shape
from strop.numerics.scheme import Mode, Scheme, parse_scheme
from strop.planner.activations import Attention, Precision, blocks
from strop.planner.hardware import Dtype
from strop.planner.parameters import ExpertShape, LinearShape, ModelShape, block_of, lora_parameters
from strop.planner.process import SESSION_BYTES, pooled_bytes, products_bytes
from strop.training.losses import CHUNK_LOGITS
from strop.training.optimizers import OptimizerName

Method = Literal["full", "full-bf16", "lora", "qlora", "qat", "qat-lora"]
METHODS: tuple[Method, ...] = get_args(Method)
ADAPTERS: tuple[Method, ...] = ("lora", "qlora", "qat-lora")
"""Methods that leave the base as it is."""

GIB = 2**30
RUNTIME_BYTES = 400 * 10**6
"""What Python, torch and transformers hold before a model is opened (380 MB measured)."""
LOGIT_BYTES = 18
"""Per logit in flight: the bf16 value, its fp32 copy, log-probabilities, and the gradients of the three."""


@dataclass(frozen=True)
class Step:
    """What is asked of one training step.

    Args:
        rows: rows in a micro batch; accumulation adds none.
        length: tokens in a row.
        checkpointing: keep blocks' inputs only, and compute the rest again in the backward pass.
        recomputed: how many blocks do so with checkpointing, the first ones; None: all.
        rank: the adapters' rank (lora, qlora).
        format: the grid of the linear layers (qlora, qat, qat-lora).
        held: what the base of qat-lora is held in; empty: in `dtype`.
        dtype: what weights and activations are computed in.
        attention: `fused` never holds the scores, `plain` keeps them; with `block` whole blocks are one piece.
        optimizer: with moments in fp32, or in 8 bits.
        device: on a `cpu` what the process holds beside tensors counts too (`process.py`).
        shapes: shapes of batches that a run on a CPU trains on: as many as it has widths.
        eval_shapes: those that it evaluates.
        tried: the run begins with a few steps that are undone.
        steady: freed tensors leave the process at once, as `max_memory` has it.
    """

    rows: int = 1
    length: int = 512
    checkpointing: bool = False
    recomputed: int | None = None
    rank: int = 16
    format: str = "nf4-dq"
    held: str = ""
    dtype: Dtype = "bfloat16"
    attention: Attention = "fused"
    optimizer: OptimizerName = "adamw"
    device: Literal["cpu", "accelerator"] = "accelerator"
    shapes: int = 1
    eval_shapes: int = 0
    tried: bool = False
    steady: bool = False

    @property
    def tokens(self) -> int:
        """Tokens in a micro batch."""
        return self.rows * self.length

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return 2 if self.dtype == "bfloat16" else 4

    def blocks_recomputed(self, total: int) -> int:
        """Of `total` blocks, how many compute their activations again."""
        if not self.checkpointing:
            return 0
        return total if self.recomputed is None else min(self.recomputed, total)


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
    copies_bytes: int
    activations_bytes: int
    logits_bytes: int
    block_backward_bytes: int
    scratch_bytes: int
    session_bytes: int
    products_bytes: int
    allocator_bytes: int
    trial_bytes: int
    kept_wide: tuple[str, ...] = ()

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once."""
        held = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.copies_bytes
        held += self.activations_bytes + self.scratch_bytes
        held += self.session_bytes + self.products_bytes + self.allocator_bytes + self.trial_bytes
        return held + max(self.logits_bytes, self.block_backward_bytes)

    def fits(self, available_bytes: int) -> bool:
        """Say whether it fits beside the interpreter and its libraries."""
        return self.peak_bytes + RUNTIME_BYTES <= available_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return every part in bytes, the peak among them, and the step's settings that this method has."""
        fields = asdict(self)
        step = fields.pop("step")
        fields["kept_wide"] = list(self.kept_wide)
        if self.method not in ("qlora", "qat", "qat-lora"):
            step.pop("format")
        if self.method not in ADAPTERS:
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
    trains_all = method not in ADAPTERS
    trained = shape.parameters if trains_all else lora_parameters(adapted, step.rank)
    element = step.element_bytes
    kept_wide: tuple[str, ...] = ()
    if method == "full-bf16":
        weights, gradients, optimizer = 2 * trained, 2 * trained, 4 * trained
    elif method in ("full", "qat"):
        weights, gradients, optimizer = 4 * trained, 4 * trained, 8 * trained
    else:
        frozen = element * shape.parameters
        if method == "qlora" or (method == "qat-lora" and step.held):
            saved, kept_wide = _saved_by_format(shape, parse_scheme(step.held or step.format), element, shape.experts)
            frozen -= saved
        weights, gradients, optimizer = frozen + 4 * trained, 4 * trained, 8 * trained
    if step.optimizer == "adamw-8bit" and method != "full-bf16":
        optimizer = math.ceil(2 * BYTES_EACH * trained)
    activations, working = _activation_bytes(shape, method, step, adapted)
    one_piece = step.attention == "block"
    of_logit = element if one_piece else LOGIT_BYTES
    logits = shape.vocabulary * step.tokens
    at_once = logits if shape.whole_logits else min(logits, CHUNK_LOGITS)
    on_cpu, widest = step.device == "cpu", max((block.widest_features for block in blocks(shape).values()), default=0)
    single = [expert.weights // expert.shape[0] for expert in shape.experts]  # one expert is dense at a time
    largest = max([*(linear.weights for linear in shape.linears), *single], default=0)
    return MemoryPlan(
        method=method,
        step=step,
        trainable_parameters=trained,
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        copies_bytes=_copies_bytes(shape, method, step, adapted),
        activations_bytes=activations,
        logits_bytes=of_logit * at_once,
        block_backward_bytes=working,
        scratch_bytes=_scratch_bytes(method, element, min(largest, TILE_VALUES) if one_piece else largest),
        session_bytes=SESSION_BYTES if on_cpu else 0,
        products_bytes=products_bytes(
            shape,
            () if trains_all else tuple(adapted),
            rank=step.rank,
            trained=trains_all,
            attention=step.attention,
            shapes=step.shapes,
            eval_shapes=step.eval_shapes,
        )
        if on_cpu and step.dtype == "bfloat16"
        else 0,
        allocator_bytes=pooled_bytes(activations, element * step.tokens * widest, adapters=not trains_all)
        + pooled_bytes(of_logit * at_once, element * at_once if one_piece else 4 * at_once, adapters=not trains_all)
        if on_cpu and not step.steady
        else 0,
        trial_bytes=4 * trained if step.tried else 0,
        kept_wide=kept_wide,
    )


def _scratch_bytes(method: Method, element: int, largest: int) -> int:
    """Return the bytes of the largest layer, dense: once, or the sum in fp32, rounded, and in the products' dtype."""
    if method == "qat-lora":
        return (4 + 4 + element) * largest
    return element * largest if method == "qlora" else 0


def format_bytes(shape: ModelShape, scheme: Scheme, element_bytes: int = 2) -> tuple[int, tuple[str, ...]]:
    """Return the bytes of a quantized model's file, and the layers whose shape the format does not fit.

    Those, the embeddings, the head, norms and biases stay in `element_bytes` a parameter, and so do experts where files
    of the format hold none (codebooks, asymmetric grids).
    """
    held = not isinstance(scheme.format, CodebookFormat) and scheme.mode is not Mode.ASYMMETRIC
    saved, kept_wide = _saved_by_format(shape, scheme, element_bytes, shape.experts if held else ())
    return element_bytes * shape.parameters - saved, kept_wide


def _saved_by_format(
    shape: ModelShape, scheme: Scheme, element_bytes: int, experts: Sequence[ExpertShape]
) -> tuple[int, tuple[str, ...]]:
    """Return the bytes that a format saves on the linear layers and these experts, and the names that it does not
    fit.
    """
    saved_bits, kept_wide = 0.0, []
    sizes = [(linear.name, (linear.out_features, linear.in_features), linear.weights) for linear in shape.linears]
    sizes += [(expert.name, expert.linear, expert.weights) for expert in experts if expert.linear is not None]
    for name, size, weights in sizes:
        try:
            plan_shape(size, scheme)
        except FormatError:
            kept_wide.append(name)
            continue
        saved_bits += (8 * element_bytes - scheme.bits_per_weight(size)) * weights
    return round(saved_bits / 8), tuple(kept_wide)


def _copies_bytes(shape: ModelShape, method: Method, step: Step, adapted: Sequence[LinearShape]) -> int:
    """Return the bytes of the copies in which fp32 weights enter a product, until the backward pass is over.

    A block in one piece makes them a tile at a time, and keeps none but weights that are rounded in training.
    """
    if method == "full-bf16":
        return 0
    if step.attention == "block":
        head = 2 * shape.head_parameters if step.dtype == "bfloat16" and method not in ADAPTERS else 0
        return head + (step.element_bytes * shape.linear_weights if method == "qat" else 0)
    if method in ADAPTERS:  # that of qat-lora is added to the weight, and enters no product itself
        return 0 if step.dtype == "float32" or method == "qat-lora" else 2 * lora_parameters(adapted, step.rank)
    if step.dtype == "float32":
        return 4 * shape.linear_weights if method == "qat" else 0
    return 2 * (shape.linear_weights + shape.expert_weights + shape.head_parameters)


def _activation_bytes(shape: ModelShape, method: Method, step: Step, adapted: Sequence[LinearShape]) -> tuple[int, int]:
    """Return what is kept until the backward pass, and what one block's backward pass needs on top."""
    masters = method in ("full", "qat")
    precision = Precision(
        product_bytes=step.element_bytes,
        residual_bytes=4 if masters else step.element_bytes,
        trained=method not in ADAPTERS,
    )
    ranks: Counter[str] = Counter()
    if not precision.trained and method != "qat-lora":
        for linear in adapted:
            ranks[block_of(linear.name)] += step.rank
    kept: list[float] = []
    gradients: list[float] = []
    for name, block in blocks(shape).items():
        of_token = block.kept_bytes(
            precision, adapter_features=ranks[name], length=step.length, attention=step.attention
        )
        kept.append(step.tokens * of_token)
        gradients.append(step.tokens * block.backward_bytes(step.element_bytes))
    count = step.blocks_recomputed(len(kept))
    inputs, others = precision.residual_bytes * shape.hidden_size * step.tokens * count, sum(kept[count:])
    # the backward pass comes to the first blocks, which are recomputed, when it has freed what the others kept
    again = [one + other - others for one, other in zip(kept[:count], gradients[:count], strict=True)]
    return int(inputs + others), int(max([*again, *gradients[count:]], default=0))
