"""The rank of an adapter, chosen by a race: three ranks on a slice of the data, judged on rows held out of it.

    slice       training rows ──┬── held out: measured at 1/4, 1/2 and the end     (the run's own valid rows are unseen,
                                └── trained on, every rank on the same batches      so that they can judge later)
    rule        the smallest rank within one standard error of the best held-out loss (`strop.evaluation.smallest`);
                where chance leaves it undecided, the smallest that the intervals do not rule out: a rank too small
                costs a little loss, one too large can break the whole run
    end         the same answer of the paired intervals at two measurements in a row, no smaller rank catching up
                meanwhile; or the steps are used up
    steps       all ranks together at most a quarter of the run's; each 16 at least (fewer mislead), at most the run's

Each rank trains with the run's own learning rate, schedule (squeezed into the race) and batches; alpha is twice the
rank unless it was given. One model is open and the adapters take turns on it. The same arguments give the same choice.
What the race saw is written to `rank.json` and drawn in `rank.png` in the run's folder.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from strop.config import ALL_LINEAR, Lora, Minutes, QLora, TuneConfig, data_name
from strop.data.batches import BatchStream
from strop.data.mixing import Drawn
from strop.data.store import sample_lengths, sample_records
from strop.data.templates import Sample
from strop.errors import ModelError, TrainingError, UsageError
from strop.evaluation.likelihood import likelihood
from strop.evaluation.smallest import (
    Standing,
    best_of,
    decided,
    smallest_good,
    smallest_possible,
    standings,
)
from strop.files.folders import write_json
from strop.layers.base import linear_shape
from strop.layers.surgery import detach_lora
from strop.precision import autocast
from strop.progress import SILENT, Reporter
from strop.recipes.session import Session, open_session
from strop.training.candidates import AdapterShape, Candidate
from strop.training.losses import find_head
from strop.training.settings import count_steps

FILE: Final = "rank.json"
PICTURE: Final = "rank.png"

LARGEST_RANK: Final = 64
APART: Final = 4
"""Each rank raced is so many times the one before."""

RACE_SHARE: Final = 0.25
"""Of the run's optimizer steps, for all ranks together."""

LEAST_STEPS: Final = 16
MEASURED_AT: Final = (0.25, 0.5, 1.0)
HELD_SHARE: Final = 0.2
HELD_ROWS: Final = (48, 256)
LEAST_ROWS: Final = 30


@dataclass(frozen=True)
class Round:
    """One measurement of the race.

    Attributes:
        step: Optimizer steps that each rank had done.
        board: Every rank still in the race, ascending.
    """

    step: int
    board: list[Standing]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"step": self.step, "board": [standing.to_dict() for standing in self.board]}


