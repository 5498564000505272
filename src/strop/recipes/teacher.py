"""The teacher of a run: found, compared with the student, opened, or read once and freed before the student is there.

What cannot teach is refused before any weight is read: another vocabulary or tokenizer, fewer positions than a row has,
`base` where the model is stored quantized or an adapter lies on it already.

    shared   `base` under lora: the student itself with its adapters switched off, nothing is held besides
    memory   a second model beside the student
    disk     its top logits for every row, written before the student is opened (`training.teacher_cache`)

`auto` takes what needs less memory: shared where there is nothing to hold, else the disk, whose teacher is gone before
the student comes; memory where the disk has no room, or nothing may be written (`doctor`).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strop.config import Lora, TuneConfig
from strop.data.batches import Batch, padded_batch
from strop.data.packing import packed_attention
from strop.data.store import samples_digest, tokenizer_digest
from strop.data.templates import Sample
from strop.errors import ModelError, UsageError
from strop.files.folders import sha256_file
from strop.files.peft_adapter import base_digest, read_adapter_config
from strop.memory import release_unused_memory
from strop.models import load
from strop.models.opening import open_tokenizer
from strop.models.sources import find_folder, has_tokenizer, is_adapter, read_config
from strop.precision import empty_cache
from strop.progress import Reporter
from strop.recipes.checks.words import size
from strop.training.shapes import positions_of
from strop.training.teacher_cache import CachedTeacher, cache_bytes, kept_tokens, write_cache
from strop.training.teachers import HiddenWanted, ModelTeacher, SwitchedOffTeacher, Teacher

_TIGHT: Final = 1.25

DEFAULT_MAX_LENGTH: Final = 1024

BASE: Final = "base"
"""What the setting calls the very model that is trained."""


@dataclass(frozen=True)
class TeacherSource:
    """A teacher that may teach.

    Attributes:
        name: as the settings have it.
        folder: where its weights are.
        digest: SHA-256 that stands for its weights and configuration.
        way: how it is asked.
    """

    name: str
    folder: Path
    digest: str
    way: Literal["shared", "memory", "disk"]

    def beside(self, student: PreTrainedModel, *, packed_length: int | None, dtype: torch.dtype) -> Teacher:
        """The teacher in memory, on the student's device; the student has its layers in place.

        Args:
            student: the model that is trained.
            packed_length: tokens of a packed row; None where rows are not packed.
            dtype: of the teacher's weights.
        """
        if self.way == "shared":
            return SwitchedOffTeacher(student)
        model = load(self.folder, dtype=dtype, device=student.device, tokenizer=False).model
        model.set_attn_implementation(student.config._attn_implementation or "sdpa")
        return ModelTeacher(model, None if packed_length is None else packed_attention(model, packed_length))

    def report(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {"name": self.name, "folder": str(self.folder), "sha256": self.digest, "logits": self.way}


def cached_teacher(
    source: TeacherSource,
    folder: Path,
    sets: Sequence[Sequence[Sample]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    may_refuse: bool,
    again: bool,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    reporter: Reporter,
) -> CachedTeacher | None:
    """What the teacher says of all rows, from the disk; written there first if it is not there yet.

    Args:
        source: the teacher.
        folder: where its words are kept.
        sets: the rows, rendered.
        tokenizer: the student's.
        may_refuse: refuse where the disk has no room, in place of giving None.
        again: whether a run is resumed, so that what is there has to fit.
        batch_size: rows that the teacher reads at once.
        device: where it runs.
        dtype: of its weights and products.
        reporter: told what it takes, and of progress.

    Raises:
        UsageError: the disk has no room.
        TrainingError, FileFormatError: as `write_cache`.
    """
    config = read_config(_home(source.folder))[0]
    vocabulary, tokens = _vocabulary(_home(source.folder)), sum(sample.supervised for one in sets for sample in one)
    needed, there = cache_bytes(tokens, vocabulary), _bytes_in(folder)
    free = shutil.disk_usage(next(one for one in (folder, *folder.absolute().parents) if one.is_dir())).free
    said = (
        f"the teacher's {kept_tokens(vocabulary)} likeliest tokens for {tokens:,} supervised tokens take "
        f"{size(needed)} in {folder} until the run is finished; {size(free)} are free"
    )
    if _TIGHT * (needed - there) > free:
        if may_refuse:
            raise UsageError(
                f"teacher_logits: {said}; free some, choose an output on another disk, or set teacher_logits: memory"
            )
        reporter.note(f"{said}: too few, so that the teacher runs beside the student")
        return None
    reporter.note(said)

    def opened() -> tuple[torch.device, Callable[[Batch], HiddenWanted]]:
        model = load(source.folder, dtype=dtype, device=device, tokenizer=False).model
        teacher = ModelTeacher(model)
        teacher.check(padded_batch([sets[0][0]], [0], pad_id=0))
        return device, teacher.wanted

    left_out = write_cache(
        folder,
        {
            "teacher": source.digest,
            "tokenizer": tokenizer_digest(tokenizer),
            "rows": [samples_digest(one) for one in sets],
            "kept": kept_tokens(vocabulary),
            "dtype": str(dtype).removeprefix("torch."),
        },
        sets,
        opened,
        batch_size=batch_size,
        pad_id=tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0,
        compute_dtype=dtype,
        limit=positions_of(config),
        replace=not again,
        reporter=reporter,
    )
    reporter.note(f"they hold {1 - left_out:.2%} of its probability; the rest counts as one more outcome")
    release_unused_memory()
    empty_cache(device)
    return CachedTeacher(folder)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file())


def row_length(config: TuneConfig, limit: int | None) -> int:
    """Tokens of a row at the most, where the student has `limit` positions."""
    return config.samples.max_length or min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)


def student_folder(config: TuneConfig) -> tuple[Path, bool]:
    """The folder of the base that a run starts from, and whether an adapter lies on it already."""
    folder = find_folder(config.model)
    if is_adapter(folder):
        return find_folder(read_adapter_config(folder).base), True
    return folder, getattr(config.method, "adapter", None) is not None


def find_teacher(config: TuneConfig, *, disk: bool) -> TeacherSource | None:
    """The run's teacher, compared with its student by their configurations and tokenizers; None where there is none.

    Args:
        config: the run's settings.
        disk: whether anything may be written.

    Raises:
        UsageError: it reads other tokens, or too few of them; or `base` stands for no model in full precision.
        ConfigError, MissingInputError, ModelError: as opening raises them.
    """
    name = config.distillation.teacher
    if name is None:
        return None
    student, adapted = student_folder(config)
    if name == BASE:
        folder = student
        _check_base(config, student, adapted=adapted)
    else:
        folder = find_folder(name)
        check_teacher(folder, student)
    _check_positions(config, folder, student)
    way = config.distillation.teacher_logits
    shared = name == BASE and isinstance(config.method, Lora)
    chosen = "shared" if shared else "memory" if way == "memory" or not disk else "disk"
    return TeacherSource(name, folder, teacher_digest(folder), chosen)


def teacher_digest(folder: Path) -> str:
    """SHA-256 that stands for a teacher's weights and configuration, those of an adapter's base included."""
    if not is_adapter(folder):
        return base_digest(folder)
    files = [folder / "adapter_config.json", *sorted(folder.glob("adapter_model*.safetensors"))]
    lines = [f"{path.name} {sha256_file(path)}" for path in files]
    lines.append(base_digest(find_folder(read_adapter_config(folder).base)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _check_base(config: TuneConfig, folder: Path, *, adapted: bool) -> None:
    if adapted:
        raise UsageError(
            "teacher: base is the model before training, and here an adapter that is trained further lies on it; name "
            "that adapter's folder as the teacher"
        )
    if read_config(folder)[1] is not None:
        raise UsageError(
            f"teacher: base is the model in full precision, and {config.model} is stored quantized; name the model "
            "that it was made from as the teacher"
        )


def _home(folder: Path) -> Path:
    return find_folder(read_adapter_config(folder).base) if is_adapter(folder) else folder


def check_teacher(folder: Path, student: Path) -> None:
    """Refuse a teacher whose token ids do not mean what the student's do.

    Args:
        folder: of the teacher, an adapter's included.
        student: of the student's base.

    Raises:
        UsageError: the number of logits differs, or a token; names both and what to do.
        ModelError: the teacher brings no tokenizer.
    """
    sizes = [_vocabulary(_home(folder)), _vocabulary(student)]
    first = _first_difference(_tokenizer(folder), _tokenizer(student))
    if sizes[0] == sizes[1] and first is None:
        return
    problems = [f"it has {sizes[0]:,} logits and the student {sizes[1]:,}"] if sizes[0] != sizes[1] else []
    if first is not None:
        number, theirs, ours = first
        problems.append(f"token {number} is {theirs} in the teacher and {ours} in the student")
    raise UsageError(
        f"teacher: {folder} reads other tokens than {student}: {'; '.join(problems)}. KL on logits needs one "
        "vocabulary: choose a teacher of the same family, or train on answers that the teacher wrote (strop predict)"
    )


def _vocabulary(folder: Path) -> int:
    return int(read_config(folder)[0].get_text_config().vocab_size)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    home = next((one for one in (folder, _home(folder)) if has_tokenizer(one)), None)
    if home is None:
        raise ModelError(
            f"teacher: {folder} holds no tokenizer, so that nothing says that its token ids mean what the student's "
            "do; save its tokenizer into it"
        )
    return open_tokenizer(home)


def _first_difference(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> tuple[int, str, str] | None:
    """The lowest id that stands for different tokens, with both; None where there is none."""
    theirs, ours = ({number: token for token, number in one.get_vocab().items()} for one in (teacher, student))
    for number in sorted(theirs.keys() | ours.keys()):
        if theirs.get(number) != ours.get(number):
            known = [repr(one[number]) if number in one else "missing" for one in (theirs, ours)]
            return number, known[0], known[1]
    return None


def _check_positions(config: TuneConfig, folder: Path, student: Path) -> None:
    limit = positions_of(read_config(_home(folder))[0])
    length = row_length(config, positions_of(read_config(student)[0]))
    if limit is not None and length > limit:
        raise UsageError(
            f"teacher: {folder} has {limit} positions, and rows may have {length} tokens (max_length); set max_length "
            f"to {limit} or less, or choose another teacher"
        )
