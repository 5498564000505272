"""`tune`: fine-tune a model, by every weight, by an adapter, over a quantized base, or through the quantizer.

    RUN/config.yaml      the resolved settings          RUN/best, RUN/last  adapter or model
    RUN/metrics.jsonl    one line a step                RUN/checkpoints     states to go on from
    RUN/run.json         what was trained on what, and what came of it

The steps: settings checked, model opened, data rendered and counted, layers put in place, the loop, the account. What
fails before the loop leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import strop
from strop.config import Lora, QLora, TuneConfig, load_config, to_yaml
from strop.data.batches import BatchStream
from strop.data.packing import packed_attention
from strop.data.records import Splits, read_data
from strop.data.samples import SampleSet, prepare
from strop.data.templates import Sample, set_chat_template
from strop.errors import ConfigError, MissingInputError, UsageError
from strop.files.folders import read_json, write_json
from strop.memory import PeakMemory
from strop.progress import SILENT, Reporter
from strop.training.checkpoints import RunLock, differences
from strop.training.loop import train
from strop.training.metrics import NAME as METRICS_NAME
from strop.training.metrics import read_metrics
from strop.training.optimizers import default_learning_rate
from strop.training.precision import choose_device, compute_dtype
from strop.training.preparing import Base, Trained, open_base, put_layers
from strop.training.settings import TrainSettings, count_steps
from strop.training.shapes import positions_of

DEFAULT_MAX_LENGTH: Final = 1024

EAGER_LENGTH: Final[Mapping[torch.dtype, int]] = {torch.bfloat16: 512, torch.float32: 128}
"""On a CPU, rows up to so many tokens train faster with plain attention than with torch's fused one."""

_MAY_DIFFER: Final = ("model", "data", "output", "resume", "save_steps", "device")
"""Settings that a resumed run may have otherwise; the rows and the base's weights are compared by digest."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its folder.
        report: what stands in run.json: method, base, data, parameters, steps, losses, versions.
    """

    path: Path
    report: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """Open a run's folder.

        Raises:
            MissingInputError: there is no run.json.
        """
        folder = Path(path)
        return cls(folder, read_json(folder / "run.json"))

    @property
    def best_path(self) -> Path:
        """The adapter or model with the lowest loss on the validation rows; the last one where there were none."""
        best = self.path / "best"
        return best if best.is_dir() else self.last_path

    @property
    def last_path(self) -> Path:
        """The adapter or model after the last step."""
        return self.path / "last"

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """One mapping a step, as in metrics.jsonl."""
        return read_metrics(self.path / METRICS_NAME)

    @property
    def config(self) -> TuneConfig:
        """The resolved settings."""
        return load_config(self.path / "config.yaml")

    def merge(self, output: str | os.PathLike[str], **options: Any) -> Any:
        """Make one model of the adapter and its base; see `strop.merge`."""
        from strop.recipes.merge import merge

        return merge(str(self.best_path), output, **options)

    def to_dict(self) -> dict[str, Any]:
        """Path and report as JSON values."""
        return {"path": str(self.path), "best_path": str(self.best_path), **self.report}

    def lines(self) -> list[str]:
        """The run in a few sentences."""
        result, parameters = self.report["result"], self.report["parameters"]
        lines = [
            f"{self.report['method']}: {result['steps']:,} steps, {result['tokens']:,} tokens in "
            f"{result['train_seconds']:.1f} s; {parameters['trained']:,} parameters trained ({parameters['share']:.2%})"
        ]
        if result["best_valid_loss"] is not None:
            lines.append(
                f"validation loss {result['best_valid_loss']:.4f} at step {result['best_step']:,} (the best), "
                f"{result['valid_loss']:.4f} at the last"
            )
        lines.append(f"the model: {self.best_path}")
        return lines


