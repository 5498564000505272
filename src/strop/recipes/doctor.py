"""`strop doctor`: what training will really see and do, before it is begun.

Everything is opened, rendered and attached as `tune` does it (`open_session`), then looked at: the batches that will be
collated, the rows they came from, the prompts that serving will ask with, the disk, and two real steps that are undone
again. Each finding is refuse, warn or fine. `check_start` is the part of it that every `tune` begins with.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from strop.config import LowRank, TuneConfig, data_name, load_config
from strop.errors import DataError, ModelError, TrainingError
from strop.pages.atomic import write_whole
from strop.pages.examination import render_examination
from strop.progress import SILENT, Reporter
from strop.recipes.checks.collated import Seen, SeenRow, check_collated, look
from strop.recipes.checks.disk import check_disk
from strop.recipes.checks.finding import Finding, by_weight, count
from strop.recipes.checks.learning import FIRST_STEPS, check_coverage, check_learning, check_packing
from strop.recipes.checks.rows import check_overlap, check_rows
from strop.recipes.checks.serving import check_template
from strop.recipes.rank import LARGEST_RANK
from strop.recipes.session import Session, open_session

MOST_TOKENS: Final = 20_000_000
"""Tokens of the first epoch that `doctor` reads back."""

QUICK_TOKENS: Final = 100_000
"""Tokens that are read back at the start of every run: about a tenth of a second."""

QUICK_FLOPS: Final = 2e10
"""Floating-point operations of a step up to which a run begins with a trial: about a second on two old cores."""

TOLD: Final = frozenset({"truncation", "rows", "coverage"})
"""Findings that opening the data and the model has told already."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text in which every token is learned, or none is."""

    text: str
    learned: bool


@dataclass(frozen=True)
class ShownDocument:
    """A document as the model gets it: where it came from, and its text in pieces."""

    source: str
    row: int
    tokens: int
    learned: int
    pieces: list[Piece]


@dataclass(frozen=True)
class ShownRow:
    """A row of a batch: one document, or several packed ones, and the padding behind them."""

    documents: list[ShownDocument]
    padding: int


