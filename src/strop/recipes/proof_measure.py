"""The measuring of an export's proof (`export_proof`), step by step, one model of transformers in memory at a time."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from strop.config import load_config
from strop.data.records import Record
from strop.data.samples import prepare
from strop.errors import ModelError, StropError
from strop.evaluation.engines import FolderEngine, GgufEngine
from strop.files.gguf.reader import GgufFile
from strop.files.peft_adapter import read_adapter_config
from strop.layers.input_rounding import rounding_inputs
from strop.layers.quantized import QUANTIZED
from strop.layers.surgery import detach_lora
from strop.memory import PeakMemory, release_unused_memory, steady_allocation
from strop.models import OpenedModel, load
from strop.models.sources import find_folder, is_adapter, read_config
from strop.recipes.probing import PROMPTS, asked_ids, computing_in_fp32, rounded_method, rows_of_run
from strop.recipes.proof_logits import Effect, Gap, decoded_bytes, free_disk, free_memory, set_aside, write_codes
from strop.recipes.proof_result import Agreement, Answer, ExportProof
from strop.recipes.proof_tokens import check_tokens
from strop.recipes.provenance import merged_adapter
from strop.recipes.rows import Rows, held_out_records
from strop.runtime.library import runtime_version
from strop.runtime.llama_cpp import GgufModel
from strop.scratch import Scratch, Stored

KL_GATES: Final[Mapping[str, float]] = {"f32": 1e-9, "f16": 5e-6, "bf16": 2e-4, "q8_0": 1e-3}
"""Most nats per token, by the coarsest type of the file's matrices."""

MERGE_GATES: Final[Mapping[str, float]] = {"float32": 0.0, "float16": KL_GATES["f16"], "bfloat16": KL_GATES["bf16"]}
"""The least that is allowed against base and adapter apart, by the dtype that their sum is rounded to."""

CODES_GATE: Final = 2e-3
"""The same for files of fewer bits against their own codes: llama.cpp's rounding of activations to 8 bits alone."""

EFFECT_GATES: Final = (0.999, 0.95)
"""Least share of what tuning changed: in files of 16 bits and more, and in quantized ones."""

EFFECT_CEILINGS: Final = (1.005, 1.25)
"""The most: an adapter that was merged twice is there twice."""

OPENINGS: Final = (
    "Once upon a time, there was",
    "The weather today is",
    "She opened the door and",
    "In the beginning of the year",
    "The most important thing about",
    '"What is that?" asked',
    "He walked to the city because",
    "It was a long way home, and",
)
"""What models without a chat template go on from."""

MAX_PROMPTS: Final = 12
MAX_TOKENS: Final = 128
ANSWERS: Final = 3
"""Answers written side by side."""

ANSWER_TOKENS: Final = 64
MAX_LOGITS: Final = 1 << 26
"""Logits of each model that are set aside, 256 MiB."""

# Shares of the time after which: no answer is written any more, no prompt is added, the codes are left out.
_WRITTEN, _ASKED, _DECODED = 0.3, 0.45, 0.6


@dataclass
class Question:
    """Something to ask.

    Attributes:
        text: for people.
        prompt: its tokens.
        row: a row's tokens, its expected answer included; None where the trained model's own answer is taken.
    """

    text: str
    prompt: list[int]
    row: list[int] | None = None