@dataclass(frozen=True)
class RankChoice:
    """The rank, and everything that it rests on.

    Attributes:
        rank: The rank chosen.
        verdict: "decided" by the intervals, or "undecided": then it is the smallest that they do not rule out.
        candidates: The ranks raced, ascending.
        rounds: The measurements, in order.
        left: Ranks that left before the end, with the reason.
        steps: Optimizer steps that each rank may take at most.
        steps_used: Optimizer steps of all ranks together.
        run_steps: Optimizer steps of the run that the race is for.
        slice_rows: Rows trained on.
        held_rows: Rows measured on.
        tokens: Supervised tokens of each held-out record (a text's windows count together).
        row_losses: By rank, nats of each held-out record at that rank's last measurement.
        alpha: As it was given; None: twice the rank.
        seed: Of everything.
        seconds: The race took, opening the model included.
    """

    rank: int
    verdict: str
    candidates: tuple[int, ...]
    rounds: list[Round]
    left: dict[int, str]
    steps: int
    steps_used: int
    run_steps: int
    slice_rows: int
    held_rows: int
    tokens: list[int]
    row_losses: dict[int, list[float]]
    alpha: float | None
    seed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Every figure as JSON values."""
        return {**asdict(self), "rounds": [each.to_dict() for each in self.rounds], "why": self.lines()}

    def lines(self) -> list[str]:
        """Why this rank, in a few sentences."""
        last = self.rounds[-1]
        best, chosen = best_of(last.board), next(each for each in last.board if each.size == self.rank)
        lines = [_round_line(each) for each in self.rounds]
        lines += [f"rank {rank} left the race: {why}" for rank, why in self.left.items()]
        if chosen is best:
            lines.append(
                f"rank {self.rank}: the best held-out loss, {best.loss:.4f} nats per token, and no smaller one "
                f"lies within one standard error ({best.error:.4f}) of it"
            )
        elif self.verdict == "decided":
            lines.append(
                f"rank {self.rank}: the smallest within one standard error ({best.error:.4f}) of the best held-out "
                f"loss, {best.loss:.4f} nats per token of rank {best.size}; it lies {chosen.loss - best.loss:.4f} above"
            )
        else:
            lines.append(
                f"rank {self.rank}: the smallest that is not ruled out; whether it lies within one standard error "
                f"({best.error:.4f}) of the best held-out loss, {best.loss:.4f} nats per token of rank {best.size}, "
                "is open"
            )
        lines.append(self._how_sure(last))
        gaps = [{each.size: each.difference for each in round.board} for round in self.rounds[-2:]]
        for size, gap in gaps[-1].items():
            earlier = gaps[0].get(size)
            if size < self.rank and gap and earlier and gap.estimate < earlier.estimate:
                lines.append(
                    f"rank {size} was catching up ({earlier.estimate:+.4f}, then {gap.estimate:+.4f}): in a longer run "
                    "it may be enough"
                )
        if self.rank == self.candidates[-1] and len(self.candidates) > 1:
            lines.append(f"it is the largest that was tried: a larger one may do better (--rank {2 * self.rank})")
        lines.append(
            f"the race took {self.seconds:.1f} s and {self.steps_used:,} steps, "
            f"{self.steps_used / self.run_steps:.0%} of the {self.run_steps:,} that the run has"
        )
        return lines

    def write(self, folder: Path) -> None:
        """Write `rank.json` and `rank.png`."""
        from strop.recipes.rank_picture import draw

        write_json(folder / FILE, self.to_dict())
        draw(self, folder / PICTURE)

    def _how_sure(self, last: Round) -> str:
        if self.verdict == "decided":
            if last.step < self.steps:
                return f"the intervals said so twice in a row: the race ended after {last.step} of {self.steps} steps"
            return f"the intervals say so (95%, {len(self.tokens)} held-out records)"
        chosen = next(each for each in last.board if each.size == self.rank)
        gap, measured = chosen.difference, smallest_good(last.board).size
        if gap is None or chosen.place != "open":
            return f"not decided: no other rank was left after {last.step} of {self.steps} steps"
        between = "unknown" if gap.low is None else f"{gap.low:+.4f} to {gap.high:+.4f}"
        otherwise = "" if measured == self.rank else f"; by the losses alone it would be rank {measured}"
        return (
            f"not decided: rank {self.rank} lies {gap.estimate:+.4f} from the best, 95% interval {between} "
            f"({len(self.tokens)} held-out records); the smaller rank has the benefit of the doubt, and another slice "
            f"of the data might choose otherwise{otherwise}"
        )


def choose_rank(
    config: TuneConfig,
    *,
    candidates: Sequence[int] | None = None,
    share: float = RACE_SHARE,
    cache: Path | None = None,
    check: Callable[[Session], object] | None = None,
    reporter: Reporter = SILENT,
) -> RankChoice:
    """Race ranks for the adapter that `config` asks for.

    Args:
        config: A run by `lora` or `qlora`, its rank `auto`.
        candidates: The ranks to race; by default three from the smallest layer's size (`race_ranks`).
        share: Of the run's steps, for all ranks together.
        cache: As for `open_session`.
        check: Given the opened run, with an adapter of rank 1, before anything is raced; refuses by raising.
        reporter: Told what is raced, and the steps done.

    Raises:
        UsageError: the model is an adapter already, or the rows are too few.
        TrainingError: no rank's loss stayed finite.
        Others as `open_session` raises them.
    """
    began = time.perf_counter()
    assert isinstance(config.method, Lora | QLora), "only adapters have a rank"
    session = open_session(config.replace(rank=1, alpha=config.method.alpha), reporter=SILENT, cache=cache)
    if session.base.adapter is not None:
        raise UsageError(
            f"rank: {config.model} is an adapter of rank {session.base.adapter.rank}; leave --rank auto out"
        )
    if check is not None:
        check(session)
    detach_lora(session.model)
    shapes = [linear_shape(session.model.get_submodule(name)) for name in session.trained.layers]
    ranks = tuple(sorted(set(candidates or race_ranks(min(min(shape) for shape in shapes)))))
    race = _Race(session, config.method, ranks, share, reporter)
    choice = race.go(began)
    del race, session
    gc.collect()
    return choice


def race_ranks(most: int) -> tuple[int, ...]:
    """The ranks to race where the smallest adapted layer has `most` rows or columns: powers of two, a factor 4 apart.

    >>> race_ranks(4096), race_ranks(32), race_ranks(3), race_ranks(1)
    ((4, 16, 64), (2, 8, 32), (1, 2), (1,))
    """
    top = min(LARGEST_RANK, 1 << (most.bit_length() - 1))
    return tuple(sorted({max(1, top // APART**2), max(1, top // APART), top}))


def race_steps(run_steps: int, ranks: int, share: float) -> int:
    """Optimizer steps of each rank: its part of the share, at least `LEAST_STEPS`, never more than the run's.

    >>> race_steps(1200, 3, 0.25), race_steps(60, 3, 0.25), race_steps(5, 3, 0.25)
    (100, 16, 5)
    """
    return min(run_steps, max(LEAST_STEPS, int(share * run_steps / ranks)))


class _Race:
    """One call of `choose_rank`."""

    def __init__(
        self, session: Session, method: Lora | QLora, ranks: tuple[int, ...], share: float, reporter: Reporter
    ) -> None:
        self.session, self.method, self.ranks, self.reporter = session, method, ranks, reporter
        config = session.config
        self.settings = session.train_settings()
        batch = session.stream.next_step()[0]
        self.head = find_head(session.model, batch)
        self.run_steps = self._steps_of_run()
        self.steps = race_steps(self.run_steps, len(ranks), share)
        self.rows_of_step = config.optimization.batch_size * config.optimization.accumulation
        split = hold_out(
            session.stream.samples, wanted=self._wanted_rows(), seed=config.seed, where=data_name(config.data)
        )
        self.kept, self.held = split.kept, split.held
        self.document_of_row = np.unique(split.documents, return_inverse=True)[1]
        self.tokens = self._by_document(np.array([sample.supervised for sample in self.held], dtype=np.float64))
        self.losses: dict[int, NDArray[np.float64]] = {}
        self.left: dict[int, str] = {}

    def go(self, began: float) -> RankChoice:
        seed, shown = self.session.config.seed, _listed(self.ranks)
        self.reporter.note(
            f"rank auto: {shown} race on {len(self.kept):,} training rows and are measured on {len(self.held):,} held "
            f"out of them (seed {seed}), {self.steps} steps each at most"
        )
        alive = {rank: self._candidate(rank, self.steps) for rank in self.ranks}
        rounds: list[Round] = []
        answer: int | None = None
        sure = False
        self.reporter.start(f"racing ranks {shown}", self.steps * len(self.ranks), "steps")
        try:
            for until in sorted({math.ceil(part * self.steps) for part in MEASURED_AT}):
                rounds.append(Round(until, self._measure(alive, until)))
                board, earlier = rounds[-1].board, answer
                answer, behind = decided(board), _falling_behind(rounds)
                sure = answer is not None and (
                    until == self.steps
                    or (answer == earlier and all(s.size in behind for s in board if s.size < answer))
                )
                if sure or len(alive) == 1:
                    break
                for rank in behind:
                    self.left[rank] = f"decidedly worse at two measurements, the last at step {until}"
                    del alive[rank]
        finally:
            self.reporter.finish()
        return RankChoice(
            rank=smallest_possible(rounds[-1].board).size,
            verdict="decided" if sure else "undecided",
            candidates=self.ranks,
            rounds=rounds,
            left=self.left,
            steps=self.steps,
            steps_used=self.steps_used,
            run_steps=self.run_steps,
            slice_rows=min(len(self.kept), self.steps * self.rows_of_step),
            held_rows=len(self.held),
            tokens=[int(count) for count in self.tokens],
            row_losses={rank: [float(value) for value in sums] for rank, sums in self.losses.items()},
            alpha=self.method.alpha,
            seed=seed,
            seconds=time.perf_counter() - began,
        )

    steps_used = 0

    def _measure(self, alive: dict[int, Candidate], until: int) -> list[Standing]:
        """Train every candidate to step `until` and compare them on the held-out rows; the broken ones leave."""
        session = self.session
        for rank, candidate in list(alive.items()):
            candidate.train(until, after_step=self._count)
            if candidate.broken is None:
                try:
                    with candidate.attached(), autocast(session.device, session.dtype):
                        measured = likelihood(session.model, self.held, batch_size=self.settings.eval_batch_size)
                    self.losses[rank] = self._by_document(measured.nll_sums.numpy())
                except ModelError as error:
                    candidate.broken = f"step {until}: {error}"
            if candidate.broken is not None:
                self.left[rank] = candidate.broken
                del alive[rank]
        if not alive:
            first = next(iter(self.left.values()))
            raise TrainingError(f"rank auto: no rank's loss stayed finite ({first}); lower the learning rate")
        return standings({rank: self.losses[rank] for rank in alive}, self.tokens, seed=session.config.seed)

    def _by_document(self, per_row: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(self.document_of_row, weights=per_row).astype(np.float64)

    def _count(self) -> None:
        self.steps_used += 1
        self.reporter.advance(self.steps_used)

    def _candidate(self, rank: int, steps: int, samples: Sequence[Sample] | None = None) -> Candidate:
        session, method = self.session, self.method
        samples_of_run, optimization = session.config.samples, session.config.optimization
        assert samples_of_run.max_length is not None
        stream = BatchStream(
            self.kept if samples is None else samples,
            batch_size=optimization.batch_size,
            accumulation=optimization.accumulation,
            packing=samples_of_run.packing,
            group_by_length=samples_of_run.group_by_length,
            max_length=samples_of_run.max_length,
            seed=session.config.seed,
            pad_id=session.stream.pad_id,
            attention=session.stream.attention,
        )
        targets = ALL_LINEAR if method.targets == (ALL_LINEAR,) else method.targets
        shape = AdapterShape(targets, method.alpha, method.dropout, method.rank_stabilised)
        return Candidate(session.model, rank, shape, stream, self.settings, steps=steps, head=self.head)

    def _steps_of_run(self) -> int:
        """Optimizer steps that the run will have; where it is measured in minutes, from three timed ones."""
        session, length = self.session, self.session.config.length
        steps = count_steps(length, session.stream.steps_per_epoch)
        if steps is not None:
            return steps
        assert isinstance(length, Minutes)
        times: list[float] = []
        timed = self._candidate(self.ranks[-1], 3, session.stream.samples)
        for step in range(1, 4):
            start = time.perf_counter()
            timed.train(step, after_step=lambda: None)
            times.append(time.perf_counter() - start)
        return max(1, int(0.9 * 60 * length.minutes / statistics.median(times)))

    def _wanted_rows(self) -> int:
        """Held-out rows: measuring them costs about as much as a third of the race's training."""
        passes = len(self.ranks) * len(MEASURED_AT) / 3  # a forward pass costs a third of a training step
        wanted = self.steps * len(self.ranks) * self.rows_of_step / 3 / passes
        return round(min(max(wanted, HELD_ROWS[0]), HELD_ROWS[1]))


