"""The proof of an export: the file, opened in llama.cpp itself, is the model that was trained.

    tokens     the same ids for a corpus of texts, through the chat template, and the same tokens that end an answer
    codes      llama.cpp against what the file's own codes mean, decoded by our reader and computed by transformers
               in float32: does the runtime compute this file?
    trained    llama.cpp against the trained model in float32: what the file lost, rounding included
    effect     how much of what tuning changed is in the file (an adapter, or a base that is named or that the run
               records): a divergence passes a file that lost its adapter, this does not
    answers    greedy, side by side; speed and memory there

KL is in nats per token, KL(trained || file), the mean over all tokens of all prompts, with keys and values in float32
on both sides. What may differ is llama.cpp's own arithmetic: with weights in 16 bits it rounds activations to 16 bits
too, with quantized weights to blocks of 8 bits. The gates allow that and little more; below 8 bits the weights' own
rounding is larger than any gate that fits all models, so it is told, and `max_kl` sets a gate.

Bounded: prompts are asked until their part of the time is used, two at the least; a part that memory or disk has no
room for is left out and named.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from strop.config import load_config
from strop.data.samples import prepare
from strop.errors import GateError, ModelError, StropError
from strop.evaluation.engines import FolderEngine, GgufEngine
from strop.evaluation.speed import Speed
from strop.files.gguf.reader import GgufFile
from strop.files.peft_adapter import read_adapter_config
from strop.layers.surgery import detach_lora
from strop.memory import PeakMemory
from strop.models import load
from strop.models.sources import find_folder, is_adapter, read_config
from strop.progress import SILENT, Reporter
from strop.recipes.export_logits import Effect, Gap, decoded_bytes, free_disk, free_memory, set_aside, write_codes
from strop.recipes.export_tokens import TokenCheck, check_tokens
from strop.recipes.probing import PROMPTS, asked_ids, computing_in_fp32, rows_of_run
from strop.recipes.rows import Rows, held_out_records
from strop.runtime.library import runtime_version
from strop.runtime.llama_cpp import GgufModel
from strop.scratch import Scratch, Stored

KL_GATES: Final[Mapping[str, float]] = {"f32": 1e-9, "f16": 5e-6, "bf16": 2e-4, "q8_0": 1e-3}
"""Most nats per token, by the coarsest type of the file's matrices."""

CODES_GATE: Final = 2e-3
"""The same for files of fewer bits against their own codes: llama.cpp's rounding of activations to 8 bits alone."""

EFFECT_GATES: Final = (0.999, 0.95)
"""Least share of what tuning changed: in files of 16 bits and more, and in quantized ones."""

MAX_PROMPTS: Final = 12
MAX_TOKENS: Final = 128
ANSWERS: Final = 3
ANSWER_TOKENS: Final = 24
SECONDS: Final = 100.0
MAX_LOGITS: Final = 1 << 26
"""Logits of each model that are set aside, 256 MiB."""


@dataclass(frozen=True)
class Agreement:
    """How near the file is to a reference: nats per token, the most of a token, and the share of equal first choices."""

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


def prove_export(
    file: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    data: Rows | None = None,
    max_kl: float | None = None,
    seconds: float = SECONDS,
    reporter: Reporter = SILENT,
) -> ExportProof:
    """Prove that a GGUF file is the model that it was made from.

    Args:
        file: The file.
        source: The model that was trained: a folder, a run, an adapter (with its base), or a hub id.
        base: What it was tuned from, where that is not the adapter's base; by default what the run records.
        data: Rows to ask with, which trained nothing; by default those the run was validated on, or built-in prompts.
        max_kl: Most nats per token against the trained model, in the place of the type's own gate.
        seconds: What the proof may take, about.
        reporter: Told what happens.

    Raises:
        GateError: Something lies past its gate; all of it is listed with figures.
        As `measure_export`.
    """
    proof = measure_export(file, source, base=base, data=data, max_kl=max_kl, seconds=seconds, reporter=reporter)
    if not proof.passed:
        raise GateError(
            f"{proof.file} is not the model in {proof.source}, or llama.cpp does not compute it:\n  "
            + "\n  ".join(proof.problems)
        )
    return proof


def measure_export(
    file: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    data: Rows | None = None,
    max_kl: float | None = None,
    seconds: float = SECONDS,
    reporter: Reporter = SILENT,
) -> ExportProof:
    """The same without judging: what `prove_export` finds, problems listed in it.

    Raises:
        MissingInputError: llama-cpp-python, the file or a model is not there.
        FileFormatError: The file is broken.
        ModelError: A model cannot be opened, or gives logits that are no numbers.
    """
    run = _Proof(file, source, base=base, data=data, seconds=seconds)
    reporter.start("prove the file in llama.cpp", 5, "steps")
    try:
        with Scratch() as scratch, run.model:
            for done, step in enumerate((run.run_file, run.ask_trained, run.ask_base, run.ask_codes, run.ask_file), 1):
                step(scratch)
                reporter.advance(done)
    finally:
        reporter.finish()
    return run.proof(max_kl)