@dataclass(frozen=True)
class Examination:
    """What `doctor` found.

    Attributes:
        findings: the gravest first.
        rows: some rows of the first step, decoded.
        model, data, method: what was looked at.
    """

    findings: list[Finding]
    rows: list[ShownRow]
    model: str
    data: str
    method: str

    @property
    def refused(self) -> bool:
        """Whether training would be refused."""
        return any(finding.level == "refuse" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One sentence over all findings."""
        levels = [finding.level for finding in self.findings]
        refused, warned = levels.count("refuse"), levels.count("warn")
        if refused:
            return f"Not ready to train: {count(refused, 'thing')} must be mended" + (
                f", {warned} more to look at." if warned else "."
            )
        if warned:
            return f"Ready to train, with {count(warned, 'thing')} to look at first."
        return f"Ready to train: {count(len(levels), 'check')}, all fine."

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "verdict": self.verdict,
            "refused": self.refused,
            "model": self.model,
            "data": self.data,
            "method": self.method,
            "findings": [finding.to_dict() for finding in self.findings],
            "rows": [
                {
                    "padding": row.padding,
                    "documents": [
                        {**vars(document), "pieces": [vars(piece) for piece in document.pieces]}
                        for document in row.documents
                    ],
                }
                for row in self.rows
            ],
        }


def doctor(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    page: str | os.PathLike[str] | None = None,
    rows: int = 3,
    trial: bool = True,
    reporter: Reporter = SILENT,
    **settings: Any,
) -> Examination:
    """Look at a run before it begins.

    Args:
        model: a config.yaml, or a folder, a hub id or a run folder as `tune` takes them.
        data: the rows; needed unless the configuration names them.
        page: where to write a page to look at (.html).
        rows: rows of the first step to decode.
        trial: whether two real steps are taken (and undone) to see what they need and who moves.
        reporter: told what happens.
        **settings: any setting of `tune`; they beat the configuration's.

    Raises:
        UsageError: the request itself is wrong, as `tune` would say it.
    """
    file = Path(model) if str(model).endswith((".yaml", ".yml")) else None
    given = {"data": data, **settings} if file else {"model": model, "data": data, **settings}
    return examine(load_config(file, given), page=page, rows=rows, trial=trial, reporter=reporter)


def examine(
    config: TuneConfig,
    *,
    page: str | os.PathLike[str] | None = None,
    rows: int = 3,
    trial: bool = True,
    reporter: Reporter = SILENT,
) -> Examination:
    """Look at the run that `config` describes; see `doctor`. `rank: auto` is looked at with the largest rank raced."""
    auto = isinstance(config.method, LowRank) and config.method.rank == "auto"
    if auto:
        config = config.replace(rank=LARGEST_RANK)
    try:
        session = open_session(config)
    except (DataError, ModelError, TrainingError) as error:
        findings, shown = [Finding("refuse", "opening", str(error), "mend what the message names")], []
    else:
        reporter.note("opened and rendered; looking at the batches")
        seen = look(session, most_tokens=MOST_TOKENS, rows=rows)
        findings = _findings(session, seen, reporter, trial=trial)
        shown = [_shown(session, row) for row in seen.shown]
    if auto:
        told = f"auto: looked at with {LARGEST_RANK}, the most that is ever raced, which needs the most memory"
        findings.append(Finding("fine", "rank", told, ""))
    examination = Examination(by_weight(findings), shown, config.model, data_name(config.data), config.method.name)
    if page is not None:
        write_whole(page, [render_examination(examination.to_dict())])
    return examination


def _findings(session: Session, seen: Seen, reporter: Reporter, *, trial: bool) -> list[Finding]:
    packing = check_packing(session, seen)
    findings = [*check_collated(session, seen), *check_template(session, rows=50), *packing]
    if trial:
        reporter.note("taking two steps, which are undone again")
        apart = all(finding.level != "refuse" for finding in packing)
        findings += check_learning(session, seen, steps=True, packed_apart=apart)
    findings += [check_coverage(session), *check_rows(session), *check_overlap(session, test_tokens=True)]
    return [*findings, check_disk(session, Path(session.config.output or "runs"))]


def check_start(session: Session, run_dir: Path, *, reporter: Reporter = SILENT) -> list[dict[str, Any]]:
    """The checks that every run begins with, in a second or so: what costs more is left to `doctor`.

    Warnings are noted, and the run's report gets all findings. Nothing of the session is changed. A resumed run was
    tried when it began: only its data and its disk are looked at again.

    Raises:
        DataError, TrainingError: something is refused; every such finding is named.
    """
    seen = look(session, most_tokens=QUICK_TOKENS, rows=0)
    packing: list[Finding] = []
    findings = [*check_collated(session, seen), *check_template(session, rows=8)]
    if not session.config.resume:
        packing = check_packing(session, seen)
        findings += packing
        if _small(session, seen):
            apart = all(finding.level != "refuse" for finding in packing)
            findings += check_learning(session, seen, steps=True, packed_apart=apart)
    findings += [check_coverage(session), *check_rows(session), *check_overlap(session, test_tokens=False)]
    findings = by_weight([*findings, check_disk(session, run_dir)])
    # What the first steps themselves raise, the loop raises too, and keeps the state before it.
    findings = [replace(one, level="warn") if one.name == FIRST_STEPS else one for one in findings]
    refused = [finding for finding in findings if finding.level == "refuse"]
    if refused:
        raise _refusal(refused)
    for finding in findings:
        if finding.level == "warn" and finding.name not in TOLD:
            reporter.note(f"warning, {finding.name}: {finding.message}; {finding.remedy}")
    return [finding.to_dict() for finding in findings]


def _small(session: Session, seen: Seen) -> bool:
    """Whether a few steps cost about a second: six operations a weight and token."""
    tokens = (seen.tokens + seen.padding) / max(1, seen.steps)
    return 6 * session.trained.total_parameters * tokens <= QUICK_FLOPS


def _refusal(refused: Sequence[Finding]) -> DataError | TrainingError:
    """One error that names all that is refused; about the data if it is about nothing else."""
    lines = [f"{finding.name}: {finding.message}\n    {finding.remedy}" for finding in refused]
    kind = DataError if all(finding.name in _OF_DATA for finding in refused) else TrainingError
    return kind("the run was not begun:\n  " + "\n  ".join(lines))


_OF_DATA: Final = frozenset({"loss mask", "stop tokens", "BOS", "template"})


# --- rows to look at --------------------------------------------------------------------------------------------------


def _shown(session: Session, row: SeenRow) -> ShownRow:
    documents = []
    for document in row.documents:
        record = session.splits.train[document.sample.index]
        documents.append(
            ShownDocument(
                Path(record.source).name,
                record.row,
                len(document.ids),
                document.learned,
                pieces(session.tokenizer, document.ids, [label >= 0 for label in document.labels]),
            )
        )
    return ShownRow(documents, row.padding)


def pieces(tokenizer: Any, ids: Sequence[int], learned: Sequence[bool]) -> list[Piece]:
    """Cut a row's text where the mask changes; the pieces together are the text of all ids.

    Each piece is what its tokens add to the text before them, so that spaces and characters of several tokens stay
    whole.
    """
    result: list[Piece] = []
    before = ""
    for place in range(1, len(ids) + 1):
        if place < len(ids) and learned[place] == learned[place - 1]:
            continue
        text = tokenizer.decode(list(ids[:place]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        same = next((at for at, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), len(before))
        result.append(Piece(text[same:], learned[place - 1]))
        before = text
    return result