@dataclass(frozen=True)
class HeldOut:
    """Training rows, split.

    Attributes:
        kept: Those that the race trains on.
        held: Those that it is judged by.
        documents: What each of `held` is a part of (`documents`).
    """

    kept: Sequence[Sample]
    held: list[Sample]
    documents: list[int]


def hold_out(samples: Sequence[Sample], *, wanted: int, seed: int, where: str) -> HeldOut:
    """Split training rows into those that the race trains on and those that it is judged by.

    Whole records are held out (`documents`), at most a fifth of them, and of each record as many samples as come to
    about `wanted` in all. A sample that says the same as a held-out one is left out of the slice. Rows that lie on the
    disk stay there.

    Args:
        samples: The training rows.
        wanted: Held-out rows, about.
        seed: Decides which.
        where: The data's name, for the message.

    Raises:
        UsageError: there are fewer than 30 rows, or nothing but copies of one.
    """
    if len(samples) < LEAST_ROWS:
        raise too_few_rows(len(samples), where)
    generator = torch.Generator().manual_seed(seed)
    document_of = documents(samples)
    names, begins = np.unique(document_of[by_name := document_of.argsort(kind="stable")], return_index=True)
    rows_of = np.split(by_name, begins[1:])
    count = min(wanted, int(HELD_SHARE * len(names)))
    of_each = max(1, round(wanted / count))
    free = np.ones(len(samples), dtype=bool)
    rows: list[int] = []
    for place in sorted(torch.randperm(len(names), generator=generator)[:count].tolist()):
        those = rows_of[place]
        free[those] = False
        taken = torch.randperm(len(those), generator=generator)[:of_each].tolist()
        rows += [int(those[index]) for index in sorted(taken)]
    held = [samples[row] for row in rows]
    said = {tuple(sample.input_ids) for sample in held}
    lengths, of_said = sample_lengths(samples), {len(text) for text in said}
    for row in np.flatnonzero(free):
        if lengths[row] in of_said and tuple(samples[int(row)].input_ids) in said:
            free[row] = False
    if not free.any():
        raise UsageError(f"{where}: rank auto finds only one text in all its rows; name a rank (--rank 16)")
    kept = Drawn(samples, array("q", np.flatnonzero(free).tolist()))
    return HeldOut(kept, held, [int(document_of[row]) for row in rows])


