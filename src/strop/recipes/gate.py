"""How far a quantized model may be from its source, and what a repair does about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from strop.errors import GateError, UsageError
from strop.files.receipts import Receipt
from strop.numerics.scheme import Scheme
from strop.progress import Reporter
from strop.recipes.calibrated import Calibrated


@dataclass(frozen=True)
class Gate:
    """How far the result may be from its source on held-out rows.

    Attributes:
        max_kl: Most nats per token; None: any.
        min_agreement: Least share of tokens on which both choose the same; None: any.
    """

    max_kl: float | None
    min_agreement: float | None

    @property
    def asked(self) -> bool:
        """Whether there is a gate."""
        return self.max_kl is not None or self.min_agreement is not None

    def problems(self, held_out: Mapping[str, Any]) -> list[str]:
        """What lies past the gate.

        Raises:
            UsageError: there are no held-out figures.
        """
        if not self.asked:
            return []
        if not held_out:
            raise UsageError("a gate needs rows to judge by, and all of them calibrate; give more rows")
        problems: list[str] = []
        if self.max_kl is not None and held_out["kl"] > self.max_kl:
            problems.append(f"KL {held_out['kl']:.4g} nats per token, at most {self.max_kl:g} is allowed")
        if self.min_agreement is not None and held_out["top1_agreement"] < self.min_agreement:
            problems.append(
                f"top-1 agreement {held_out['top1_agreement']:.4f}, at least {self.min_agreement:g} is needed"
            )
        return problems

    def check(self, receipt: Receipt) -> None:
        """Refuse a result that lies past the gate, and name the blocks to blame.

        Raises:
            GateError: it does.
        """
        problems = self.problems(receipt.held_out)
        if problems:
            worst = sorted(receipt.blocks, key=lambda block: -(block["held_out_error"] or 0.0))[:3]
            names = ", ".join(f"{block['name']} ({block['held_out_error']:.2e} of its output)" for block in worst)
            raise GateError(
                f"past the gate on {receipt.held_out['rows']} held-out rows: {'; '.join(problems)}. Furthest from full "
                f"precision: {names}. Nothing was written; use more bits, smaller groups, another method or more rows, "
                "or let --repair give bits to the layers to blame"
            )


def more_bits(
    calibrated: Calibrated,
    schemes: Mapping[str, Scheme],
    known: Sequence[Scheme],
    fits: Callable[[str, Scheme], bool],
    reporter: Reporter,
) -> dict[str, Scheme]:
    """The next format with more bits for the quarter of the layers with the largest error.

    Raises:
        GateError: all of them have the most bits that there are.
    """
    larger: dict[str, Scheme] = {}
    for layer, own in schemes.items():
        above = sorted((s for s in known if s.bits > own.bits and fits(layer, s)), key=lambda s: s.bits)
        if above:
            larger[layer] = above[0]
    if not larger:
        raise GateError(
            "repair: every layer has the most bits that --formats allows, and the gate does not pass "
            f"(KL {calibrated.held_out['kl']:.4g}); nothing was written"
        )
    worst = sorted(larger, key=lambda layer: -calibrated.receipts[layer].relative_error)
    chosen = worst[: max(1, len(schemes) // 4)]
    reporter.note(
        f"repair: KL {calibrated.held_out['kl']:.4g}, agreement {calibrated.held_out['top1_agreement']:.4f}; more bits "
        f"for {len(chosen)} layers, {chosen[0]} first"
    )
    return {**schemes, **{layer: larger[layer] for layer in chosen}}
