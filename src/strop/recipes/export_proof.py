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
from dataclasses import replace
from typing import Final

from strop.errors import GateError
from strop.progress import SILENT, Reporter
from strop.recipes.proof_measure import Measured
from strop.recipes.proof_result import Agreement, Answer, ExportProof
from strop.recipes.rows import Rows
from strop.scratch import Scratch

SECONDS: Final = 100.0
"""What a proof may take where nothing else is said."""


def prove_export(
    file: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    name: str | None = None,
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
        name: What the file is called in messages and records, where that is not its path.
        base: What it was tuned from, where that is not the adapter's base; by default what the run records.
        data: Rows to ask with, which trained nothing; by default those the run was validated on, or built-in prompts.
        max_kl: Most nats per token against the trained model, in the place of the type's own gate.
        seconds: What the proof may take, about.
        reporter: Told what happens.

    Raises:
        GateError: Something lies past its gate; all of it is listed with figures.
        As `measure_export`.
    """
    proof = measure_export(
        file, source, name=name, base=base, data=data, max_kl=max_kl, seconds=seconds, reporter=reporter
    )
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
    name: str | None = None,
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
    run = Measured(file, source, base=base, data=data, seconds=seconds)
    reporter.start("prove the file in llama.cpp", len(run.steps), "steps")
    try:
        with Scratch() as scratch, run.model:
            for done, step in enumerate(run.steps, start=1):
                step(scratch)
                reporter.advance(done)
    finally:
        reporter.finish()
    proof = run.proof(max_kl)
    return proof if name is None else replace(proof, file=name)


__all__ = ["Agreement", "Answer", "ExportProof", "measure_export", "prove_export"]
