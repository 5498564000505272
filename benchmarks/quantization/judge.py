"""How far dequantized models are from their reference on held-out windows.

    python benchmarks/quantization/judge.py REFERENCE WINDOWS SPLIT CANDIDATE...

REFERENCE is a dense Hugging Face folder, a CANDIDATE holds `model.safetensors` with the same names in fp32; both run in
fp32. Writes `SPLIT.json` into each candidate: KL(reference || candidate) in nats per token with its bootstrap interval
by document, its 99th percentile, top-1 agreement, perplexity, and the sums per document for paired comparisons. What
was judged on the split before is not judged again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from texts import read_windows
from transformers import AutoModelForCausalLM

from strop.data.templates import Sample
from strop.evaluation.divergence import Divergence, ReferenceLogits
from strop.evaluation.likelihood import Likelihood
from strop.evaluation.scoring import score
from strop.evaluation.statistics import bootstrap_mean
from strop.scratch import Scratch


def samples_of(windows: np.ndarray) -> list[Sample]:
    """Each window without its padding, all tokens but the first to be predicted."""
    rows = [window[window >= 0].tolist() for window in windows]
    return [Sample(row, [-100, *row[1:]], index) for index, row in enumerate(rows)]


def open_dense(folder: Path, weights: Path | None = None) -> Any:
    """The reference in fp32, with the tensors of `weights` in place of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if weights is not None:
        tensors = load_file(weights)
        names = set(model.state_dict()) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
        if set(tensors) != names:
            raise SystemExit(f"{weights}: tensors differ from the reference's: {sorted(set(tensors) ^ names)[:5]}")
        model.load_state_dict(tensors, strict=False)
    return model


def by_document(values: torch.Tensor, owners: np.ndarray) -> np.ndarray:
    """Sums per document, in the order of their numbers."""
    _, places = np.unique(owners, return_inverse=True)
    return np.bincount(places, weights=values.double().numpy())


def judge(folder: Path, windows: Path, split: str, candidates: Sequence[Path]) -> None:
    arrays = read_windows(windows)
    samples, owners = samples_of(arrays[split]), arrays[f"{split}_documents"]
    waiting = [candidate for candidate in candidates if not (candidate / f"{split}.json").exists()]
    if not waiting:
        return
    with contextlib.closing(Scratch()) as scratch:
        reference, own = ReferenceLogits(len(samples), scratch), Likelihood(len(samples))
        score(open_dense(folder), samples, [reference, own])
        if not bool(reference.rows_held.all()):
            raise SystemExit("the reference's logits do not fit the scratch file; use fewer windows")
        for candidate in waiting:
            divergence, likelihood = Divergence(reference), Likelihood(len(samples))
            score(open_dense(folder, candidate / "model.safetensors"), samples, [divergence, likelihood])
            sums, tokens = by_document(divergence.kl_sums, owners), by_document(divergence.tokens, owners)
            interval = bootstrap_mean(sums, tokens, seed=0, bounds=(0.0, float("inf")))
            figures = {
                "kl": divergence.mean_kl,
                "kl_low": interval.low,
                "kl_high": interval.high,
                "kl_99th": divergence.kl_99th,
                "top1_agreement": divergence.top1_agreement,
                "perplexity": likelihood.perplexity,
                "reference_perplexity": own.perplexity,
                "documents": len(tokens),
                "tokens": int(tokens.sum()),
                "kl_sums": sums.tolist(),
                "document_tokens": tokens.tolist(),
            }
            (candidate / f"{split}.json").write_text(json.dumps(figures) + "\n")
            print(
                f"{candidate.name}: {split} KL {figures['kl']:.5f}, agreement {figures['top1_agreement']:.4f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("split", choices=["development", "test"])
    parser.add_argument("candidates", type=Path, nargs="+")
    chosen = parser.parse_args()
    judge(chosen.reference, chosen.windows, chosen.split, chosen.candidates)


if __name__ == "__main__":
    main()
