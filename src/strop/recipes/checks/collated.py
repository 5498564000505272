"""The batches that training will collate, read back: masks, stop tokens, padding, BOS, and rows to look at.

`look` goes through an epoch of the session's own stream and sets it back. Each document of each row is held against
the sample it came from and against what its answers must teach; what is counted here is what the model would learn,
whatever the file says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from strop.data.batches import Batch
from strop.data.templates import IGNORED, Sample, stop_ids
from strop.recipes.checks.finding import Finding, count, share
from strop.recipes.session import Session

LOW_SHARE: Final = 0.01
"""Supervised tokens over all tokens, below which most of the work teaches nothing."""

MUCH_PADDING: Final = 0.8
"""Share of positions that hold tokens, below which packing is worth a word."""


@dataclass(frozen=True)
class Document:
    """One document in a row of a batch, as the model gets it.

    Attributes:
        sample: the sample it was made of.
        ids: token ids.
        labels: ids where they are learned, else -100.
    """

    sample: Sample
    ids: list[int]
    labels: list[int]

    @property
    def learned(self) -> int:
        """Tokens that carry loss."""
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True)
class SeenRow:
    """One row of a batch: its documents, and how much padding stands behind them."""

    documents: list[Document]
    padding: int


@dataclass
class Seen:
    """What an epoch's batches hold, counted.

    Attributes:
        complete: whether the whole epoch was looked at.
        steps: optimizer steps looked at.
        largest_step: the step with the largest micro-batch, padding included.
        empty_steps: steps in which nothing is learned.
        rows, documents, tokens, padding, learned: in those steps.
        without_loss: documents in which nothing is learned.
        outside: learned tokens that belong to no answer.
        misplaced: labels that are not the token at their place, stand in the padding, or at a document's first token.
        hidden: real tokens that the attention mask hides, or padding that it shows.
        answers: ends of answers that training could see.
        without_stop: answers whose stop token is not learned.
        strange_stop: token id -> answers that end with it, where `chat` and `predict` would not stop.
        pad_masked: answers whose stop token is not learned and is the padding token.
        chats_without_bos: conversations that begin with another token than BOS.
        bos: documents by how many BOS tokens they begin with.
        packed_row: a batch with a row of two documents or more; None where there is none.
        shown: rows to look at.
    """

    complete: bool = True
    steps: int = 0
    largest_step: int = 0
    empty_steps: int = 0
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    padding: int = 0
    learned: int = 0
    without_loss: int = 0
    outside: int = 0
    misplaced: int = 0
    hidden: int = 0
    answers: int = 0
    without_stop: int = 0
    pad_masked: int = 0
    chats_without_bos: int = 0
    strange_stop: Counter[int] = field(default_factory=Counter)
    bos: Counter[int] = field(default_factory=Counter)
    packed_row: Batch | None = None
    shown: list[SeenRow] = field(default_factory=list)


def look(session: Session, *, most_tokens: int, rows: int = 3) -> Seen:
    """Go through the first epoch's batches, or its first `most_tokens` tokens; keep `rows` rows of the first step."""
    stream, seen, reader = session.stream, Seen(), _Reader(session)
    place = stream.state_dict()
    largest = 0
    try:
        for step in range(stream.steps_per_epoch):
            if seen.tokens >= most_tokens:
                seen.complete = False
                break
            learned, first = seen.learned, []
            for batch in stream.next_step():
                if batch.input_ids.numel() > largest:
                    largest, seen.largest_step = batch.input_ids.numel(), step
                if seen.packed_row is None and any(len(row) > 1 for row in batch.rows):
                    seen.packed_row = batch
                for row in reader.rows(batch, seen):
                    if step == 0:
                        first.append(row)
            if step == 0:
                seen.shown = [first[index] for index in _spread(len(first), rows)]
            seen.steps += 1
            seen.empty_steps += seen.learned == learned
    finally:
        stream.load_state_dict(place)
    return seen