class _Proof:
    """A proof under way; the steps are called in their order, one model of transformers in memory at a time."""

    def __init__(
        self,
        file: str | os.PathLike[str],
        source: str | os.PathLike[str],
        *,
        base: str | os.PathLike[str] | None,
        data: Rows | None,
        seconds: float,
    ) -> None:
        self._begin, self._seconds = time.monotonic(), seconds
        self._file = GgufFile.open(file)
        self._folder = find_folder(source)
        self._source = str(source)
        self._base = _recorded_base(self._folder) if base is None else str(base)
        self._data = data
        self._notes: list[str] = []
        with PeakMemory() as memory:
            self.model = GgufModel.open(file)
            self._speed = GgufEngine(self.model).speed()
        self._memory_bytes = memory.peak_bytes
        self._trained: list[Stored] = []
        self._untuned: list[Stored] = []
        self._decoded: list[Stored] = []
        self._answers: list[Answer] = []
        self._gaps = {"trained": Gap(), "codes": Gap()}
        self._effect = Effect()

    def run_file(self, _: Scratch) -> None:
        """Warm: the file is open and was timed; what is left is to find out what to ask."""
        opened = load(self._folder)
        self._opened, self._tokenizer = opened, opened.require_tokenizer()
        self._prompts, self._asked, texts = self._what_to_ask()
        self._check = check_tokens(self.model, self._tokenizer, texts)

    def _what_to_ask(self) -> tuple[list[list[int]], str, list[str]]:
        most = min(MAX_TOKENS, self.model.context - ANSWER_TOKENS)
        records = rows_of_run(self._folder, MAX_PROMPTS) if self._data is None else held_out_records(self._data)
        if records:
            prepared = prepare(records[:MAX_PROMPTS], self._tokenizer, max_length=most)
            texts = [
                "\n".join(turn.content for turn in one.messages or ()) or str(one.text) for one in records[:MAX_PROMPTS]
            ]
            asked = "the run's own rows" if self._data is None else "rows of the data"
            return [list(sample.input_ids) for sample in prepared.samples[:MAX_PROMPTS]], asked, texts
        return [asked_ids(text, self._tokenizer)[:most] for text in PROMPTS], "built-in prompts", list(PROMPTS)

    def ask_trained(self, scratch: Scratch) -> None:
        """Let the trained model answer, and set its logits aside; an adapter's base follows at once."""
        opened = self._opened
        engine = FolderEngine(opened)
        with computing_in_fp32(opened.model):
            for number, text in enumerate(PROMPTS[:ANSWERS]):
                if self._used() > 0.25 and number:
                    break
                self._write_answers(engine, text)
        for prompt in self._prompts:
            if len(self._trained) >= 2 and self._used() > 0.4:
                self._notes.append(f"{len(self._trained)} of {len(self._prompts)} prompts fitted the time")
                break
            self._trained += set_aside(opened.model, [prompt], scratch)
            if len(self._trained) * MAX_TOKENS * self.model.vocabulary > MAX_LOGITS and len(self._trained) >= 2:
                break
        self._prompts = self._prompts[: len(self._trained)]
        if opened.adapter is not None:
            detach_lora(opened.model)
            self._untuned = set_aside(opened.model, self._prompts, scratch)
        self._opened = None

    def _write_answers(self, engine: FolderEngine, text: str) -> None:
        prompt = asked_ids(text, self._tokenizer)
        stops = GgufEngine(self.model).stop_ids() if self._tokenizer.chat_template else self.model.stop_ids
        options: dict[str, Any] = {"stop_ids": stops, "max_new_tokens": ANSWER_TOKENS}
        ours = []
        for token in engine.stream(prompt, **options):
            ours.append(token)
            if self._used() > 0.3:
                break
        theirs = list(self.model.stream(prompt, max_tokens=len(ours), stop_ids=stops))
        same = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
        decode = self._tokenizer.decode
        self._answers.append(
            Answer(
                text,
                str(decode(ours, skip_special_tokens=True)),
                str(decode(theirs, skip_special_tokens=True)),
                min(same, len(theirs)),
                len(ours),
            )
        )
        if self._asked == "built-in prompts":  # what the model itself writes is text of its own kind
            place = PROMPTS.index(text)
            self._prompts[place] = (prompt + ours)[: self.model.context]

    def ask_base(self, scratch: Scratch) -> None:
        """Set aside what the base answers, where it is another model."""
        if self._untuned or self._base is None:
            return
        try:
            base = load(self._base, tokenizer=False)
        except StropError as error:
            self._notes.append(f"what tuning changed is not measured: its base cannot be opened ({error})")
            return
        if base.model.get_input_embeddings().weight.shape[0] != self._width(scratch):
            self._notes.append("what tuning changed is not measured: the base has another vocabulary")
            return
        self._untuned = set_aside(base.model, self._prompts, scratch)

    def ask_codes(self, scratch: Scratch) -> None:
        """Set aside what transformers computes from the file's codes, decoded."""
        needed = decoded_bytes(self._file)
        with tempfile.TemporaryDirectory(prefix="strop-codes-") as name:
            if needed > min(free_memory(), free_disk(name)) * 0.8 or self._used() > 0.6:
                self._notes.append(
                    f"llama.cpp was not compared with the file's own codes: that takes {needed / 2**30:,.1f} GiB of memory "
                    "and of disk, or more time than was allowed"
                )
                return
            write_codes(self._file, _config(self._folder), Path(name))
            decoded = load(name, dtype="float32", tokenizer=False)
            self._decoded = set_aside(decoded.model, self._prompts, scratch)

    def ask_file(self, scratch: Scratch) -> None:
        """Compare llama.cpp's logits with all that was set aside."""
        for place, prompt in enumerate(self._prompts):
            trained = scratch.get(self._trained[place])
            if trained.shape[1] != self.model.vocabulary:
                raise ModelError(
                    f"{self._file.path} predicts over {self.model.vocabulary} tokens, the trained model over "
                    f"{trained.shape[1]}"
                )
            base = scratch.get(self._untuned[place]) if self._untuned else None
            decoded = scratch.get(self._decoded[place]) if self._decoded else None
            start = 0
            for piece in self.model.logit_pieces(prompt):
                found = torch.from_numpy(piece)
                part = slice(start, start + len(found))
                self._compare(trained[part], base, decoded, found, part)
                start += len(found)

    def _compare(
        self, trained: Tensor, base: Tensor | None, decoded: Tensor | None, found: Tensor, part: slice
    ) -> None:
        self._gaps["trained"].add(trained, found)
        if decoded is not None:
            self._gaps["codes"].add(decoded[part], found)
        if base is not None:
            self._effect.add(base[part], trained, found)

    def proof(self, max_kl: float | None) -> ExportProof:
        """What was found, judged."""
        types = _types(self._file)
        coarse = any(kind not in KL_GATES for kind in types)
        own_gate = None if coarse else max((KL_GATES[kind] for kind in types), default=KL_GATES["f32"])
        trained = _agreement(self._gaps["trained"], own_gate if max_kl is None else max_kl)
        codes = _agreement(self._gaps["codes"], CODES_GATE if own_gate is None else own_gate) if self._decoded else None
        quantized = any(kind not in ("f32", "f16", "bf16") for kind in types)
        effect, effect_gate = self._effect.share, EFFECT_GATES[quantized]
        if self._untuned and effect is None:
            self._notes.append("tuning changed no logit, so nothing can be said of what is left of it")
        problems = list(self._check.problems)
        for what, found in (("its own codes in transformers", codes), ("the trained model", trained)):
            if found is not None and found.gate is not None and not found.kl <= found.gate:
                problems.append(f"KL from {what}: {found.kl:.3g} nats per token, at most {found.gate:g} is allowed")
        if effect is not None and not effect >= effect_gate:
            problems.append(
                f"{effect:.4f} of what tuning changed is in the file, at least {effect_gate:g} is needed; was the "
                "adapter merged, and into the base that it was trained on?"
            )
        return ExportProof(
            file=str(self._file.path),
            source=self._source,
            runtime=runtime_version(),
            types=types,
            tokens=self._check,
            prompts=len(self._prompts),
            asked=self._asked,
            codes=codes,
            trained=trained,
            effect=effect,
            effect_gate=effect_gate,
            answers=tuple(self._answers),
            speed=self._speed,
            threads=self.model.threads,
            memory_bytes=self._memory_bytes,
            seconds=time.monotonic() - self._begin,
            notes=(*self._notes, *self._check.warnings),
            problems=tuple(problems),
        )

    def _used(self) -> float:
        return (time.monotonic() - self._begin) / self._seconds

    def _width(self, scratch: Scratch) -> int:
        return scratch.get(self._trained[0]).shape[1]


