"""What a run on a CPU really holds, in a process of its own, against what its manifest foresaw."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from tests.fresh import in_fresh_process
from tests.tiny import tiny_config
from transformers import CohereConfig, FalconH1Config, Gemma2Config, GraniteConfig

from strop.planner.memory import MemoryPlan, Step, plan_memory
from strop.planner.parameters import read_shape
from strop.planner.process import PRODUCT_BYTES, PRODUCTS_KEPT, SESSION_BYTES

CPU = {"device": "cpu", "attention": "plain"}


def figures_of_a_run(method: str) -> tuple[int, int]:
    """Predicted and measured bytes of a short run of the bundled model on its task."""
    import transformers  # noqa: F401  # memory counts from after the imports

    import strop
    from strop.demo.task import write
    from strop.files.folders import read_json

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "data", rows={"train": 96, "valid": 16})
        run = strop.tune(
            "demo", Path(folder) / "data", method=method, output=Path(folder) / "run", max_steps=6, batch_size=8,
            max_length=256,
        )  # fmt: skip
        memory = read_json(run.path / "manifest.json")["memory"]
        return memory["predicted_bytes"], memory["measured_bytes"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_memory_of_a_run_of_the_bundled_model_is_foreseen_to_a_quarter(method: str) -> None:
    predicted, measured = in_fresh_process(figures_of_a_run, method)
    assert measured > 50 << 20
    assert predicted == pytest.approx(measured, rel=0.25)


def parts(method: Any = "full", **step: Any) -> dict[str, int]:
    return plan_memory(read_shape(tiny_config("llama")), method, Step(**(CPU | step))).to_dict()


def test_an_accelerator_counts_nothing_of_the_process() -> None:
    step = parts(device="accelerator")
    assert (step["session_bytes"], step["products_bytes"], step["allocator_bytes"]) == (0, 0, 0)
    assert parts()["session_bytes"] == SESSION_BYTES


def test_every_shape_of_batch_compiles_the_products_of_every_shape_of_layer() -> None:
    # A tiny llama has linear layers of 64 to 64, 32 and 128, and of 128 to 64; the head; attention's two, of whose
    # four gradients two are products that oneDNN has already (its own log of a run: 4 for every shape of batch).
    assert parts()["products_bytes"] == PRODUCT_BYTES * (3 * 5 + 4)
    assert parts(shapes=3)["products_bytes"] == 3 * parts()["products_bytes"]
    assert parts(eval_shapes=2)["products_bytes"] - parts()["products_bytes"] == 2 * PRODUCT_BYTES * (5 + 2)
    assert parts("lora", attention="fused")["products_bytes"] == PRODUCT_BYTES * (2 * 5 + 3 * (2 + 3))
    assert parts("lora", attention="block")["products_bytes"] == PRODUCT_BYTES * (2 * 5 + 4 * 6 + 3)
    assert parts(shapes=10**6)["products_bytes"] == PRODUCT_BYTES * PRODUCTS_KEPT
    assert parts(dtype="float32")["products_bytes"] == 0


def test_the_allocator_keeps_pieces_of_small_tensors_only_and_none_where_it_is_steady() -> None:
    small = parts(dtype="float32")
    assert 0 < small["allocator_bytes"] < small["activations_bytes"]
    assert parts(dtype="float32", steady=True)["allocator_bytes"] == 0
    assert parts(dtype="float32", rows=2**16, length=256)["allocator_bytes"] == 0


def test_a_trial_keeps_a_copy_of_what_is_trained() -> None:
    tried = parts(tried=True)
    assert tried["trial_bytes"] == 4 * tried["trainable_parameters"]
    assert tried["peak_bytes"] - parts()["peak_bytes"] == tried["trial_bytes"]


@pytest.mark.parametrize("attention", ["plain", "block"])
def test_every_block_recomputed_saves_but_the_last_whose_activations_are_needed_at_once(attention: str) -> None:
    shape = read_shape(tiny_config("llama", num_hidden_layers=4))

    def plan(blocks: int) -> MemoryPlan:
        return plan_memory(
            shape, "full", Step(**(CPU | {"attention": attention}), checkpointing=True, recomputed=blocks)
        )

    plans = [plan(blocks) for blocks in range(5)]
    kept = [made.activations_bytes for made in plans]
    assert [kept[0] - some for some in kept] == [blocks * (kept[0] - kept[4]) // 4 for blocks in range(5)]
    held = [made.activations_bytes + made.block_backward_bytes for made in plans]
    one_input = held[4] - held[3]
    assert [held[blocks] - held[blocks + 1] for blocks in range(3)] == [kept[0] - kept[1]] * 3
    assert one_input == plans[0].step.tokens * 4 * shape.hidden_size


SIZES = {
    "vocab_size": 304, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "whole"),
    [
        (Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=30.0), False),
        (CohereConfig(**SIZES, logit_scale=0.0625), False),
        (GraniteConfig(**SIZES, logits_scaling=8.0), False),
        (FalconH1Config(**SIZES, lm_head_multiplier=0.04, mamba_n_heads=4, mamba_d_ssm=64, mamba_d_head=16), True),
    ],
    ids=["soft cap", "scale", "divisor", "multiplier"],
)
def test_only_what_the_loss_cannot_compute_in_pieces_counts_as_whole_logits(config: Any, whole: bool) -> None:
    assert read_shape(config).whole_logits == whole
