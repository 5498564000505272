"""What a run needs before its first step: the model open with its layers, the data rendered, every setting resolved.

`open_session` does all that `tune` does before the loop and leaves nothing on disk, so that `doctor` and others look at
the very batches, masks and parameters that training would use. What cannot be trained is refused here.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import strop
from strop import kernels
from strop.config import Lora, Method, Qat, QatLora, QLora, Rounded, TuneConfig
from strop.data.batches import BatchStream
from strop.data.mixing import Mixture, open_mixture
from strop.data.packing import packed_attention
from strop.data.samples import SampleSet
from strop.data.store import rendered, sample_lengths, samples_digest
from strop.data.templates import Sample, set_chat_template
from strop.errors import ConfigError
from strop.evaluation.kv_cache import KVFormat
from strop.evaluation.kv_rounding import KVRounding
from strop.files.peft_adapter import base_digest
from strop.models.opening import open_tokenizer
from strop.models.sources import find_folder, read_config
from strop.precision import choose_device, compute_dtype
from strop.progress import SILENT, Reporter
from strop.recipes.teacher import TeacherSource, cached_teacher, find_teacher, row_length, student_folder
from strop.training.events import require_tensorboard
from strop.training.fusing import fuse
from strop.training.int8_base import require_int8
from strop.training.objective import Objective
from strop.training.optimizers import default_learning_rate
from strop.training.preparing import Base, Trained, open_base, put_layers
from strop.training.settings import TrainSettings, count_steps
from strop.training.shapes import common_width, positions_of
from strop.training.teachers import Teacher

EAGER_LENGTH: Final[Mapping[torch.dtype, int]] = {torch.bfloat16: 512, torch.float32: 128}
"""On a CPU, rows up to so many tokens train faster with plain attention than with torch's fused one."""

MAY_DIFFER: Final = ("model", "data", "teacher", "output", "resume", "save_steps", "device", "tensorboard")
"""Settings that a resumed run may have otherwise; rows, and the weights of base and teacher, are compared by digest."""


