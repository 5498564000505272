"""What each verb's options are and how its result is shown. The work itself is in `strop.recipes`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Model = Annotated[
    str, typer.Argument(help="A folder, a hub id, a run or adapter folder, or 'demo' (the bundled model).")
]
Data = Annotated[
    str | None,
    typer.Option("--data", "-d", "--dataset", help="A file (jsonl, json, csv, txt, parquet), folder or hub id."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result is written.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what stands at the output path.")]


def stop(message: str, code: int) -> NoReturn:
    """Print why the verb ends on standard error and leave with `code`."""
    from strop.app.console import messages

    messages.print(f"[bold red]strop:[/] {_escape(message)}")
    raise typer.Exit(code)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _dump(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, allow_nan=False)
    print()


def _show(headers: list[str], rows: list[list[str]], title: str | None = None) -> None:
    from strop.app.console import output, table

    output.print(table(headers, rows, title=title))


# --- explain ----------------------------------------------------------------------------------------------------------


def bits(
    value: Annotated[float, typer.Argument(help="The number.")],
    format: Annotated[str, typer.Option("--format", "-f", help="fp32, fp16, bf16, fp8, int8 ...")] = "fp16",
    json: Json = False,
) -> None:
    """Show a number's sign, exponent and significand in a format, and the value that is really stored.

    Example: strop explain bits 7.32 --format fp16
    """
    from strop.recipes.explain import explain_bits

    _explained(explain_bits(value, format), as_json=json)


def affine(
    range: Annotated[tuple[float, float], typer.Option("--range", help="The lowest and the highest value to be held.")],
    value: Annotated[float, typer.Option("--value", help="A value to send through and back.")],
    format: Annotated[str, typer.Option("--format", "-f", help="int2 to int8, uint2 to uint8.")] = "uint8",
    scheme: Annotated[str, typer.Option("--scheme", help="symmetric, symmetric-full or asymmetric.")] = "asymmetric",
    json: Json = False,
) -> None:
    """Work an affine quantization step by step: scale, zero point, code, restored value.

    Example: strop explain affine --range -20 1000 --format uint8 --scheme asymmetric --value -20
    """
    from strop.recipes.explain import explain_affine

    _explained(explain_affine(range[0], range[1], format, scheme, value), as_json=json)


def tensor(
    model: Model,
    name: Annotated[str, typer.Argument(help="The tensor's name, as in the weights file.")],
    output: Output,
    format: Annotated[str, typer.Option("--format", "-f", help="int8, int4-g32, nf4 ...")] = "int4-g32",
    json: Json = False,
) -> None:
    """Draw a weight's histogram with the grid of a format, and its error.

    Example: strop explain tensor demo model.layers.0.mlp.up_proj.weight --format int4-g32 -o picture.png
    """
    from strop.recipes.explain import explain_tensor

    _explained(explain_tensor(model, name, format, output), as_json=json)


def _explained(explanation: Any, *, as_json: bool) -> None:
    if as_json:
        _dump(explanation.to_dict())
        return
    for line in explanation.lines():
        print(line)


# --- plan -------------------------------------------------------------------------------------------------------------


def plan(
    model: Annotated[
        str | None, typer.Argument(help="A model folder, a config.json, a hub id, or 'demo'.", show_default=False)
    ] = None,
    sizes: Annotated[str | None, typer.Option("--sizes", help="Parameter counts: 7B,13B,70B.")] = None,
    ranks: Annotated[str, typer.Option("--ranks", help="Ranks for --sizes.")] = "1,2,8,16,512",
    rank: Annotated[int, typer.Option("--rank", "--lora-r", help="The adapter's rank.", min=1)] = 16,
    targets: Annotated[
        str, typer.Option("--targets", help="all-linear, or names and patterns with commas.")
    ] = "all-linear",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows in a micro batch.", min=1)] = 1,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens in a row.", min=1)] = 512,
    json: Json = False,
) -> None:
    """What does this take: parameters, memory, disk and time, for each method; what fits here.

    Example: strop plan demo --rank 16     strop plan --sizes 7B,70B --ranks 1,8
    """
    from strop.recipes.plan import plan as run

    if model is None or sizes is not None:
        planned = run(model, sizes=None if sizes is None else sizes.split(","), ranks=ranks.split(","))
    else:
        planned = run(model, rank=rank, targets=targets, batch_size=batch_size, max_length=max_length)
    if json:
        _dump(planned.to_dict())
        return
    for line in planned.lines():
        print(line)


# --- quantize ---------------------------------------------------------------------------------------------------------


def quantize(
    model: Model,
    format: Annotated[str, typer.Option("--format", "-f", help="int8, int4-g32, int4-g128-asym, int3-g32, nf4 ...")],
    output: Output,
    method: Annotated[
        str, typer.Option("--method", "-m", help="rtn (round to nearest) or search (searched scales).")
    ] = "rtn",
    observer: Annotated[
        str, typer.Option("--observer", help="How rtn finds the range: minmax, percentile, mse.")
    ] = "minmax",
    data: Data = None,
    max_rows: Annotated[int, typer.Option("--max-rows", help="Rows of --data to calibrate with.", min=1)] = 128,
    keep_indivisible: Annotated[
        bool, typer.Option("--keep-indivisible", help="Keep layers that a group size does not divide in 16 bits.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Round a model's linear layers to a format and write it with a receipt of what was lost.

    Example: strop quantize demo --format int4-g32 -o demo-int4
    """
    from strop.app.console import ConsoleReporter
    from strop.recipes.quantize import quantize as run

    result = run(
        model,
        format,
        output=output,
        method=method,
        observer=observer,
        data=data,
        max_rows=max_rows,
        keep_indivisible=keep_indivisible,
        overwrite=overwrite,
        reporter=ConsoleReporter(),
    )
    if json:
        _dump({"path": str(result.path), "receipt": result.receipt})
        return
    for line in result.lines():
        print(line)


