"""Makes the bundled model again: `python -m strop.demo.pretrain --steps N --seed 0 -o DIR`.

Writes the text (`text.py`), learns the tokenizer from it, packs rows, and trains the Llama of `network.py` from
random weights in one learning-rate cycle: a short warm-up, a constant rate, and a linear decay over the last 30% of
the steps. Weights, moments and updates are fp32; each step computes in a bf16 copy. Rows are 128 tokens long until
the last 15% of the steps, then 256. The blocks' matrices are trained with Muon (momentum whose singular values are
set to one: Jordan et al. 2024), embeddings and norms with AdamW.

`--minutes` chooses the steps from the machine's measured speed; only `--steps` gives the same run again. A checkpoint
is written every `--save-steps` steps, and the same command continues from it; until the decay begins, `--steps` may
be changed on the way, and the run is the one that would have come with that number from the start. Loss and time go
to `log.jsonl` in the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from strop.demo import network, packing, text, tokenizer
from strop.errors import TrainingError

logger = logging.getLogger(__name__)

VOCABULARY = 1536
TOKENS_PER_STEP = 8192
SHORT, LONG = 128, 256
LONG_SHARE = 0.15
TOKENIZER_DOCUMENTS = 60_000
CHUNK_STEPS = 128
SAMPLE_DOCUMENTS = 2_000
CHUNK_DOCUMENTS = 18_800  # fill the rows of 128 steps with some left over
LONG_SEED = 500_000
MATRIX_RATE, OTHER_RATE = 0.02, 3e-3
WARMUP_STEPS = 50
DECAY_SHARE = 0.3


class Optimizer:
    """Muon for the blocks' matrices, AdamW for embeddings and norms, over fp32 master weights.

    Muon (Jordan et al. 2024): momentum m = 0.95 m + g; update = orthogonal(0.95 m + g) * sqrt(max(1, rows / columns)),
    where `orthogonal` brings every singular value near one by five Newton-Schulz steps. Decoupled weight decay of
    0.1. Matrices of one shape are stacked, so that a step is a few batched products.
    """

    def __init__(self, master: dict[str, Tensor]) -> None:
        self.master = master
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, weight in master.items():
            if weight.ndim == 2 and "embed" not in name:
                shapes.setdefault(tuple(weight.shape), []).append(name)
        self.stacks = list(shapes.values())
        self.matrices = {name for stack in self.stacks for name in stack}
        self.first = {name: torch.zeros_like(weight) for name, weight in master.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in master.items() if name not in self.matrices}

    def step(self, gradients: dict[str, Tensor], *, step: int, scale: float) -> None:
        """One update with every learning rate multiplied by `scale`; `step` counts from 1."""
        for stack in self.stacks:
            gradient = torch.stack([gradients[name].float() for name in stack])
            momentum = torch.stack([self.first[name] for name in stack]).mul_(0.95).add_(gradient)
            update = orthogonal(gradient.add(momentum, alpha=0.95)).float()
            rows, columns = update.shape[1:]
            rate = MATRIX_RATE * scale
            for name, moment, direction in zip(stack, momentum, update, strict=True):
                self.first[name].copy_(moment)
                self.master[name].mul_(1 - 0.1 * rate).add_(
                    direction, alpha=-rate * math.sqrt(max(1.0, rows / columns))
                )
        for name, second in self.second.items():
            gradient = gradients[name].float()
            first = self.first[name].lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.02)
            corrected = (second / (1 - 0.98**step)).sqrt_().add_(1e-8)
            self.master[name].addcdiv_(first, corrected, value=-OTHER_RATE * scale / (1 - 0.9**step))

    def state(self) -> dict[str, Tensor]:
        """All tensors that a checkpoint needs, by prefixed name."""
        parts = {"master": self.master, "first": self.first, "second": self.second}
        return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def orthogonal(matrices: Tensor) -> Tensor:
    """Roughly the nearest (semi-)orthogonal matrices, [n, rows, columns]: five Newton-Schulz steps of Muon, in bf16."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