@dataclass(frozen=True)
class Session:
    """A run that is ready to begin.

    Attributes:
        config: every setting, those that only the model can tell included.
        base: the opened model and what is known of it.
        trained: what is trained of it.
        splits: the records.
        train_set: the rows to train on, rendered.
        valid_set: the rows to choose by; None where there are none.
        stream: the training data, at their beginning.
        objective: what is minimised, the teacher in it.
        teacher: where the teacher comes from; None without one.
        attention: the model's attention implementation.
        one_piece: how many of its blocks run as one piece.
        device: where it runs.
        dtype: of the products.
    """

    config: TuneConfig
    base: Base
    trained: Trained
    splits: Mixture
    train_set: SampleSet
    valid_set: SampleSet | None
    stream: BatchStream
    objective: Objective
    teacher: TeacherSource | None
    attention: str
    one_piece: int
    device: torch.device
    dtype: torch.dtype

    @property
    def model(self) -> PreTrainedModel:
        """The model, its layers in place."""
        return self.base.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the chat template that is trained through."""
        return self.base.tokenizer

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be resumed, as JSON values."""
        return {
            **{key: value for key, value in self.config.flat().items() if key not in MAY_DIFFER},
            "base": self.base.record.digest,
            **self._start(),
            **({"teacher": self.teacher.digest} if self.teacher is not None else {}),
            "attention": self.attention,
            "valid_samples": _digest(self.valid_set.samples if self.valid_set is not None else []),
        }

    def _start(self) -> dict[str, str]:
        """The digest of the quantized model that training begins from, where there is one."""
        method = self.config.method
        if not isinstance(method, Qat) or method.start is None:
            return {}
        return {"start_sha256": base_digest(find_folder(method.start))}

    def rows_digest(self) -> str:
        """SHA-256 over the rendered rows, those to train on and those to choose by."""
        valid = self.valid_set.samples if self.valid_set is not None else []
        return hashlib.sha256(f"{_digest(self.train_set.samples)} {_digest(valid)}".encode()).hexdigest()

    def train_settings(self) -> TrainSettings:
        """The loop's settings."""
        config, optimization = self.config, self.config.optimization
        assert optimization.learning_rate is not None
        return TrainSettings(
            length=config.length,
            learning_rate=optimization.learning_rate,
            optimizer=optimization.optimizer,
            schedule=optimization.schedule,
            warmup_ratio=optimization.warmup_ratio,
            weight_decay=optimization.weight_decay,
            clip_norm=optimization.clip_norm,
            compute_dtype=self.dtype,
            int8=config.machine.compute == "int8",
            checkpointing=config.machine.checkpointing,
            max_memory=config.machine.max_memory,
            eval_steps=config.watch.eval_steps,
            eval_batch_size=max(8, optimization.batch_size),
            save_steps=config.watch.save_steps,
            patience=config.watch.patience,
            tensorboard=config.watch.tensorboard,
            **_phases(config.method),
            seed=config.seed,
            identity=self.identity,
        )

    def report(self) -> dict[str, Any]:
        """The account of a run that has not begun, for run.json."""
        base, trained, valid_set = self.base, self.trained, self.valid_set
        return {
            "finished": False,
            "method": self.config.method.name,
            "model": self.config.model,
            "base": asdict(base.record),
            "format": trained.scheme.name if trained.scheme is not None else None,
            "layers": len(trained.layers),
            "parameters": {
                "trained": trained.parameters,
                "total": trained.total_parameters,
                "share": trained.share,
            },
            "data": {
                "train": self.train_set.report.to_dict(),
                "valid": valid_set.report.to_dict() if valid_set is not None else None,
            },
            **({"teacher": self.teacher.report()} if self.teacher is not None else {}),
            "compute_dtype": str(self.dtype).removeprefix("torch."),
            "compute": self.config.machine.compute,
            "stored_dtype": str(base.stored_dtype).removeprefix("torch."),
            "attention": self.attention,
            "blocks_in_one_piece": self.one_piece,
            "kernels": kernels.in_use().name,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "versions": {
                "strop": strop.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }


def _phases(method: Method) -> dict[str, float]:
    """What the loop is told of a method that trains through the rounding."""
    if not isinstance(method, Rounded):
        return {}
    found = {"delay": method.delay, "freeze": method.freeze}
    if isinstance(method, Qat) and method.scale_rate is not None:
        found["scale_rate"] = method.scale_rate
    return found


def open_session(
    config: TuneConfig,
    *,
    reporter: Reporter = SILENT,
    cache: Path | None = None,
    teacher_cache: Path | None = None,
) -> Session:
    """Open, read, render and attach, as `config` says.

    Args:
        config: the settings; those that only the model can tell are filled in.
        reporter: told of findings.
        cache: a folder in which rendered rows are kept, and found again; None leaves nothing on the disk.
        teacher_cache: a folder in which a teacher's top logits are kept; None runs a teacher beside the student.

    Raises:
        ConfigError, UsageError, MissingInputError, DataError, ModelError, FormatError, TargetError: as the steps raise
            them.
    """
    if config.watch.tensorboard:
        require_tensorboard()
    device = choose_device(config.machine.device)
    dtype = compute_dtype(config.machine.dtype, device)
    if config.machine.compute == "int8" and device.type != "cpu":
        raise ConfigError(f"compute: int8 is for training on a CPU, and the device is {device}; leave it out")
    data = _read(config, reporter)
    source, rows, teacher = find_teacher(config, disk=teacher_cache is not None), None, None
    if source is not None and source.way == "disk" and teacher_cache is not None:
        rows, teacher = _read_by_teacher(config, source, data, device, dtype, reporter, cache, teacher_cache)
        source = source if teacher is not None else replace(source, way="memory")
    base = open_base(config.model, config.method, device=device, dtype=dtype, reporter=reporter)
    model, tokenizer = base.model, base.tokenizer
    if config.samples.chat_template is not None:
        set_chat_template(tokenizer, config.samples.chat_template)
    config = _resolved(config, model, source, reporter)
    trained = put_layers(base, config.method, seed=config.seed, reporter=reporter)
    train_set, valid_set = rows or _prepare(config, data, tokenizer, reporter, cache)
    attention = _choose_attention(config, model, train_set, device, dtype)
    stream = _stream(config, model, tokenizer, data.draw(train_set.samples))
    objective = _objective(config, source, teacher, model, dtype)
    one_piece = fuse(model, stream) if objective.rounding is None else 0
    if one_piece:
        reporter.note(f"{one_piece} blocks run as one piece, forward and backward, by native kernels")
    if config.machine.compute == "int8":
        require_int8(one_piece)
    _tell_length(config, stream, positions_of(model), reporter)
    return Session(
        config,
        base,
        trained,
        data,
        train_set,
        valid_set,
        stream,
        objective,
        source,
        attention,
        one_piece,
        device,
        dtype,
    )


def _objective(
    config: TuneConfig,
    source: TeacherSource | None,
    teacher: Teacher | None,
    model: PreTrainedModel,
    dtype: torch.dtype,
) -> Objective:
    """What is minimised, with a teacher that has not spoken yet opened beside the student.

    Raises:
        ModelError, TrainingError: the model's keys and values cannot be rounded.
    """
    samples, rounding = config.samples, None
    assert samples.max_length is not None
    if config.serving.kv_cache is not None:
        rounding = KVRounding(model, KVFormat(config.serving.kv_cache), samples.max_length)
    if source is not None and teacher is None:
        teacher = source.beside(model, packed_length=samples.max_length if samples.packing else None, dtype=dtype)
    return Objective(teacher, config.distillation.distill or 0.0, rounding)


def _read_by_teacher(
    config: TuneConfig,
    source: TeacherSource,
    data: Mixture,
    device: torch.device,
    dtype: torch.dtype,
    reporter: Reporter,
    cache: Path | None,
    teacher_cache: Path,
) -> tuple[tuple[SampleSet, SampleSet | None], Teacher | None]:
    """The rows, and what the teacher says of them, before the student is opened; None where the disk has no room."""
    student, _ = student_folder(config)
    tokenizer = open_tokenizer(student)
    if config.samples.chat_template is not None:
        set_chat_template(tokenizer, config.samples.chat_template)
    config = config.replace(max_length=row_length(config, positions_of(read_config(student)[0])))
    train_set, valid_set = _prepare(config, data, tokenizer, reporter, cache)
    teacher = cached_teacher(
        source,
        teacher_cache,
        [train_set.samples, *([valid_set.samples] if valid_set is not None else [])],
        tokenizer,
        may_refuse=config.distillation.teacher_logits == "disk",
        again=config.resume,
        batch_size=max(8, config.optimization.batch_size),
        device=device,
        dtype=dtype,
        reporter=reporter,
    )
    return (train_set, valid_set), teacher


def _read(config: TuneConfig, reporter: Reporter) -> Mixture:
    data = open_mixture(config.data, seed=config.seed, valid_fraction=config.samples.valid_fraction)
    for one in data.sets:
        if one.drawn:
            held, rows = len(one.valid), len(one.train) + len(one.valid)
            which = "the data name" if len(data.sets) == 1 else f"{one.name} names"
            reporter.note(f"{which} no valid split: {held:,} of {rows:,} rows are held out for it (seed {config.seed})")
    return data


def _resolved(
    config: TuneConfig, model: PreTrainedModel, source: TeacherSource | None, reporter: Reporter
) -> TuneConfig:
    """The settings with those filled in that only the model, or the disk, can tell."""
    limit, length = positions_of(model), config.samples.max_length
    if length is not None and limit is not None and length > limit:
        raise ConfigError(f"max_length: got {length}; {config.model} has {limit} positions; set {limit} or less")
    changes: dict[str, Any] = {}
    if length is None:
        changes["max_length"] = row_length(config, limit)
    if source is not None:  # a resumed run asks in the same way
        changes["teacher_logits"] = "disk" if source.way == "disk" else "memory"
    if config.optimization.learning_rate is None:
        width = _width(model)
        adapters = isinstance(config.method, Lora | QLora | QatLora)
        changes["learning_rate"] = default_learning_rate(width, adapters=adapters)
        reporter.note(
            f"learning rate {changes['learning_rate']:.3g}, the default of {config.method.name} at width {width}"
        )
    return config.replace(**changes)


def _prepare(
    config: TuneConfig, data: Mixture, tokenizer: PreTrainedTokenizerBase, reporter: Reporter, cache: Path | None
) -> tuple[SampleSet, SampleSet | None]:
    samples = config.samples
    assert samples.max_length is not None
    made = rendered(
        {"train": data.train, "valid": data.valid},
        tokenizer,
        max_length=samples.max_length,
        train_on=samples.train_on,
        cache=cache,
        data_sha256=data.sha256,
        version=strop.__version__,
        held=data.held,
        note=reporter.note,
    )
    train_set = made["train"]
    for line in [*train_set.report.lines(), *data.lines(train_set.samples)]:
        reporter.note(line)
    return train_set, made.get("valid")


def _stream(
    config: TuneConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sample]
) -> BatchStream:
    samples, optimization, pad_id = config.samples, config.optimization, tokenizer.pad_token_id
    assert samples.max_length is not None
    return BatchStream(
        rows,
        batch_size=optimization.batch_size,
        accumulation=optimization.accumulation,
        packing=samples.packing,
        group_by_length=samples.group_by_length,
        max_length=samples.max_length,
        seed=config.seed,
        pad_id=pad_id if isinstance(pad_id, int) else 0,  # padding is masked by its place, not by its id
        attention=packed_attention(model, samples.max_length) if samples.packing else None,
    )


