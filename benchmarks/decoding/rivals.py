"""The ways to run a model that `run` compares: ours, and those of other libraries, over the same random weights.

A way is made when it is asked for, and imports its library then. All compute in bfloat16, with the head and the
embedding in 16 bits, but for llama.cpp, whose file has the types of its format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.generation import by_generate, by_our_loop, count
from transformers import AutoModelForCausalLM, PreTrainedModel

import strop
from strop.data.templates import Sample
from strop.evaluation.likelihood import likelihood
from strop.evaluation.writing import Manner

Prompts = Sequence[Sequence[int]]


@dataclass
class Way:
    """How a model is run; each call returns the tokens that it worked on, None where the way does not do that.

    Attributes:
        write: Prompts and new tokens of each -> tokens written.
        read: A prompt -> tokens read, up to the next token's logits.
        score: Texts -> tokens whose likelihood was taken.
    """

    write: Callable[[Prompts, int], int] | None = None
    read: Callable[[Sequence[int]], int] | None = None
    score: Callable[[Prompts], int] | None = None


def by_transformers(model: PreTrainedModel) -> Way:
    """Transformers' generate, and its own loss, a text at a time."""
    calls: Any = model

    def write(prompts: Prompts, new: int) -> int:
        return count(by_generate(model, prompts, Manner((), new, None, len(prompts))))

    @torch.inference_mode()
    def read(prompt: Sequence[int]) -> int:
        calls(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        return len(prompt)

    @torch.inference_mode()
    def score(texts: Prompts) -> int:
        for text in texts:
            ids = torch.tensor([text])
            assert torch.isfinite(calls(input_ids=ids, labels=ids, use_cache=False).loss)
        return sum(len(text) - 1 for text in texts)

    return Way(write, read, score)


def by_strop(model: PreTrainedModel) -> Way:
    """Our loop, and our likelihood."""

    def write(prompts: Prompts, new: int) -> int:
        return count(by_our_loop(model, prompts, Manner((), new, None, len(prompts))))

    def read(prompt: Sequence[int]) -> int:
        by_our_loop(model, [prompt], Manner((), 1, None, 1))
        return len(prompt)

    def score(texts: Prompts) -> int:
        samples = [Sample(list(text), [-100, *text[1:]]) for text in texts]
        return int(likelihood(model, samples).tokens.sum())

    return Way(write, read, score)


def plain(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def rounded(folder: Path, form: str) -> PreTrainedModel:
    """By `strop.quantize`, kept beside the folder."""
    made = folder.with_name(f"{folder.name}-{form}")
    if not made.exists():
        strop.quantize(str(folder), form, output=str(made))
    return strop.load(str(made)).model.eval()


def bitsandbytes(folder: Path) -> PreTrainedModel:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    return found.eval()


def torchao(folder: Path) -> PreTrainedModel:
    """Weights of 4 bits in groups of 128, its default, by the packing that its CPU kernels read."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = plain(folder)
    quantize_(
        model,
        PrototypeInt4WeightOnlyConfig(group_size=128),
        filter_fn=lambda module, name: isinstance(module, torch.nn.Linear) and "lm_head" not in name,
    )
    return model


def llama_cpp(folder: Path) -> Way:
    """A Q4_0 file, one text at a time."""
    from strop.runtime.llama_cpp import GgufModel

    file = folder.with_suffix(".gguf")
    if not file.exists():
        strop.export(str(folder), file, format="gguf:q4_0", verify=False)
    model = GgufModel.open(file, threads=torch.get_num_threads(), context=1024)

    def write(prompts: Prompts, new: int) -> int:
        return sum(len(list(model.stream(prompt, max_tokens=new, stop_ids=[]))) for prompt in prompts)

    def read(prompt: Sequence[int]) -> int:
        list(model.stream(prompt, max_tokens=1, stop_ids=[]))
        return len(prompt)

    return Way(write, read)


def ways(folder: Path, names: Sequence[str]) -> dict[str, Way]:
    """The ways of these names: `strop FORMAT`, `strop FORMAT by generate`, `transformers bf16`, and the libraries'."""
    models: dict[str, PreTrainedModel] = {}

    def held(form: str) -> PreTrainedModel:
        if form not in models:
            models[form] = plain(folder) if form == "bf16" else rounded(folder, form)
        return models[form]

    found: dict[str, Way] = {}
    for name in names:
        kind, _, rest = name.partition(" ")
        if kind == "strop":
            form, _, by = rest.partition(" ")
            found[name] = by_transformers(held(form)) if by else by_strop(held(form))
        elif kind == "transformers":
            found[name] = by_transformers(held(rest))
        elif kind == "bitsandbytes":
            found[name] = by_transformers(bitsandbytes(folder))
        elif kind == "torchao":
            found[name] = by_transformers(torchao(folder))
        else:
            found[name] = llama_cpp(folder)
    return found