def loss(weights: network.Parameters, tokens: Tensor, wanted: Tensor) -> Tensor:
    """Weighted mean cross-entropy of the next token; `tokens` and its weights `wanted` are [rows, length]."""
    predicted = network.logits(
        weights, tokens[:, :-1], shape=network.config(weights["model.embed_tokens.weight"].shape[0])
    )
    each = F.cross_entropy(predicted.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return (each * wanted[:, 1:].flatten()).sum() / wanted[:, 1:].sum()


def learning_rate_scale(step: int, steps: int) -> float:
    """Linear warm-up over 50 steps, constant, linear to a hundredth over the last 30%."""
    return min(1.0, step / WARMUP_STEPS, 0.01 + 0.99 * (steps - step) / (DECAY_SHARE * steps))


def learn_tokenizer(*, seed: int) -> Tokenizer:
    """The tokenizer of the run's first documents."""
    stream = text.documents(seed=seed, count=TOKENIZER_DOCUMENTS)
    return tokenizer.train((piece for document in stream for _, piece in document), vocab_size=VOCABULARY)


def chunk(learnt: Tokenizer, *, seed: int, index: int, length: int) -> tuple[Tensor, Tensor]:
    """The shuffled rows of 128 steps: tokens and loss weights, each [steps, rows, length]."""
    chunk_seed = _chunk_seed(seed, index, LONG_SEED if length == LONG else 0)
    written = list(text.documents(seed=chunk_seed, count=CHUNK_DOCUMENTS))
    tokens, weights = packing.pack(learnt, written, length=length)
    per_step = TOKENS_PER_STEP // length
    if len(tokens) < CHUNK_STEPS * per_step:
        raise TrainingError(f"chunk {index}: {len(tokens)} rows of {length} tokens, {CHUNK_STEPS * per_step} needed")
    order = np.random.Generator(np.random.PCG64(chunk_seed)).permutation(len(tokens))[: CHUNK_STEPS * per_step]
    shape = (CHUNK_STEPS, per_step, length)
    return torch.from_numpy(tokens[order]).view(shape), torch.from_numpy(weights[order]).view(shape)


def provenance(learnt: Tokenizer, *, steps: int, seed: int) -> dict[str, str | int | float]:
    """What pins a run: versions, seed, lengths, and the SHA-256 of the tokenizer, the text and its beginning."""
    long_steps = round(LONG_SHARE * steps)
    whole = hashlib.sha256()
    for steps_of, offset in ((steps - long_steps, 0), (long_steps, LONG_SEED)):
        for index in range(math.ceil(steps_of / CHUNK_STEPS)):
            stream = text.documents(seed=_chunk_seed(seed, index, offset), count=CHUNK_DOCUMENTS)
            whole.update(text.text_hash(stream).encode())
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "tokenizers": version("tokenizers"),
        "seed": seed,
        "steps": steps,
        "tokens": steps * TOKENS_PER_STEP,
        "tokenizer_sha256": hashlib.sha256(learnt.to_str().encode()).hexdigest(),
        "text_sha256": whole.hexdigest(),
        "sample_documents": SAMPLE_DOCUMENTS,
        "sample_sha256": text.text_hash(text.documents(seed=seed, count=SAMPLE_DOCUMENTS)),
    }


def _chunk_seed(seed: int, index: int, offset: int) -> int:
    return 1_000_003 * seed + index + offset