# --- tune and merge ---------------------------------------------------------------------------------------------------


def tune(
    model: Annotated[
        str, typer.Argument(help="The base: a folder, a hub id, 'demo'; or a config.yaml with everything.")
    ],
    data: Data = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="full, lora, qlora or qat. [default: lora]")
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="qat and qlora: the grid of the weights.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", "--output-dir", help="The run's folder.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many optimizer steps.")] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", "--num-train-epochs", help="Passes over the data.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Peak; each method has its own default.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", "--lora-r", help="Rank of B and A.")] = None,
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
    train_on: Annotated[str | None, typer.Option(help="answers, or all. [default: answers]")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="chatml, plain or a jinja file, for bases that have none.")
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
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--checkpointing/--no-checkpointing",
            "--gradient-checkpointing",
            help="Recompute activations to save memory.",
        ),
    ] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Steps between two evaluations.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between two checkpoints.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many evaluations without a better one.")] = None,
    adapter: Annotated[str | None, typer.Option(help="An adapter to train further.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order, initial adapter, dropout.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume", help="Go on from the run's last checkpoint, bit for bit.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
    json: Json = False,
) -> None:
    """Fine-tune: every weight (full), an adapter (lora, qlora), or through the quantizer (qat).

    Example: strop tune demo --data chats.jsonl --method lora --epochs 3 -o run     strop tune config.yaml
    """
    given = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in {"dry_run", "json", "model"}
    }
    from strop.app.console import ConsoleReporter
    from strop.config import load_config, to_yaml
    from strop.recipes.tune import tune_from_config

    if "output" in given:
        given["output"] = str(given["output"])
    file = Path(model) if model.endswith((".yaml", ".yml")) else None
    config = load_config(file, given if file else {"model": model, **given})
    if dry_run:
        print(to_yaml(config), end="")
        return
    run = tune_from_config(config, reporter=ConsoleReporter())
    if json:
        _dump(run.to_dict())
        return
    for line in run.lines():
        print(line)