def tune(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    method: str = "lora",
    format: str | None = None,
    output: str | os.PathLike[str] | None = None,
    reporter: Reporter = SILENT,
    **settings: Any,
) -> Run:
    """Fine-tune a model.

    Args:
        model: a folder, a hub id; an adapter or run folder to train that adapter further.
        data: a file, a folder of train, valid and test, or a hub id.
        method: full, lora, qlora or qat.
        format: the grid of the weights; qat needs it, qlora takes nf4-dq without it.
        output: the run's folder; runs/MODEL-METHOD by default, numbered.
        reporter: told of findings and progress.
        **settings: any other setting of `strop.config.TuneConfig`, flat and under any of its names.

    Raises:
        ConfigError: settings that are unknown, of a wrong type or contradict each other, all at once.
        MissingInputError, DataError, ModelError, FormatError, TargetError, TrainingError: as the steps raise them.
    """
    given = {"model": model, "data": data, "method": method, "format": format, "output": output}
    both = sorted(given.keys() & settings.keys())
    if both:
        raise ConfigError(f"{', '.join(both)}: given twice")
    return tune_from_config(TuneConfig.from_flat(given | settings, origin="arguments"), reporter=reporter)


def tune_from_config(config: TuneConfig, *, reporter: Reporter = SILENT) -> Run:
    """Fine-tune as `config` says; see `tune`."""
    run_dir = Path(config.output) if config.output is not None else _free_folder(config)
    config = config.replace(output=str(run_dir), resume=config.resume or None)
    if config.resume:
        config, done = _resumed(config, run_dir)
        if done is not None:
            reporter.note(f"{run_dir}: the run is finished; nothing is left to resume")
            return done
    else:
        _check_free(run_dir)
    with PeakMemory() as memory:
        return _Tuning(config, run_dir, memory, reporter).go()


# --- the run's folder -------------------------------------------------------------------------------------------------


def _free_folder(config: TuneConfig) -> Path:
    if config.resume:
        raise ConfigError("output: name the run's folder that is to be resumed (-o RUN)")
    stem = Path(config.model).name.lower() or "model"
    for number in range(1, 10_000):
        path = Path("runs") / (f"{stem}-{config.method.name}" + (f"-{number}" if number > 1 else ""))
        if not path.exists():
            return path
    raise UsageError("runs/: no free name; choose an output")


def _check_free(run_dir: Path) -> None:
    """Refuse to write over anything but the remains of a run that never got anywhere."""
    if run_dir.is_symlink() and not run_dir.exists():
        raise UsageError(f"{run_dir}: is a link to nothing; choose another output")
    if run_dir.exists() and not run_dir.is_dir():
        raise UsageError(f"{run_dir}: is a file, and a run is a folder; choose another output")
    if not run_dir.is_dir() or not any(run_dir.iterdir()):
        return
    kept = [name for name in ("best", "last", "checkpoints") if (run_dir / name).exists()]
    if kept or not (run_dir / "run.json").is_file():
        raise UsageError(
            f"{run_dir}: already holds {', '.join(kept) or 'files that are no run'}; choose another output, or add "
            "--resume to go on with the run that is there"
        )