def _tell_length(config: TuneConfig, stream: BatchStream, limit: int | None, reporter: Reporter) -> None:
    optimization, length = config.optimization, config.length
    rows = "packed sequences" if stream.packing else "rows"
    steps = count_steps(length, stream.steps_per_epoch)
    told = "as many as fit into its minutes" if steps is None else f"{steps:,}"
    most = optimization.batch_size * optimization.accumulation
    reporter.note(f"{stream.steps_per_epoch:,} steps of up to {most} {rows} are an epoch; the run has {told}")
    used = stream.used_positions(lambda width: common_width(width, limit=limit))
    wasteful = not (stream.packing or stream.group_by_length) and stream.used_positions() < 0.8
    advice = "; packing or group_by_length would leave fewer empty" if wasteful else ""
    reporter.note(f"{used:.1%} of the positions that are computed hold tokens{advice}")


def _choose_attention(
    config: TuneConfig, model: PreTrainedModel, train_set: SampleSet, device: torch.device, dtype: torch.dtype
) -> str:
    """Plain attention for short rows on a CPU, else what the model was opened with; decided by the data alone."""
    samples = config.samples
    longest = samples.max_length if samples.packing else max(sample_lengths(train_set.samples))
    short = longest is not None and longest <= EAGER_LENGTH.get(dtype, 0)
    if device.type == "cpu" and short:
        model.set_attn_implementation("eager")
    return str(getattr(model.config, "_attn_implementation", "unknown"))


def _width(model: PreTrainedModel) -> int:
    """Columns of the input embedding."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[1]


def _digest(samples: Sequence[Sample]) -> str | None:
    """SHA-256 over the token ids and labels of rows; None where there are none."""
    return samples_digest(samples) if samples else None
