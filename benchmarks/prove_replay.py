"""Does `strop prove` keep its word, and what does looking after every row save? Replays with planted drops.

For each margin and discordance (the share of rows on which the two models differ in being right) rows are drawn with
a true drop of 0, half the margin, the margin itself, twice and four times the margin, 1,000 replays of each, and the
test of `strop.evaluation.sequential` looks after every row, for as many rows as 2.5 fixed-size tests. Where a drop is
larger than the discordance, all rows that differ are lost ones.

The rival is a test of fixed size: it looks once, at the end. It orders outcomes by Tango's score statistic for a paired
difference (Tango 1998, Statistics in Medicine 17, 891-908) and takes the critical value that holds 5% exactly for the
worst of several gained shares (so it is at least as good as what is used in practice); the rows it needs for a power
of 80%, of 90%, and of the power that the replays attain, where nothing was lost, are found by adding up all outcomes.

    python benchmarks/prove_replay.py                 all twelve cells, about two minutes
    python benchmarks/prove_replay.py --margins 0.05  the quick ones

Prints markdown tables; nothing is written.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strop.evaluation.sequential import LOG_GOAL, Evidence

MARGINS = (0.01, 0.02, 0.05)
DISCORDANCES = (0.005, 0.02, 0.05, 0.1)
PLANTED = (0.0, 0.5, 1.0, 2.0, 4.0)  # in margins
HORIZON = 2.5  # in rows of the fixed-size test with a power of 90%


# --- the test of fixed size -------------------------------------------------------------------------------------------


def score_statistic(lost: NDArray[np.int64], gained: NDArray[np.int64], rows: int, margin: float) -> NDArray:
    """Tango's score: (rows margin - lost + gained) / sqrt(rows (2 q + margin - margin^2)).

    q is the gained share that is likeliest where the drop is the margin: the root of the likelihood equation for
    probabilities q + margin (lost), q (gained) and 1 - 2 q - margin.
    """
    same = rows - lost - gained
    a = -2.0 * rows
    b = (lost + gained) * (1 - margin) - 2 * margin * (gained + same)
    c = gained * margin * (1 - margin)
    q = np.maximum((-b - np.sqrt(np.maximum(b * b - 4 * a * c, 0))) / (2 * a), 0)
    return (rows * margin - (lost - gained)) / np.sqrt(rows * (2 * q + margin - margin * margin))


def fixed_power(rows: int, margin: float, discordance: float, level: float = 0.05) -> float:
    """Power of the exact test where nothing was lost, all outcomes added up."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, rows + 1)))])
    gained_shares = np.array([0.0, 0.25, 0.5, 1.0, 1.5]) * discordance
    most = [reach(rows, gained_shares[-1] + margin), reach(rows, gained_shares[-1])]
    lost, gained = np.meshgrid(np.arange(most[0] + 1), np.arange(most[1] + 1), indexing="ij")
    inside = lost + gained <= rows
    lost, gained = lost[inside], gained[inside]
    statistic = score_statistic(lost, gained, rows, margin)
    order = np.argsort(-statistic, kind="stable")
    lost, gained, statistic = lost[order], gained[order], statistic[order]

    def chances(p_lost: float, p_gained: float) -> NDArray:
        same = rows - lost - gained
        total = logs[rows] - logs[lost] - logs[gained] - logs[same]
        for count, chance in ((lost, p_lost), (gained, p_gained), (same, 1 - p_lost - p_gained)):
            total = total + np.where(count == 0, 0.0, count * math.log(max(chance, 1e-300)))
        return np.exp(total)

    size = np.max([np.cumsum(chances(share + margin, share)) for share in gained_shares], axis=0)
    rejected = int(np.searchsorted(size, level, side="right"))
    while 0 < rejected < len(statistic) and statistic[rejected - 1] == statistic[rejected]:
        rejected -= 1  # equal outcomes are rejected together or not at all
    return float(chances(discordance / 2, discordance / 2)[:rejected].sum())


def reach(rows: int, share: float) -> int:
    """A count that a share this large passes practically never."""
    return min(rows, math.ceil(rows * share + 7 * math.sqrt(rows * share) + 10))