class Measured:
    """A proof under way: `steps` are called in their order, then `proof` gives what was found.

    Args:
        file, source, base, data, seconds: as `measure_export` takes them.
    """

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
        self._run = merged_adapter(self._folder) or self._folder
        self._base = _recorded_base(self._folder) if base is None else str(base)
        self._data = data
        self._notes: list[str] = []
        self.model = GgufModel.open(file)
        self._opened: OpenedModel | None = None
        self._trained: list[Stored] = []
        self._untuned: list[Stored] = []
        self._decoded: list[Stored] = []
        self._answers: list[Answer] = []
        method = rounded_method(self._folder)
        self._inputs = None if method is None else method.activations
        self._merged_as = "float32"
        self._gaps = {"trained": Gap(), "codes": Gap()}
        self._effect = Effect()
        self.steps: tuple[Callable[[Scratch], None], ...] = (
            self._run_file,
            self._compare_tokens,
            self._ask_trained,
            self._ask_base,
            self._ask_codes,
            self._ask_file,
        )

    def _run_file(self, _: Scratch) -> None:
        """Time the file, and open it once more to see what memory that takes."""
        release_unused_memory()
        with steady_allocation(), PeakMemory() as memory, GgufModel.open(self._file.path) as model:
            self._speed = GgufEngine(model).speed()
        self._memory_bytes = memory.peak_bytes

    def _compare_tokens(self, _: Scratch) -> None:
        """Find out what to ask, and whether the file reads it alike."""
        self._opened = load(self._folder, to_merge=True)
        if self._opened.adapter is not None and self._opened.adapter.merge_only:
            self._notes.append("the adapter was trained to be merged and rounded; it is compared unrounded")
        self._tokenizer = self._opened.require_tokenizer()
        records = rows_of_run(self._run, MAX_PROMPTS) if self._data is None else held_out_records(self._data)
        if records:
            self._asked = "the run's own rows" if self._data is None else "rows of the data"
            self._questions = self._of_rows(records[:MAX_PROMPTS])
        else:
            texts = PROMPTS if self._tokenizer.chat_template else OPENINGS
            self._asked = "built-in prompts with the trained model's answers"
            self._questions = [Question(text, asked_ids(text, self._tokenizer)) for text in texts]
        self._check = check_tokens(self.model, self._tokenizer, [question.text for question in self._questions])

    def _of_rows(self, records: Sequence[Record]) -> list[Question]:
        most = min(MAX_TOKENS, self.model.context - ANSWER_TOKENS)
        found = []
        for sample in prepare(records, self._tokenizer, max_length=most).samples:
            record = records[sample.index]
            asked = [turn for turn in record.messages or () if turn.role != "assistant"]
            text = asked[-1].content if asked else str(record.text)
            end = sample.answers[-1][0] if record.messages and sample.answers else len(sample.input_ids) // 2
            found.append(Question(text, list(sample.input_ids[: max(1, end)]), list(sample.input_ids)))
        return found[:MAX_PROMPTS]

    def _ask_trained(self, scratch: Scratch) -> None:
        """Let the trained model answer, and set its logits aside; an adapter's base follows at once."""
        opened, self._opened = self._opened, None
        assert opened is not None
        engine = FolderEngine(opened)
        with computing_in_fp32(opened.model), self._as_trained(opened.model):
            for number, question in enumerate(self._questions):
                if (number and self._used() > _WRITTEN) or (number >= ANSWERS and question.row is not None):
                    break
                self._answer(engine, question, beside=number < ANSWERS)
        most = max(2, MAX_LOGITS // (MAX_TOKENS * self.model.vocabulary))
        self._prompts = [question.row or question.prompt for question in self._questions[:most]]
        for prompt in self._prompts:
            if len(self._trained) >= 2 and self._used() > _ASKED:
                break
            with self._as_trained(opened.model):
                self._trained += set_aside(opened.model, [prompt], scratch)
        if len(self._trained) < len(self._questions):
            self._notes.append(f"{len(self._trained)} of {len(self._questions)} prompts fitted the time and the disk")
        self._prompts = self._prompts[: len(self._trained)]
        if opened.adapter is not None:
            self._merged_as = str(opened.model.dtype).removeprefix("torch.")
            detach_lora(opened.model)
            self._untuned = set_aside(opened.model, self._prompts, scratch)

    @contextmanager
    def _as_trained(self, model: nn.Module) -> Iterator[None]:
        """The trained model computes as in training: inputs rounded, where training rounded them."""
        if self._inputs is None:
            yield
            return
        layers = [name for name, module in model.named_modules() if isinstance(module, QUANTIZED)]
        with rounding_inputs(model, layers, self._inputs):
            yield

    def _answer(self, engine: FolderEngine, question: Question, *, beside: bool) -> None:
        """Let the trained model write, the file beside it; without a row what was written is asked too."""
        stops = list(dict.fromkeys([*engine.stop_ids(), *self.model.stop_ids]))
        ours = []
        for token in engine.stream(question.prompt, stop_ids=stops, max_new_tokens=ANSWER_TOKENS):
            ours.append(token)
            if self._used() > _WRITTEN:
                break
        if question.row is None:
            question.row = [*question.prompt, *ours]
        if not beside:
            return
        theirs = list(self.model.stream(question.prompt, max_tokens=len(ours), stop_ids=stops))
        pairs = zip(ours, theirs, strict=False)
        same = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))
        wrote = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in (ours, theirs)]
        self._answers.append(Answer(question.text, str(wrote[0]), str(wrote[1]), same, len(ours)))

    def _ask_base(self, scratch: Scratch) -> None:
        """Set aside what the base answers, where it is another model."""
        if self._untuned or self._base is None:
            return
        try:
            base = load(self._base, tokenizer=False)
        except StropError as error:
            self._notes.append(f"what tuning changed is not measured: its base cannot be opened ({error})")
            return
        untuned = set_aside(base.model, self._prompts, scratch)
        if [one.shape for one in untuned] != [one.shape for one in self._trained]:
            self._notes.append("what tuning changed is not measured: the base has another vocabulary")
            return
        self._untuned = untuned

    def _ask_codes(self, scratch: Scratch) -> None:
        """Set aside what transformers computes from the file's codes, decoded."""
        needed = decoded_bytes(self._file)
        with tempfile.TemporaryDirectory(prefix="strop-codes-") as name:
            if needed > min(free_memory(), free_disk(name)) * 0.8 or self._used() > _DECODED:
                self._notes.append(
                    f"llama.cpp was not compared with the file's own codes: that takes {needed / 2**30:,.1f} GiB of "
                    "memory and of disk, or more time than was allowed"
                )
                return
            write_codes(self._file, _config(self._folder), Path(name))
            decoded = load(name, dtype="float32", tokenizer=False)
            self._decoded = set_aside(decoded.model, self._prompts, scratch)

    def _ask_file(self, scratch: Scratch) -> None:
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
        gate = own_gate if own_gate is None else max(own_gate, MERGE_GATES[self._merged_as])
        trained = _agreement(self._gaps["trained"], gate if max_kl is None else max_kl)
        codes = _agreement(self._gaps["codes"], CODES_GATE if own_gate is None else own_gate) if self._decoded else None
        quantized = any(kind not in ("f32", "f16", "bf16") for kind in types)
        effect, effect_gate, most = self._effect.share, EFFECT_GATES[quantized], EFFECT_CEILINGS[quantized]
        if self._untuned and effect is None:
            self._notes.append("tuning changed no logit, so nothing can be said of what is left of it")
        problems = list(self._check.problems)
        for what, found in (("its own codes in transformers", codes), ("the trained model", trained)):
            if found is not None and found.gate is not None and not found.kl <= found.gate:
                problems.append(f"KL from {what}: {found.kl:.3g} nats per token, at most {found.gate:g} is allowed")
        if effect is not None and not effect_gate <= effect <= most:
            problems.append(
                f"{effect:.4f} of what tuning changed is in the file, at least {effect_gate:g} is needed and at most "
                f"{most:g}; was the adapter merged, once, and into the base that it was trained on?"
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


def _recorded_base(folder: Path) -> str | None:
    """The model that a run, or what was merged of it, was tuned from, where that is recorded and it is another one."""
    if (merged := merged_adapter(folder)) is not None:
        return read_adapter_config(merged).base
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