def too_few_rows(rows: int, where: str) -> UsageError:
    """What a race says of data too small for it."""
    return UsageError(
        f"{where}: rank auto needs at least {LEAST_ROWS} training rows to hold some out, and there are {rows}; name a "
        "rank (--rank 16)"
    )


def documents(samples: Sequence[Sample]) -> NDArray[np.int64]:
    """What each sample is a part of, and what chance is counted by: its record [N].

    A text of fewer than 30 records (a file of a hundred kilobytes) is counted by its windows.
    """
    records = sample_records(samples)
    return records if len(np.unique(records)) >= LEAST_ROWS else np.arange(len(samples))


def _falling_behind(rounds: Sequence[Round]) -> list[int]:
    """Ranks that are out at the last two measurements, and no nearer to the best at the second."""
    if len(rounds) < 2:
        return []
    before = {
        each.size: each.difference.estimate for each in rounds[-2].board if each.place == "out" and each.difference
    }
    return [
        each.size
        for each in rounds[-1].board
        if each.place == "out" and each.difference and each.difference.estimate >= before.get(each.size, math.inf)
    ]


def _round_line(each: Round) -> str:
    shown = "; ".join(f"rank {s.size} {s.loss:.4f} ± {s.error:.4f} ({s.place})" for s in each.board)
    return f"step {each.step}: {shown}"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:-1])) + (" and " if len(ranks) > 1 else "") + str(ranks[-1])