def _resumed(config: TuneConfig, run_dir: Path) -> tuple[TuneConfig, Run | None]:
    """The settings that the run in the folder began with, and the run itself where it is finished.

    Raises:
        MissingInputError: there is no run.
        ConfigError: a setting differs; all of them are listed.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise MissingInputError(f"{file}: there is no run to resume; leave --resume out, or check the output")
    saved, asked = load_config(file).flat(), config.flat()
    wrong = differences(
        {key: saved.get(key) for key in asked if key not in _MAY_DIFFER},
        {key: value for key, value in asked.items() if key not in _MAY_DIFFER},
    )
    if wrong:
        raise ConfigError(
            f"{run_dir}: the run cannot go on exactly with other settings:\n  "
            + "\n  ".join(wrong)
            + "\nLeave them as "
            f"they were (strop tune {file} --resume), or start a new run elsewhere."
        )
    saved |= {key: asked[key] for key in _MAY_DIFFER if key in asked}
    report = read_json(run_dir / "run.json") if (run_dir / "run.json").is_file() else {}
    return TuneConfig.from_flat(saved), Run(run_dir, report) if report.get("finished") is True else None


# --- one call ---------------------------------------------------------------------------------------------------------


class _Tuning:
    """The steps of one call, in order."""

    def __init__(self, config: TuneConfig, run_dir: Path, memory: PeakMemory, reporter: Reporter) -> None:
        self.config, self.run_dir, self.memory, self.reporter = config, run_dir, memory, reporter
        self.device = choose_device(config.machine.device)
        self.dtype = compute_dtype(config.machine.dtype, self.device)

    def go(self) -> Run:
        splits = self._read_data()
        method = self.config.method
        base = open_base(self.config.model, method, device=self.device, dtype=self.dtype, reporter=self.reporter)
        model, tokenizer = base.model, base.tokenizer
        if self.config.samples.chat_template is not None:
            set_chat_template(tokenizer, self.config.samples.chat_template)
        self._resolve(model)
        train_set, valid_set = self._prepare(splits, tokenizer)
        trained = put_layers(base, method, seed=self.config.seed, reporter=self.reporter)
        attention = self._choose_attention(model, train_set)
        stream = self._stream(model, tokenizer, train_set)
        self._tell_length(stream)
        report = self._report(base, trained, train_set, valid_set) | {"attention": attention}
        identity = {
            **{key: value for key, value in self.config.flat().items() if key not in _MAY_DIFFER},
            "base": base.record.digest,
            "attention": attention,
            "valid_samples": _digest(valid_set.samples if valid_set is not None else []),
        }
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with RunLock(self.run_dir):
            config_file = self.run_dir / "config.yaml"
            _replace_text(config_file, to_yaml(self.config.replace(resume=None)))
            self._write_report(report)
            result = train(
                model,
                stream,
                valid_set.samples if valid_set is not None else [],
                self._train_settings(identity),
                self.run_dir,
                export=base.exporter(method),
                resume=self.config.resume,
                memory=self.memory,
                reporter=self.reporter,
            )
            report |= {"finished": True, "result": asdict(result), "peak_bytes": self.memory.peak_bytes}
            self._write_report(report)
        return Run(self.run_dir, report)

    # --- data ---------------------------------------------------------------------------------------------------------

    def _read_data(self) -> Splits:
        config = self.config
        splits = read_data(config.data, seed=config.seed, valid_fraction=config.samples.valid_fraction)
        shared = {record.source for record in splits.valid} & {record.source for record in splits.train}
        if shared:
            held, rows = len(splits.valid), len(splits.train) + len(splits.valid)
            self.reporter.note(
                f"the data name no valid split: {held:,} of {rows:,} rows are held out for it (seed {config.seed})"
            )
        return splits

    def _prepare(self, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> tuple[SampleSet, SampleSet | None]:
        samples = self.config.samples
        assert samples.max_length is not None
        made = [
            prepare(records, tokenizer, max_length=samples.max_length, train_on=samples.train_on) if records else None
            for records in (splits.train, splits.valid)
        ]
        train_set, valid_set = made
        assert train_set is not None
        for line in train_set.report.lines():
            self.reporter.note(line)
        return train_set, valid_set

    def _stream(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train_set: SampleSet) -> BatchStream:
        samples, optimization, pad_id = self.config.samples, self.config.optimization, tokenizer.pad_token_id
        assert samples.max_length is not None
        return BatchStream(
            train_set.samples,
            batch_size=optimization.batch_size,
            accumulation=optimization.accumulation,
            packing=samples.packing,
            max_length=samples.max_length,
            seed=self.config.seed,
            pad_id=pad_id if isinstance(pad_id, int) else 0,  # padding is masked by its place, not by its id
            attention=packed_attention(model, samples.max_length) if samples.packing else None,
        )

    def _tell_length(self, stream: BatchStream) -> None:
        optimization, length = self.config.optimization, self.config.length
        rows = "packed sequences" if stream.packing else "rows"
        steps = count_steps(length, stream.steps_per_epoch)
        told = "as many as fit into its minutes" if steps is None else f"{steps:,}"
        most = optimization.batch_size * optimization.accumulation
        self.reporter.note(f"{stream.steps_per_epoch:,} steps of up to {most} {rows} are an epoch; the run has {told}")

    # --- settings and account -----------------------------------------------------------------------------------------

    def _resolve(self, model: PreTrainedModel) -> None:
        """Fill in the settings that only the model can tell."""
        config = self.config
        limit, length = positions_of(model), config.samples.max_length
        if length is not None and limit is not None and length > limit:
            raise ConfigError(f"max_length: got {length}; {config.model} has {limit} positions; set {limit} or less")
        changes: dict[str, Any] = {}
        if length is None:
            changes["max_length"] = min(DEFAULT_MAX_LENGTH, limit or DEFAULT_MAX_LENGTH)
        if config.optimization.learning_rate is None:
            width = _width(model)
            adapters = isinstance(config.method, Lora | QLora)
            changes["learning_rate"] = default_learning_rate(width, adapters=adapters)
            self.reporter.note(
                f"learning rate {changes['learning_rate']:.3g}, the default of {config.method.name} at width {width}"
            )
        self.config = config.replace(**changes)

    def _train_settings(self, identity: Mapping[str, Any]) -> TrainSettings:
        config, optimization = self.config, self.config.optimization
        assert optimization.learning_rate is not None
        return TrainSettings(
            length=config.length,
            learning_rate=optimization.learning_rate,
            schedule=optimization.schedule,
            warmup_ratio=optimization.warmup_ratio,
            weight_decay=optimization.weight_decay,
            clip_norm=optimization.clip_norm,
            compute_dtype=self.dtype,
            checkpointing=config.machine.checkpointing,
            eval_steps=config.watch.eval_steps,
            eval_batch_size=max(8, optimization.batch_size),
            save_steps=config.watch.save_steps,
            patience=config.watch.patience,
            seed=config.seed,
            identity=identity,
        )

    def _choose_attention(self, model: PreTrainedModel, train_set: SampleSet) -> str:
        """Plain attention for short rows on a CPU, else what the model was opened with; decided by the data alone."""
        samples = self.config.samples
        longest = samples.max_length if samples.packing else max(len(sample) for sample in train_set.samples)
        short = longest is not None and longest <= EAGER_LENGTH.get(self.dtype, 0)
        if self.device.type == "cpu" and short:
            model.set_attn_implementation("eager")
        return str(getattr(model.config, "_attn_implementation", "unknown"))

    def _report(
        self, base: Base, trained: Trained, train_set: SampleSet, valid_set: SampleSet | None
    ) -> dict[str, Any]:
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
                "train": train_set.report.to_dict(),
                "valid": valid_set.report.to_dict() if valid_set is not None else None,
            },
            "compute_dtype": str(self.dtype).removeprefix("torch."),
            "stored_dtype": str(base.stored_dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "versions": {
                "strop": strop.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }

    def _write_report(self, report: Mapping[str, Any]) -> None:
        part = self.run_dir / ".run.json.part"
        write_json(part, dict(report))
        os.replace(part, self.run_dir / "run.json")


def _width(model: PreTrainedModel) -> int:
    """Columns of the input embedding."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[1]


def _digest(samples: list[Sample]) -> str | None:
    """SHA-256 over the token ids and labels of rows; None where there are none."""
    if not samples:
        return None
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(torch.tensor([len(sample), *sample.input_ids, *sample.labels]).numpy().tobytes())
    return digest.hexdigest()


def _replace_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