def _spread(length: int, most: int) -> list[int]:
    """Up to `most` places spread evenly over a list, its first and last among them."""
    if most <= 1 or length <= most:
        return list(range(min(length, max(most, 0))))
    return [place * (length - 1) // (most - 1) for place in range(most)]


class _Reader:
    """Reads rows back into documents and counts what is wrong with them."""

    def __init__(self, session: Session) -> None:
        tokenizer = session.tokenizer
        self.samples, self.max_length = session.stream.samples, session.stream.max_length
        self.texts = {index for index, record in enumerate(session.splits.train) if record.messages is None}
        self.stops = set(stop_ids(tokenizer))
        self.bos, self.pad = tokenizer.bos_token_id, tokenizer.pad_token_id
        self.answers_only = session.config.samples.train_on != "all"

    def rows(self, batch: Batch, seen: Seen) -> Iterator[SeenRow]:
        """The rows of a batch, counted into `seen`."""
        width = batch.input_ids.shape[1]
        mask = batch.attention_mask if batch.documents is None else None  # a packed one is measured by check_packing
        shown = mask.tolist() if isinstance(mask, Tensor) else None
        for place, (ids, labels) in enumerate(zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True)):
            documents, begin = [], 0
            for index in batch.rows[place]:
                sample = self.samples[index]
                span = slice(begin, begin + len(sample))
                documents.append(Document(sample, ids[span], labels[span]))
                self._count(documents[-1], seen)
                begin += len(sample)
            seen.rows += 1
            seen.padding += width - begin
            seen.misplaced += width - begin - labels[begin:].count(IGNORED)
            if shown is not None:
                seen.hidden += shown[place][:begin].count(0) + (width - begin) - shown[place][begin:].count(0)
            yield SeenRow(documents, width - begin)

    def _count(self, document: Document, seen: Seen) -> None:
        ids, labels, sample = document.ids, document.labels, document.sample
        seen.documents += 1
        seen.tokens += len(ids)
        seen.learned += document.learned
        seen.without_loss += document.learned == 0
        seen.misplaced += labels[0] != IGNORED
        if self.bos is not None:
            seen.bos[next((place for place, token in enumerate(ids) if token != self.bos), len(ids))] += 1
        if ids != sample.input_ids or any(
            label not in (token, IGNORED) for token, label in zip(ids, labels, strict=True)
        ):
            seen.misplaced += sum(label not in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
            seen.misplaced += sum(got != made for got, made in zip(ids, sample.input_ids, strict=True))
        if sample.index in self.texts:
            return
        seen.chats_without_bos += self.bos is not None and ids[0] != self.bos
        if self.answers_only:
            inside = sum(len(labels[start:end]) - labels[start:end].count(IGNORED) for start, end in sample.answers)
            seen.outside += document.learned - inside
        self._count_stops(document, seen)

    def _count_stops(self, document: Document, seen: Seen) -> None:
        """Is the last token of each answer one to stop at, and learned?

        A template's marks may cut an answer into several ranges; one that goes on without a stop token between is not
        at its end. An answer that `max_length` cut has no end, which `truncation` counts.
        """
        ids, labels, ranges = document.ids, document.labels, document.sample.answers
        for place, (start, end) in enumerate(ranges):
            last = ids[end - 1]
            if last not in self.stops:
                if end == len(ids) == self.max_length:
                    continue
                following = ranges[place + 1][0] if place + 1 < len(ranges) else None
                if following is not None and self.stops.isdisjoint(ids[end:following]):
                    continue
            if end <= start:
                continue
            seen.answers += 1
            if labels[end - 1] == IGNORED:
                seen.without_stop += 1
                seen.pad_masked += last == self.pad
            elif last not in self.stops:
                seen.strange_stop[last] += 1


def check_collated(session: Session, seen: Seen) -> list[Finding]:
    """What the batches would teach: the mask, stop tokens, BOS, padding."""
    return [_mask(session, seen), *_stops(session, seen), *_bos(session, seen), _padding(session, seen)]


def _mask(session: Session, seen: Seen) -> Finding:
    name = "loss mask"
    where = "" if seen.complete else f" (looked at the first {count(seen.steps, 'step')} of the epoch)"
    figures = {
        "tokens": seen.tokens,
        "supervised_tokens": seen.learned,
        "supervised_share": seen.learned / seen.tokens if seen.tokens else 0.0,
        "rows_without_loss": seen.without_loss,
        "steps_without_loss": seen.empty_steps,
        "tokens_outside_answers": seen.outside,
        "misplaced_labels": seen.misplaced,
        "complete": seen.complete,
    }

    def finding(level: Any, message: str, remedy: str = "") -> Finding:
        return Finding(level, name, message, remedy, figures)

    if seen.learned == 0:
        return finding(
            "refuse",
            f"none of {count(seen.tokens, 'token')} is learned{where}: the loss would be 0 / 0",
            "check that the rows have assistant turns and that the chat template marks them, or set train_on: all",
        )
    if seen.misplaced:
        return finding(
            "refuse",
            f"{count(seen.misplaced, 'label')} do not belong to the token at their place{where}: a label is its own "
            "token's id, unshifted, and -100 in padding and at a document's first token",
            "the batches are collated wrongly; please report it with this command",
        )
    if seen.outside:
        return finding(
            "refuse",
            f"{seen.outside:,} of {seen.learned:,} learned tokens belong to no answer{where}: the model would learn to "
            "write the questions",
            "set train_on: all if that is meant; otherwise report it with this command",
        )
    if seen.empty_steps:
        return finding(
            "refuse",
            f"nothing is learned in {seen.empty_steps:,} of {count(seen.steps, 'step')}{where}: their loss is 0 / 0",
            "raise batch_size or accumulation, or leave out the rows without an answer",
        )
    said = f"{seen.learned:,} of {count(seen.tokens, 'token')} are learned ({share(seen.learned, seen.tokens)}){where}"
    if seen.without_loss:
        return finding(
            "warn",
            f"{said}; in {seen.without_loss:,} of {count(seen.documents, 'document')} nothing is",
            "leave those rows out: they cost time and teach nothing",
        )
    if seen.learned < LOW_SHARE * seen.tokens:
        return finding(
            "warn", said, "shorten the prompts, or put more turns into a row: most of the time goes into reading"
        )
    return finding("fine", said)


def _stops(session: Session, seen: Seen) -> list[Finding]:
    name = "stop tokens"
    if not seen.answers:
        return []
    missing, strange = seen.without_stop, sum(seen.strange_stop.values())
    figures = {
        "answers": seen.answers,
        "without_stop": missing,
        "stop_is_pad": session.tokenizer.pad_token_id in stop_ids(session.tokenizer),
        "ends_elsewhere": strange,
    }
    shown = _tokens(session, stop_ids(session.tokenizer))
    if missing:
        by_id = seen.pad_masked == missing
        why = "; its stop token is the padding token, and padding was masked by id" if by_id else ""
        return [
            Finding(
                "refuse" if 2 * missing > seen.answers else "warn",
                name,
                f"{missing:,} of {count(seen.answers, 'answer')} do not teach the model to stop: the token that ends "
                f"them carries no loss{why}",
                "mask padding by its place, never by its id"
                if by_id
                else "let the template's generation mark hold the token that ends the answer, or use another template",
                figures,
            )
        ]
    if strange:
        return [
            Finding(
                "refuse" if 2 * strange > seen.answers else "warn",
                name,
                f"{strange:,} of {count(seen.answers, 'answer')} end with {_tokens(session, list(seen.strange_stop))}, "
                f"but chat and predict stop at {shown}",
                "use a chat template that ends every answer with the same token (--chat-template chatml or plain)",
                figures,
            )
        ]
    pad = "; it is the padding token too, which is masked by place" if figures["stop_is_pad"] else ""
    return [
        Finding(
            "fine",
            name,
            f"all {count(seen.answers, 'whole answer')} teach the model to stop ({shown}){pad}",
            "",
            figures,
        )
    ]


def _tokens(session: Session, ids: Sequence[int]) -> str:
    return ", ".join(str(session.tokenizer.convert_ids_to_tokens(token)) for token in ids)


def _bos(session: Session, seen: Seen) -> list[Finding]:
    """Leading BOS tokens; nothing where the tokenizer has none, or where windows of long texts begin in the middle."""
    name, tokenizer = "BOS", session.tokenizer
    if tokenizer.bos_token_id is None or not seen.bos:
        return []
    token = tokenizer.bos_token
    doubled = sum(times for number, times in seen.bos.items() if number > 1)
    figures = {"documents_by_leading_bos": {str(number): times for number, times in sorted(seen.bos.items())}}
    if doubled:
        return [
            Finding(
                "refuse",
                name,
                f"{doubled:,} of {count(seen.documents, 'document')} begin with {token} twice or more: the template "
                "writes it and the tokenizer adds it",
                "take {{ bos_token }} out of the chat template, or add_bos_token out of the tokenizer",
                figures,
            )
        ]
    added = list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]
    if added and seen.chats_without_bos:
        return [
            Finding(
                "warn",
                name,
                f"{count(seen.chats_without_bos, 'conversation')} begin without {token}, which the tokenizer puts "
                "before every text: the base has never read one without it",
                "write {{ bos_token }} at the beginning of the chat template",
                figures,
            )
        ]
    said = f"every document begins with one {token}" if not seen.bos[0] else f"no document begins with two {token}"
    return [Finding("fine", name, said, "", figures)]


def _padding(session: Session, seen: Seen) -> Finding:
    places = seen.tokens + seen.padding
    figures = {"positions": places, "padding": seen.padding, "hidden": seen.hidden, "rows": seen.rows}
    if seen.hidden:
        return Finding(
            "refuse",
            "padding",
            f"the attention mask is wrong at {seen.hidden:,} of {places:,} positions: it hides tokens or shows padding",
            "mask padding by its place, never by its id",
            figures,
        )
    what = "packs" if session.stream.packing else "batches"
    said = f"{share(seen.tokens, places)} of the positions in the {what} hold tokens"
    if seen.tokens < MUCH_PADDING * places and not session.stream.packing:
        said += "; packing: true would fill the others"
    return Finding("fine", "padding", said, "", figures)
