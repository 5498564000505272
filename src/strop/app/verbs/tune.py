"""`tune`, and `merge` for what an adapter run ends in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strop.app.verbs.common import Data, DataSets, Json, Output, Overwrite, data_sets, dump, show

if TYPE_CHECKING:
    from strop.config import AutoConfig, StagesConfig


def tune(
    model: Annotated[
        str, typer.Argument(help="The base: a folder, a hub id, 'demo'; or a config.yaml with everything.")
    ],
    data: DataSets = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="full, lora, qlora, qat, qat-lora or auto. [default: lora]")
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="qat, qat-lora, qlora, auto: the grid of the weights.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", "--output-dir", help="The run's folder.")] = None,
    scales: Annotated[
        str | None, typer.Option(help="qat: scales of each step's range, learned (LSQ), or fixed. [default: range]")
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="qat: a quantized model's folder whose codes and scales training begins from.")
    ] = None,
    train: Annotated[str | None, typer.Option(help="qat: all, scales, or last:N blocks. [default: all]")] = None,
    hold: Annotated[
        str | None, typer.Option(help="qat-lora: how the base is held: bf16, int8, codes or zero-points.")
    ] = None,
    max_moved: Annotated[
        str | None, typer.Option(help="Share of a layer's codes that may leave the start's, as 2% or 0.02.")
    ] = None,
    activations: Annotated[
        str | None, typer.Option(help="Round inputs in training: int8 (per token), or q8_0 as llama.cpp does.")
    ] = None,
    delay: Annotated[str | None, typer.Option(help="Share of the steps before the rounding begins.")] = None,
    freeze: Annotated[str | None, typer.Option(help="Share of the steps at the end with frozen scales.")] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(help="auto: largest drop allowed, of right answers (0.01: one in 100) or in nats per token."),
    ] = None,
    task: Annotated[str | None, typer.Option(help="auto: what is judged: exact-match or perplexity.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many optimizer steps.")] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", "--num-train-epochs", help="Passes over the data.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Peak; each method has its own default.")
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option("--rank", "--lora-r", metavar="N|auto", help="Rank of B and A; auto races three and takes one."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", "--lora-alpha", help="The adapter is scaled by alpha / rank.")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option("--dropout", "--lora-dropout", help="On the adapter's input.")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option("--targets", "--lora-target", "--target-modules", help="all-linear, or names and patterns."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "--per-device-train-batch-size", help="Rows in a micro batch.")
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option("--accumulation", "--gradient-accumulation-steps", help="Micro batches in a step.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", "--cutoff-len", "--max-seq-length", help="Tokens in a row.")
    ] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Several rows in a sequence, isolated.")
    ] = None,
    group_by_length: Annotated[
        bool | None, typer.Option("--group-by-length/--no-group-by-length", help="Rows of like length share a step.")
    ] = None,
    train_on: Annotated[str | None, typer.Option(help="answers, last, all or custom. [default: answers]")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="chatml, plain or a jinja file, for bases that have none.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="A model to learn from: a folder, a hub id, or base: itself before training."),
    ] = None,
    distill: Annotated[
        float | None, typer.Option(help="The teacher's share of the loss; 1 uses no labels. [default: 1]")
    ] = None,
    teacher_logits: Annotated[
        str | None, typer.Option(help="memory: the teacher runs beside; disk: its top logits; or auto, the less.")
    ] = None,
    kv_cache: Annotated[
        str | None, typer.Option("--kv-cache", help="Round keys and values as chat --kv-cache does: int8 or int4.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", "--optim", help="adamw, or adamw-8bit: moments in 8 bits.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", "--lr-scheduler-type", help="linear, cosine or constant.")
    ] = None,
    warmup_ratio: Annotated[float | None, typer.Option(help="Share of the steps that warms up.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's decay; norms and biases are left out.")] = None,
    clip_norm: Annotated[
        float | None, typer.Option("--clip-norm", "--max-grad-norm", help="Clips the gradient's norm.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    compute: Annotated[
        str | None, typer.Option(help="bf16, or int8 for the products of an adapter's frozen base on a CPU.")
    ] = None,
    checkpointing: Annotated[
        str | None,
        typer.Option(
            "--checkpointing", "--gradient-checkpointing", help="Recompute blocks to save memory: none, all or auto."
        ),
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="With --checkpointing auto: what a step may hold, as 2GB.")
    ] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Steps between two evaluations.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between two checkpoints.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many evaluations without a better one.")] = None,
    tensorboard: Annotated[
        bool | None, typer.Option("--tensorboard/--no-tensorboard", help="Write RUN/tensorboard event files as well.")
    ] = None,
    adapter: Annotated[str | None, typer.Option(help="An adapter to train further.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order, initial adapter, dropout.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on from the run's last checkpoint, bit for bit.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
    json: Json = False,
) -> None:
    """Fine-tune: every weight (full), an adapter (lora, qlora), or through the quantizer (qat, qat-lora).

    auto quantizes a model that does the task already, and trains only where it loses more than --max-drop.

    Example: strop tune demo --data chats.jsonl --method lora --epochs 3 -o run     strop tune config.yaml

    A config.yaml with `stages:`, a list of such settings, trains one stage after the other.
    """
    given = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in {"dry_run", "json", "model"}
    }
    from strop.app.console import ConsoleReporter
    from strop.config import load_auto, load_config, load_stages, to_yaml
    from strop.recipes.tune import tune_from_config

    if rank is not None and rank.isascii() and rank.isdigit():
        given["rank"] = int(rank)
    if data:
        given["data"] = data_sets(data)
    if "output" in given:
        given["output"] = str(given["output"])
    file = Path(model) if model.endswith((".yaml", ".yml")) else None
    stages = load_stages(file, given) if file else None
    if stages is not None:
        _in_stages(stages, dry_run=dry_run, json=json)
        return
    given = given if file else {"model": model, **given}
    auto = load_auto(file, given)
    if auto is not None:
        _by_choice(auto, dry_run=dry_run, json=json)
        return
    config = load_config(file, given)
    if dry_run:
        print(to_yaml(config), end="")
        return
    run = tune_from_config(config, reporter=ConsoleReporter())
    if json:
        dump(run.to_dict())
        return
    for line in run.lines():
        print(line)


def _in_stages(stages: StagesConfig, *, dry_run: bool, json: bool) -> None:
    """Carry out, or print, a configuration with `stages:`."""
    from strop.app.console import ConsoleReporter
    from strop.recipes.stages import tune_stages_from_config

    if dry_run:
        print(stages.to_yaml(), end="")
        return
    run = tune_stages_from_config(stages, reporter=ConsoleReporter())
    if json:
        dump(run.to_dict())
        return
    show(run.headers(), run.rows())
    for line in run.lines():
        print(line)


def _by_choice(config: AutoConfig, *, dry_run: bool, json: bool) -> None:
    """Carry out `--method auto`, or print its settings and the ways that it would try."""
    from strop.app.console import ConsoleReporter
    from strop.config import to_yaml
    from strop.recipes.auto import tune_auto
    from strop.recipes.auto_ways import plan_ways

    if dry_run:
        ways = plan_ways(config)
        print(to_yaml(config), end="")
        for way in ways:
            print(f"# {way.line()}")
        return
    run = tune_auto(config, reporter=ConsoleReporter())
    if json:
        dump(run.to_dict())
    else:
        show(run.headers(), run.rows())
        for line in run.lines():
            print(line)
    if run.exit_code:
        raise typer.Exit(run.exit_code)


def merge(
    run: Annotated[str, typer.Argument(help="A run or adapter folder.")],
    output: Output,
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="Round the merged layers to this: int8, int4-g32, nf4 ...")
    ] = None,
    data: Data = None,
    force: Annotated[
        bool, typer.Option("--force", help="Keep the result although it loses the adapter's effect; it is recorded.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make one model of an adapter and its base, and check it against the pair on real prompts.

    Example: strop merge run -o merged
    """
    from strop.app.console import ConsoleReporter
    from strop.recipes.merge import merge as merge_run

    result = merge_run(
        run, output, format=format, data=data, force=force, overwrite=overwrite, reporter=ConsoleReporter()
    )
    if json:
        dump(result.to_dict())
        return
    for line in result.lines():
        print(line)