def merge(
    run: Annotated[str, typer.Argument(help="A run or adapter folder.")],
    output: Output,
    data: Data = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make one model of an adapter and its base, and check it against the pair on real prompts.

    Example: strop merge run -o merged
    """
    from strop.app.console import ConsoleReporter
    from strop.recipes.merge import merge as merge_run

    result = merge_run(run, output, data=data, overwrite=overwrite, reporter=ConsoleReporter())
    if json:
        _dump(result.to_dict())
        return
    for line in result.lines():
        print(line)


# --- compare ----------------------------------------------------------------------------------------------------------


def compare(
    models: Annotated[list[str], typer.Argument(help="Two models or more; the first is the reference.")],
    data: Annotated[str, typer.Option("--data", "-d", help="Rows that trained and calibrated nothing.")],
    task: Annotated[str | None, typer.Option(help="exact-match: is the whole answer right?")] = None,
    max_rows: Annotated[int, typer.Option("--max-rows", help="Rows to use.", min=2)] = 300,
    page: Annotated[Path | None, typer.Option("--output", "-o", help="Write a page to look at (.html).")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    json: Json = False,
) -> None:
    """Put models side by side: size, memory, speed, perplexity, divergence, agreement, task score, with intervals.

    Example: strop compare base tuned tuned-int4 --data test.jsonl --task exact-match -o page.html
    """
    from strop.app.console import ConsoleReporter
    from strop.recipes.compare import compare as run

    comparison = run(models, data, task=task, page=page, max_rows=max_rows, seed=seed, reporter=ConsoleReporter())
    if json:
        _dump(comparison.to_dict())
        return
    _show(comparison.headers(), comparison.rows())
    for line in comparison.verdicts():
        print(line)
    if page:
        print(f"page: {page}")


# --- chat and predict -------------------------------------------------------------------------------------------------


def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask once, print the answer, leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
) -> None:
    """Talk to a model; --prompt asks once.

    Example: strop chat run --prompt "wake me at half past six on weekdays"
    """
    from strop.app.console import messages
    from strop.models import load
    from strop.recipes.generate import answer

    opened = load(model)
    turns = [{"role": "system", "content": system}] if system else []

    def reply(text: str) -> None:
        turns.append({"role": "user", "content": text})
        said = answer(
            opened,
            turns,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stream=lambda piece: print(piece, end="", flush=True),
        )
        print()
        turns.append({"role": "assistant", "content": said})

    if prompt is not None:
        reply(prompt)
        return
    messages.print("An empty line or Ctrl-D leaves.", style="dim")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            return
        if not text:
            return
        reply(text)


def predict(
    model: Model,
    data: Annotated[str, typer.Option("--data", "-d", help="The rows to answer.")],
    output: Output,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    batch_size: Annotated[int, typer.Option(help="Rows answered at once.", min=1)] = 16,
    max_rows: Annotated[int | None, typer.Option(help="Answer only the first so many.")] = None,
) -> None:
    """Answer every row of a file.

    Example: strop predict run --data test.jsonl -o answers.jsonl
    """
    from strop.app.console import ConsoleReporter
    from strop.recipes.generate import predict as run

    path = run(
        model,
        data,
        output,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_rows=max_rows,
        reporter=ConsoleReporter(),
    )
    print(f"answers: {path}")


# --- demo -------------------------------------------------------------------------------------------------------------


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where data, models and the page go.")] = Path(
        "strop-demo"
    ),
    seed: Annotated[int, typer.Option(help="Of data order and adapters.")] = 0,
) -> None:
    """The whole way on the bundled model and data, in minutes, on a plain CPU, offline.

    Example: strop demo -o strop-demo
    """
    from strop.app.console import ConsoleReporter
    from strop.recipes.demo import demo as run

    result = run(output, seed=seed, reporter=ConsoleReporter())
    for line in result.lines():
        print(line)