def batches(learnt: Tokenizer, *, steps: int, seed: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and loss weights of steps start + 1 to `steps`; `steps` decides only where the long rows begin."""
    short_steps = steps - round(LONG_SHARE * steps)
    held: tuple[int, int] | None = None
    tokens = weights = torch.empty(0)
    for step in range(start, steps):
        length, at = (SHORT, step) if step < short_steps else (LONG, step - short_steps)
        if held != (length, at // CHUNK_STEPS):
            held = (length, at // CHUNK_STEPS)
            tokens, weights = chunk(learnt, seed=seed, index=held[1], length=length)
        yield tokens[at % CHUNK_STEPS].long(), weights[at % CHUNK_STEPS].float()


def save_model(folder: Path, master: dict[str, Tensor], learnt: Tokenizer) -> None:
    """The transformers folder: bf16 weights, configuration, tokenizer with its chat template."""
    model = network.initial_model(vocab_size=VOCABULARY, seed=0)
    model.load_state_dict(master, strict=False)
    model.tie_weights()
    model.bfloat16().save_pretrained(folder)
    tokenizer.save(learnt, folder, max_length=model.config.max_position_embeddings)


def pretrain(
    folder: Path, *, steps: int | None, minutes: float | None, seed: int, save_steps: int, use_compile: bool
) -> Path:
    """Train and write the model to `folder/model`; continues from `folder/checkpoint.safetensors` where one stands."""
    folder.mkdir(parents=True, exist_ok=True)
    model = network.initial_model(vocab_size=VOCABULARY, seed=seed)
    master = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    compute = torch.compile(loss, dynamic=False) if use_compile else loss
    if steps is None:
        steps = max(50, int((minutes or 60.0) * 60 / _seconds_per_step(master)))
        logger.info("%d steps for %.1f minutes", steps, minutes or 60.0)
    kept = folder / "learnt-tokenizer.json"
    if not kept.exists():
        learn_tokenizer(seed=seed).save(str(kept))
    learnt = Tokenizer.from_file(str(kept))
    optimizer = Optimizer(master)
    checkpoint, start, spent_before = folder / "checkpoint.safetensors", 0, 0.0
    if checkpoint.exists():
        state = load_file(checkpoint)
        start, spent_before = int(state.pop("step")), float(state.pop("seconds"))
        for name, tensor in optimizer.state().items():
            tensor.copy_(state[name])
    shadow = {name: weight.bfloat16().requires_grad_() for name, weight in master.items()}
    began, mean_loss = time.monotonic(), float("nan")
    for step, (tokens, wanted) in enumerate(batches(learnt, steps=steps, seed=seed, start=start), start + 1):
        with torch.no_grad():
            for name, weight in shadow.items():
                weight.copy_(master[name])
                weight.grad = None
        value = compute(shadow, tokens, wanted)
        value.backward()
        with torch.no_grad():
            gradients = {name: weight.grad for name, weight in shadow.items() if weight.grad is not None}
            optimizer.step(gradients, step=step, scale=learning_rate_scale(step, steps))
        now = value.item()
        mean_loss = now if math.isnan(mean_loss) else 0.98 * mean_loss + 0.02 * now
        seconds = spent_before + time.monotonic() - began
        if step % 25 == 0 or step == steps:
            with (folder / "log.jsonl").open("a") as log:
                line = {"step": step, "of": steps, "loss": round(mean_loss, 4), "seconds": round(seconds, 1)}
                log.write(json.dumps(line) + "\n")
        if step % save_steps == 0 or step == steps:
            counters = {"step": torch.tensor(step), "seconds": torch.tensor(seconds)}
            save_file({**optimizer.state(), **counters}, folder / "checkpoint.tmp")
            os.replace(folder / "checkpoint.tmp", checkpoint)
            save_model(folder / "model", master, learnt)
    made = provenance(learnt, steps=steps, seed=seed)
    made |= {"final_loss": round(mean_loss, 4), "minutes": round((spent_before + time.monotonic() - began) / 60, 1)}
    made["weights_sha256"] = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
    (folder / "provenance.json").write_text(json.dumps(made, indent=2) + "\n")
    return folder / "model"


def _seconds_per_step(master: dict[str, Tensor]) -> float:
    """The time of a plain step of short rows, the middle of three."""
    weights = {name: weight.bfloat16().requires_grad_() for name, weight in master.items()}
    tokens = torch.zeros(TOKENS_PER_STEP // SHORT, SHORT, dtype=torch.long)
    taken: list[float] = []
    for _ in range(4):
        began = time.monotonic()
        loss(weights, tokens, torch.ones(tokens.shape)).backward()
        taken.append(time.monotonic() - began)
    return 1.1 * sorted(taken[1:])[1]


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimizer steps of 4096 tokens")
    length.add_argument("--minutes", type=float, help="choose the steps from this machine's speed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--save-steps", type=int, default=200)
    parser.add_argument("--no-compile", action="store_true", help="plain torch, where no C++ compiler is found")
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(chosen.threads)
    use_compile = not chosen.no_compile and any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++"))
    pretrain(
        chosen.output,
        steps=chosen.steps,
        minutes=chosen.minutes,
        seed=chosen.seed,
        save_steps=chosen.save_steps,
        use_compile=use_compile,
    )


if __name__ == "__main__":
    main()