def _recorded_base(folder: Path) -> str | None:
    """The model that a run was tuned from, where its settings are still there and it is another one."""
    for home in (folder, folder.parent):
        if (home / "config.yaml").is_file():
            try:
                model = load_config(home / "config.yaml").model
                return None if find_folder(model) == folder else model
            except StropError:
                return None
    return None


def _config(folder: Path) -> Any:
    """The configuration of a folder's model, or of an adapter's base."""
    while is_adapter(folder):
        folder = find_folder(read_adapter_config(folder).base)
    return read_config(folder)[0]


def _types(file: GgufFile) -> tuple[str, ...]:
    """Types of the matrices, the one with most bytes first."""
    held: dict[str, int] = {}
    for info in file.tensors.values():
        if len(info.shape) > 1:
            held[info.type] = held.get(info.type, 0) + info.nbytes
    return tuple(sorted(held, key=lambda kind: -held[kind]))


def _agreement(gap: Gap, gate: float | None) -> Agreement:
    return Agreement(gap.kl, gap.kl_max, gap.top1, gap.positions, gate)


def _words(found: Agreement) -> str:
    allowed = "no gate for this type" if found.gate is None else f"at most {found.gate:g}"
    return (
        f"KL {found.kl:.3g} nats per token ({allowed}), {found.kl_max:.3g} at the most; the same first choice at "
        f"{100 * found.top1:.2f}% of the tokens"
    )


__all__ = ["Agreement", "Answer", "ExportProof", "measure_export", "prove_export"]
