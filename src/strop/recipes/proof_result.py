"""What the proof of an export found (`export_proof`), as values and in sentences."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from strop.evaluation.speed import Speed
from strop.recipes.proof_tokens import TokenCheck


@dataclass(frozen=True)
class Agreement:
    """How near the file is to a reference: nats per token, the most of a token, the share of equal first choices."""

    kl: float
    kl_max: float
    top1: float
    positions: int
    gate: float | None


@dataclass(frozen=True)
class Answer:
    """What both wrote to a prompt, greedily, and how many of the first tokens are the same."""

    prompt: str
    trained: str
    file: str
    same: int
    tokens: int


@dataclass(frozen=True)
class ExportProof:
    """What was found; `passed` says whether the file is the model.

    Attributes:
        file: the GGUF file.
        source: the model it was made from.
        runtime: which llama.cpp ran it.
        types: types of the file's matrices, the most used first.
        tokens: texts and conversations compared, and what differs.
        prompts: prompts asked; `asked` says where they came from.
        codes: llama.cpp against what the codes mean; None where that was left out.
        trained: llama.cpp against the trained model.
        effect: share of what tuning changed; None without a base, or where tuning changed nothing.
        effect_gate: the least that is accepted.
        answers: written side by side.
        speed: tokens per second there.
        threads: that it ran on.
        memory_bytes: most memory that opening and running took.
        seconds: that the proof took.
        notes: what was left out, and what else a user should know.
        problems: what lies past a gate, each with its figure.
    """

    file: str
    source: str
    runtime: str
    types: tuple[str, ...]
    tokens: TokenCheck
    prompts: int
    asked: str
    codes: Agreement | None
    trained: Agreement
    effect: float | None
    effect_gate: float
    answers: tuple[Answer, ...]
    speed: Speed
    threads: int
    memory_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether nothing lies past a gate."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"passed": self.passed}

    def lines(self) -> list[str]:
        """What was found, in sentences; the first says whether it passed."""
        told = [
            f"{'proved' if self.passed else 'NOT proved'} in {self.runtime}: {self.prompts} prompts ({self.asked}), "
            f"{self.trained.positions} tokens, {self.seconds:.0f} s"
        ]
        if not self.tokens.problems:
            through = f" and {self.tokens.conversations} conversations" if self.tokens.conversations else ""
            told.append(f"the same token ids for {self.tokens.texts} texts{through}")
        told += [f"{what}: {_words(found)}" for what, found in self._gaps()]
        if self.effect is not None:
            told.append(f"{self.effect:.4f} of what tuning changed is in the file (at least {self.effect_gate:g})")
        same = sum(answer.same == answer.tokens for answer in self.answers)
        if self.answers:
            told.append(f"greedy answers: {same} of {len(self.answers)} the same, token by token")
        told += [
            f"  {answer.prompt!r}: trained {answer.trained!r}, file {answer.file!r}"
            for answer in self.answers
            if answer.same < answer.tokens
        ]
        told.append(
            f"there: {self.speed.prefill.median:,.0f} tokens/s read, {self.speed.decode.median:,.0f} written on "
            f"{self.threads} thread{'' if self.threads == 1 else 's'}, {self.memory_bytes / 2**20:,.1f} MiB of memory"
        )
        told += [f"note: {note}" for note in self.notes]
        return told + [f"past the gate: {problem}" for problem in self.problems]

    def _gaps(self) -> list[tuple[str, Agreement]]:
        gaps = [("llama.cpp against the trained model", self.trained)]
        return gaps if self.codes is None else [("llama.cpp against the file's own codes", self.codes), *gaps]


def _words(found: Agreement) -> str:
    allowed = "no gate for this type" if found.gate is None else f"at most {found.gate:g}"
    return (
        f"KL {found.kl:.3g} nats per token ({allowed}), {found.kl_max:.3g} at the worst token; the same first choice "
        f"at {100 * found.top1:.2f}% of the tokens"
    )
