"""What each stage of a run gained on its own held-out rows and forgot on those of the stages before.

The rows are rendered once and kept as tokens with their text, so that every model answers the very same ones. Per model
and set: nats per supervised token, summed by row (all windows of a text are one row). A stage's effect on a set is the
paired difference between the model after it and the model before it, with a bootstrap by row (`strop.evaluation.
statistics`): "gained" or "forgot" where the interval excludes zero, else "undecided".

A stage's own best checkpoint is chosen on its own held-out rows, so its gain there is a little flattered; its effects
on other stages' rows are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from strop.data.templates import Sample
from strop.evaluation.likelihood import likelihood
from strop.evaluation.statistics import Difference, bootstrap_mean, paired_bootstrap
from strop.models import load
from strop.precision import choose_device
from strop.progress import SILENT, Reporter

WORDS: Final = {"better": "gained", "worse": "forgot", "undecided": "undecided"}


@dataclass(frozen=True)
class HeldOut:
    """Rows that models are measured on.

    Attributes:
        samples: tokens and labels; those of one row have one `index`.
        texts: what each sample says.
    """

    samples: list[Sample]
    texts: list[str]

    @classmethod
    def of(cls, samples: Sequence[Sample], tokenizer: Any) -> HeldOut:
        """Rows as they were rendered, with their text for people."""
        return cls(list(samples), [tokenizer.decode(sample.input_ids) for sample in samples])

    @property
    def rows(self) -> int:
        """Rows."""
        return len({sample.index for sample in self.samples})

    @property
    def tokens(self) -> int:
        """Supervised tokens."""
        return sum(sample.supervised for sample in self.samples)

    def write(self, path: Path) -> None:
        """Write one JSON object a sample: row, text, input_ids, labels."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps(
                {"row": sample.index, "text": text, "input_ids": sample.input_ids, "labels": sample.labels},
                ensure_ascii=False,
            )
            for sample, text in zip(self.samples, self.texts, strict=True)
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def held_out_file(run_dir: Path, folder: str) -> Path:
    """Where a stage's held-out rows are kept."""
    return run_dir / "held_out" / f"{folder}.jsonl"


def read_held_out(path: Path) -> HeldOut:
    """Read what `HeldOut.write` wrote."""
    samples, texts = [], []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        samples.append(Sample(row["input_ids"], row["labels"], row["row"]))
        texts.append(row["text"])
    return HeldOut(samples, texts)


def measure(
    model: str, sets: Mapping[str, HeldOut], *, device: str, reporter: Reporter = SILENT, name: str = "model"
) -> dict[str, dict[str, list[float]]]:
    """Nats and supervised tokens by row, of one model on every set, as the model stands on the disk."""
    opened = load(model, device=choose_device(device), tokenizer=False)
    found: dict[str, dict[str, list[float]]] = {}
    reporter.start(f"measuring {name}", len(sets), "sets")
    try:
        for number, (held, rows) in enumerate(sets.items(), 1):
            scored = likelihood(opened.model, rows.samples)
            sums: dict[int, list[float]] = {}
            for sample, nats, tokens in zip(
                rows.samples, scored.nll_sums.tolist(), scored.tokens.tolist(), strict=True
            ):
                entry = sums.setdefault(sample.index, [0.0, 0])
                entry[0] += nats
                entry[1] += tokens
            found[held] = {"nats": [nats for nats, _ in sums.values()], "tokens": [count for _, count in sums.values()]}
            reporter.advance(number)
    finally:
        reporter.finish()
    return found


def account(report: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """Matrix, effects of each stage and the change over all stages, from the sums by row that were measured.

    Returns:
        `matrix`: per model the mean loss on every set, with its interval; `effects`: per stage its change on its own
        set and on those of the stages before; `overall`: per set the change from the base to the last model.
    """
    measured, held_out = report["measured"], report["held_out"]
    names = [entry["name"] for entry in held_out if not entry.get("same_as")]
    own = {entry["name"]: entry.get("same_as") or entry["name"] for entry in held_out}  # stage -> its set
    matrix = [
        {
            "model": model["model"],
            "loss": [
                bootstrap_mean(model["sets"][name]["nats"], model["sets"][name]["tokens"], seed=seed).to_dict()
                for name in names
            ],
        }
        for model in measured
    ]
    effects = [
        _effect(measured[number - 1], measured[number], stage, held, own=own[stage] == held, seed=seed)
        for number, stage in enumerate(own, 1)
        if number < len(measured)
        for held in dict.fromkeys((own[stage], *(own[before] for before in list(own)[: number - 1])))
    ]
    last = measured[-1] if len(measured) > 1 else None
    overall = (
        [] if last is None else [_effect(measured[0], last, "all stages", held, own=False, seed=seed) for held in names]
    )
    return {"matrix": matrix, "effects": effects, "overall": overall}


def _effect(before: Any, after: Any, stage: str, held: str, *, own: bool, seed: int) -> dict[str, Any]:
    rows, other = before["sets"][held], after["sets"][held]
    difference = paired_bootstrap(rows["nats"], other["nats"], rows["tokens"], seed=seed)
    effect = {
        "stage": stage,
        "set": held,
        "own": own,
        "word": WORDS[difference.verdict],
        "difference": difference.to_dict(),
    }
    whose = "its own held-out rows" if own else f"the held-out rows of {held}"
    return effect | {"sentence": _sentence(stage, whose, difference)}


def _sentence(stage: str, whose: str, difference: Difference) -> str:
    size, low, high = abs(difference.estimate), difference.low, difference.high
    if difference.verdict != "undecided" and low is not None and high is not None:
        ends = sorted((abs(low), abs(high)))
        verb = WORDS[difference.verdict]
        return f"{stage}: {verb} {size:.4f} nats per token ({ends[0]:.4f} to {ends[1]:.4f}) on {whose}"
    moved = "fell" if difference.estimate < 0 else "rose"
    interval = f" (change {low:+.4f} to {high:+.4f})" if low is not None and high is not None else ""
    few = "" if interval else f", and {difference.rows} rows are too few for an interval"
    needed = f"; about {difference.rows_needed:,} rows would decide" if difference.rows_needed else ""
    return f"{stage}: undecided on {whose}: the loss {moved} by {size:.4f} nats per token{interval}{few}{needed}"