def fixed_rows(power: float, margin: float, discordance: float) -> int:
    """Rows that the fixed-size test needs, by bisection to a quarter of a percent."""
    low = math.floor(math.log(0.05) / math.log1p(-margin))  # fewer rows refute nothing, even without a difference
    high = max(low + 1, round(12 * discordance / margin**2), round(8 / margin))
    while fixed_power(high, margin, discordance) < power:
        high *= 2
    while high - low > max(1, high // 400):
        middle = (low + high) // 2
        low, high = (low, middle) if fixed_power(middle, margin, discordance) >= power else (middle, high)
    return high


# --- replays ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replays:
    """Rows until each verdict, infinite where there was none: of each planted drop [drops, replays]."""

    passed: NDArray
    failed: NDArray

    @property
    def passes(self) -> NDArray:
        """Share of replays that pass."""
        return (self.passed < self.failed).mean(axis=1)

    @property
    def fails(self) -> NDArray:
        """Share of replays that fail."""
        return (self.failed < self.passed).mean(axis=1)


def replay(margin: float, discordance: float, *, rows: int, replays: int, seed: int) -> Replays:
    """All planted drops side by side."""
    generator = np.random.default_rng(seed)
    drops = np.repeat(np.array(PLANTED) * margin, replays)
    differing = np.maximum(discordance, drops)
    lost, gained = (differing + drops) / 2, (differing - drops) / 2
    evidence = Evidence(np.full(len(drops), margin), margin)
    passed, failed = np.full(len(drops), np.inf), np.full(len(drops), np.inf)
    for row in range(1, rows + 1):
        chance = generator.random(len(drops))
        evidence.add((chance < lost).astype(float) - ((chance >= lost) & (chance < lost + gained)))
        passed[(evidence.log_pass >= LOG_GOAL) & np.isinf(passed)] = row
        failed[(evidence.log_fail >= LOG_GOAL) & np.isinf(failed)] = row
    shape = (len(PLANTED), replays)
    return Replays(passed.reshape(shape), failed.reshape(shape))


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--margins", type=float, nargs="+", default=list(MARGINS))
    parser.add_argument("--discordances", type=float, nargs="+", default=list(DISCORDANCES))
    parser.add_argument("--replays", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.perf_counter()
    cells: list[tuple[list[str], list[str]]] = []
    wrong: list[NDArray] = []
    for margin in options.margins:
        for discordance in options.discordances:
            fixed = [fixed_rows(power, margin, discordance) for power in (0.8, 0.9)]
            found = replay(
                margin, discordance, rows=round(HORIZON * fixed[1]), replays=options.replays, seed=options.seed
            )
            power = min(float(found.passes[0]), 0.999)
            fixed.append(fixed_rows(power, margin, discordance))
            median, *needed = np.quantile(found.passed[0], [0.5, 0.8, 0.9], method="higher")
            name = [f"{margin:g}", f"{discordance:.1%}"]
            cells.append(
                (
                    [
                        *name,
                        *(f"{rows:,}" for rows in fixed),
                        f"{median:,.0f}",
                        *(f"{median / rows:.0%}" for rows in fixed),
                        *(f"{rows:,.0f}" for rows in needed),
                        f"{power:.1%}",
                    ],
                    [
                        *name,
                        *(f"{found.passes[at]:.1%} / {found.fails[at]:.1%}" for at in range(len(PLANTED))),
                        *(f"{np.median(found.failed[at]):,.0f}" for at in (3, 4)),
                    ],
                )
            )
            wrong.append(np.array([found.passes[2], found.fails[2]]))
            print(f"  {margin:g}, {discordance:.1%}: {time.perf_counter() - began:.0f} s", flush=True)
    header = ["margin", "discordance", "fixed 80%", "fixed 90%", "fixed same", "median"]
    header += ["of 80%", "of 90%", "of same", "80% pass by", "90% by", "power by the end"]
    table(header, [cell[0] for cell in cells])
    planted = [f"drop {times:g} x: pass / fail" for times in PLANTED]
    table(["margin", "discordance", *planted, "median to fail, 2 x", "4 x"], [cell[1] for cell in cells])
    error = math.sqrt(0.05 * 0.95 / options.replays)
    print(
        f"\nat the margin, all cells: {np.mean(wrong, axis=0)[0]:.2%} pass, {np.mean(wrong, axis=0)[1]:.2%} fail; the "
        f"most in a cell {np.max(wrong, axis=0)[0]:.1%} and {np.max(wrong, axis=0)[1]:.1%} (one standard error of a "
        f"true 5% is {error:.1%}); {options.replays:,} replays each, seed {options.seed}, "
        f"{time.perf_counter() - began:.0f} s"
    )


def table(header: list[str], rows: list[list[str]]) -> None:
    """Print one in markdown."""
    print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
