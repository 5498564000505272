"""What a step really does, seen in a trial that is undone: packing, gradients, movement, memory, time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from strop.config import Minutes
from strop.data.packing import check_isolation
from strop.errors import TrainingError
from strop.layers.quant_experts import quant_experts
from strop.layers.surgery import experts
from strop.memory import resident_bytes
from strop.planner.hardware import this_machine
from strop.recipes.checks.collated import Seen
from strop.recipes.checks.finding import Finding, count, share
from strop.recipes.checks.words import seconds_text, size
from strop.recipes.session import Session
from strop.training.settings import count_steps
from strop.training.shapes import common_width, positions_of
from strop.training.trial import GRADIENT_TOLERANCE, Steps, Trial, trial

MANY_VANISHED: Final = 0.05
"""Share of updates that may be lost in the weights' own precision: a few are below fp32's resolution too."""

FIRST_STEPS: Final = "first steps"

LESS_MEMORY: Final = "lower batch_size and raise accumulation, or set checkpointing: all"

_FULL = 0.9


def check_packing(session: Session, seen: Seen) -> list[Finding]:
    """Are packed documents apart? Measured on the model by replacing the neighbours."""
    stream = session.stream
    if not stream.packing:
        return []
    if seen.packed_row is None:
        return [Finding("fine", "packing", "no sequence holds two documents, so there is nothing to keep apart")]
    try:
        check_isolation(session.model, seen.packed_row.to(session.device))
    except TrainingError as error:
        return [Finding("refuse", "packing", str(error).removeprefix("packing: "), "set packing: false for this model")]
    return [
        Finding(
            "fine",
            "packing",
            "documents in one sequence do not see each other: with one replaced, another's logits stayed as they were",
        )
    ]


def check_coverage(session: Session) -> Finding:
    """How much of the model is trained; experts that no adapter or grid reaches are named."""
    trained = session.trained
    names = dict(session.model.named_parameters())
    left = {name: names[name].numel() for name in experts(session.model)} if trained.layers else {}
    for name, held in quant_experts(session.model).items():
        left[name] = held.count * held.out_features * held.in_features
    frozen = [name for name in left if name not in names or not names[name].requires_grad]
    frozen = frozen if session.config.method.name != "qat" else []
    weights = sum(left.values())
    figures = {
        "trained": trained.parameters,
        "total": trained.total_parameters,
        "layers": len(trained.layers),
        "expert_tensors": len(left),
        "expert_share": weights / trained.total_parameters,
    }
    said = f"{trained.parameters:,} of {trained.total_parameters:,} parameters are trained ({trained.share:.2%})"
    if not left:
        layers = f", in {count(len(trained.layers), 'linear layer')}" if trained.layers else ""
        if trained.layers and trained.parameters == trained.total_parameters:
            layers = f", {count(len(trained.layers), 'linear layer')} of them through {trained.scheme}"
        return Finding("fine", "coverage", said + layers, "", figures)
    what = "stay as they are" if frozen else "are trained but not rounded"
    return Finding(
        "warn",
        "coverage",
        f"{said}; {count(len(left), 'tensor')} of experts, {share(weights, trained.total_parameters)} of the weights, "
        f"{what}: they are no linear layers",
        "train with --method full if the experts must change" if frozen else "plan with the experts in 16 bits",
        figures,
    )


def check_learning(session: Session, seen: Seen, *, steps: bool, packed_apart: bool = True) -> list[Finding]:
    """The gradient of accumulated rows, and with `steps` two real steps: who moves, what it takes."""
    if not packed_apart or not seen.learned:
        return []
    findings: list[Finding] = []
    try:
        with trial(session.model, session.stream, session.train_settings(), session.objective) as one:
            findings += _accumulation(session, one, seen)
            if steps:
                findings += _steps(session, seen, one.take_steps([0, seen.largest_step]))
    except torch.OutOfMemoryError:
        said = f"a step does not fit into the memory of {session.device}"
        return [*findings, Finding("refuse", "memory", said, LESS_MEMORY)]
    except TrainingError as error:
        return [*findings, Finding("refuse", FIRST_STEPS, str(error), "mend what the message names")]
    return findings


# --- accumulation -----------------------------------------------------------------------------------------------------


def _accumulation(session: Session, one: Trial, seen: Seen) -> list[Finding]:
    rows = _uneven_rows(one)
    if len(rows) < 2:
        return []
    difference = one.gradient_difference(rows)
    dtype = torch.float64 if session.model.dtype == torch.float64 else session.dtype
    allowed = GRADIENT_TOLERANCE[dtype]
    limit, samples = positions_of(session.model), one.stream.samples
    widths = {common_width(sum(len(samples[index]) for index in row), limit=limit) for row in rows}
    shapes = len(widths) + 1  # each row by itself, and all at once
    figures = {"rows": len(rows), "shapes": shapes, "relative_difference": difference, "allowed": allowed}
    if difference <= allowed:
        return [
            Finding(
                "fine",
                "accumulation",
                f"{len(rows)} rows give the same gradient one at a time as at once (relative difference "
                f"{difference:.1e})",
                "",
                figures,
            )
        ]
    return [
        Finding(
            "refuse",
            "accumulation",
            f"{len(rows)} rows give another gradient one at a time than at once: apart by {difference:.1e} of it, at "
            f"most {allowed:.0e} is rounding",
            "set accumulation: 1 and the largest batch_size that fits; the loss is not summed over the step's tokens",
            figures,
        )
    ]


def _uneven_rows(one: Trial, most: int = 4) -> list[tuple[int, ...]]:
    """Rows of the first steps whose numbers of learned tokens are as far apart as can be found among a few."""
    stream = one.stream
    place = stream.state_dict()
    rows: list[tuple[int, ...]] = []
    for _ in range(min(stream.steps_per_epoch, 8)):
        rows += [row for batch in stream.next_step() for row in batch.rows]
        if len(rows) >= 2 * most:
            break
    stream.load_state_dict(place)
    rows = sorted(set(rows), key=lambda row: sum(stream.samples[index].supervised for index in row))
    if len(rows) <= most:
        return rows
    return [rows[0], rows[1], rows[-2], rows[-1]]


# --- two steps --------------------------------------------------------------------------------------------------------


def _steps(session: Session, seen: Seen, steps: Steps) -> list[Finding]:
    return [_movement(steps), _updates(session, steps), _memory(session, steps), _time(session, seen, steps)]


def _movement(steps: Steps) -> Finding:
    figures = {
        "tensors": steps.tensors,
        "unmoved": steps.unmoved,
        "too_small": steps.too_small,
        "without_gradient": steps.silent,
    }
    if steps.unmoved:
        return Finding(
            "refuse",
            "movement",
            f"{len(steps.unmoved):,} of {count(steps.tensors, 'trained tensor')} have a gradient that the "
            f"optimizer never applies: {_first(steps.unmoved)}",
            "leave these layers out of the targets, or choose another method",
            figures,
        )
    if steps.too_small:
        return Finding(
            "warn",
            "movement",
            f"two steps left {len(steps.too_small):,} of {count(steps.tensors, 'trained tensor')} as they were: their "
            f"updates are too small: {_first(steps.too_small)}",
            "raise the learning rate",
            figures,
        )
    if steps.silent:
        return Finding(
            "warn",
            "movement",
            f"the gradient of {len(steps.silent):,} of {count(steps.tensors, 'trained tensor')} was exactly zero in "
            f"two steps: {_first(steps.silent)}",
            "leave these layers out of the targets if they are never used",
            figures,
        )
    return Finding(
        "fine", "movement", f"all {count(steps.tensors, 'trained tensor')} had a gradient and moved", "", figures
    )


def _updates(session: Session, steps: Steps) -> Finding:
    figures = {"vanished": steps.vanished, "vanished_in_bfloat16": steps.vanished_in_bfloat16}
    narrow = sorted({str(p.dtype).removeprefix("torch.") for p in session.model.parameters() if p.requires_grad})
    if steps.vanished > MANY_VANISHED:
        return Finding(
            "warn",
            "updates",
            f"{steps.vanished:.1%} of the updates are too small to change a weight kept in {', '.join(narrow)}",
            "keep the trained weights in float32, or raise the learning rate",
            figures,
        )
    lost = f"; in bfloat16 {steps.vanished_in_bfloat16:.1%} would be lost" if steps.vanished_in_bfloat16 >= 1e-3 else ""
    said = "all" if steps.vanished < 1e-3 else f"{1 - steps.vanished:.1%} of"
    return Finding(
        "fine",
        "updates",
        f"{said} the updates are large enough to change their weights, kept in {', '.join(narrow)}{lost}",
        "",
        figures,
    )


def _first(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _memory(session: Session, steps: Steps) -> Finding:
    if session.device.type == "cuda":
        total = torch.cuda.get_device_properties(session.device).total_memory
    else:
        total = this_machine().available_bytes + resident_bytes()
    figures = {"peak_bytes": steps.peak_bytes, "available_bytes": total}
    said = f"the process held {size(steps.peak_bytes)} at the largest step; {size(total)} are there for it"
    if steps.peak_bytes > _FULL * total:
        return Finding("warn", "memory", said, LESS_MEMORY, figures)
    return Finding("fine", "memory", said, "", figures)


def _time(session: Session, seen: Seen, steps: Steps) -> Finding:
    """From the faster of the two steps, per token: the first one also makes the processor's kernels."""
    per_token = min(seconds / max(1, tokens) for seconds, tokens in zip(steps.seconds, steps.tokens, strict=True))
    per_step = per_token * seen.tokens / seen.steps
    total = count_steps(session.config.length, session.stream.steps_per_epoch)
    figures = {"step_seconds": steps.seconds, "tokens_per_second": 1 / per_token, "steps": total}
    if isinstance(session.config.length, Minutes) or total is None:
        return Finding("fine", "time", f"about {seconds_text(per_step)} a step", "", figures)
    figures["run_seconds"] = total * per_step
    return Finding(
        "fine",
        "time",
        f"about {seconds_text(total * per_step)} for {count(total, 'step')} (two were tried; evaluations and saving "
        "come on top)",
        "",
        figures,
    )
