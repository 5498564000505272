"""`tune` through the quantizer: what is stored and exported is what was trained, code by code, in each of its ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import strop
from strop.errors import ConfigError, FormatError, ModelError, UsageError
from strop.files.gguf.reader import GgufFile
from strop.files.gguf.transcoding import from_raw
from strop.files.peft_adapter import read_adapter_config
from strop.layers.lora_linear import LoraLinear
from strop.layers.quant_linear import QuantLinear
from strop.layers.surgery import lora_modules
from strop.numerics.qtensor import QuantizedTensor, quantize_tensor
from strop.numerics.scheme import parse_format
from strop.recipes.merge import merge
from strop.recipes.quantize import quantize
from strop.training.checkpoints import newest_checkpoint
from tests.recipes.helpers import Notes, short, tensors
from tests.tiny import tiny_folder

GRIDS = ["int8", "int4", "int4-g32", "int3-g32", "int2-g32", "nf4", "gguf:q4_0", "gguf:q8_0", "mxfp4"]
NAMES = {"q_proj": "attn_q", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def _quantized(folder: Path) -> dict[str, QuantizedTensor]:
    model = strop.load(folder, tokenizer=False).model
    return {name: module.qtensor for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def _equal(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k].float(), theirs[k].float()) for k in mine)


def _latent(run: strop.recipes.tune.Run) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(run.path / "checkpoints")[0]
    assert checkpoint is not None
    return dict(checkpoint.weights)


def _moved(one: dict[str, QuantizedTensor], other: dict[str, QuantizedTensor]) -> dict[str, float]:
    return {name: float((one[name].stored_codes() != other[name].stored_codes()).double().mean()) for name in one}


# --- one grid from training to the file -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["qat", "qat-lora"])
@pytest.mark.parametrize("format", GRIDS)
def test_trained_converted_reopened_and_exported_codes_are_the_same(base, data, tmp_path, format, method):
    run = short(base, data, tmp_path / "run", method=method, format=format, save_steps=3, learning_rate=1e-2)
    scheme, latent = parse_format(format).scheme, _latent(run)
    dense = {name: module for name, module in strop.load(base, dtype=torch.float32).model.named_modules()}
    reopened = _quantized(run.last_path)
    assert len(reopened) == 14
    for name, stored in reopened.items():
        if method == "qat":
            weight = latent[f"{name}.weight"]
        else:
            change = latent[f"{name}.adapter.lora_B"] @ latent[f"{name}.adapter.lora_A"] * 2.0
            weight = dense[name].weight.detach() + change
        assert _equal(stored, quantize_tensor(weight, scheme)), name
    if format.startswith("gguf:"):
        file = tmp_path / "model.gguf"
        run.export(file, verify=False)
        exported = GgufFile.open(file)
        types = {
            info.type for name, info in exported.tensors.items() if name.startswith("blk.") and len(info.shape) == 2
        }
        assert types == {format.removeprefix("gguf:")}
        for ours, theirs in NAMES.items():
            name = f"model.layers.1.{'self_attn' if ours == 'q_proj' else 'mlp'}.{ours}"
            got = from_raw(exported.raw(f"blk.1.{theirs}.weight"), format.removeprefix("gguf:"), reopened[name].shape)
            if ours != "q_proj":  # whose rows stand in another order there
                assert _equal(got, reopened[name]), name
            else:
                assert torch.equal(got.stored_codes().sort(0).values, reopened[name].stored_codes().sort(0).values)
        assert exported.tensors["token_embd.weight"].type == "f16"


def test_the_file_of_a_trained_grid_takes_another_type_for_its_embedding_where_asked(base, data, tmp_path):
    run = short(base, data, tmp_path / "run", method="qat", format="gguf:q8_0", max_steps=1)
    run.export(tmp_path / "a.gguf", verify=False, embeddings="q8_0")
    assert GgufFile.open(tmp_path / "a.gguf").tensors["token_embd.weight"].type == "q8_0"
    with pytest.raises(FormatError, match="q8_0"):
        run.export(tmp_path / "b.gguf", verify=False, embeddings="q80")
    with pytest.raises(UsageError, match="quantizer"):
        run.export(tmp_path / "b.gguf", verify=False, format="gguf:q3_k_m", embeddings="q8_0")


# --- an adapter through the rounding ----------------------------------------------------------------------------------


def test_the_adapter_alone_is_marked_and_merges_to_the_very_codes(base, data, tmp_path):
    run = short(base, data, tmp_path / "run", method="qat-lora", format="int4-g32", rank=4, learning_rate=1e-2)
    adapter = run.last_path / "adapter"
    assert read_adapter_config(adapter).merge_only
    with pytest.raises(ModelError, match="merge"):
        strop.load(adapter)
    merge(adapter, tmp_path / "merged", format="int4-g32", force=True)
    merged, trained = _quantized(tmp_path / "merged"), _quantized(run.last_path)
    assert all(_equal(merged[name], trained[name]) for name in trained)


def test_the_merged_model_scores_what_training_measured(base, data, tmp_path):
    from strop.data.records import read_data
    from strop.data.samples import prepare
    from strop.evaluation.likelihood import likelihood

    run = short(base, data, tmp_path / "run", method="qat-lora", format="int3-g32", max_steps=6, learning_rate=1e-2)
    opened = strop.load(run.last_path, dtype=torch.float32)
    valid = prepare(read_data(data, seed=0, valid_fraction=0.05).valid, opened.require_tokenizer(), max_length=256)
    assert likelihood(opened.model, valid.samples).mean_nll == pytest.approx(
        run.report["result"]["valid_loss"], rel=5e-3
    )


@pytest.mark.parametrize("hold", ["bf16", "int8", "codes", "zero-points"])
def test_each_way_of_holding_the_base_learns_and_moves_what_it_may(base, data, tmp_path, hold):
    format = "int4-g32-asym" if hold == "zero-points" else "int4-g32"
    share = {} if hold in ("bf16", "int8") else {"max_moved": 0.2 if hold == "codes" else 0.5}
    settings = {"format": format, "hold": hold, "rank": 4, "max_steps": 12, "learning_rate": 3e-2, **share}
    run = short(base, data, tmp_path / "run", method="qat-lora", **settings)
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    before = {
        name: module.qtensor
        for name, module in strop.load(base, format=format).model.named_modules()
        if isinstance(module, QuantLinear)
    }
    after = _quantized(run.last_path)
    moved = _moved(before, after)
    if hold == "codes":
        assert 0.1 < max(moved.values()) <= 0.2
        assert all(torch.equal(after[name].scales(), before[name].scales()) for name in after)
    elif hold == "zero-points":
        assert max(moved.values()) == 0
        zeros = [(after[name].zero_point != before[name].zero_point).double().mean() for name in after]
        assert 0.2 < max(zeros) <= 0.5
    else:
        assert max(moved.values()) > 0


def test_a_base_that_is_quantized_already_is_held_as_its_codes_alone(base, data, tmp_path):
    quantize(base, "int4-g32", output=tmp_path / "quantized")
    run = short(tmp_path / "quantized", data, tmp_path / "run", method="qat-lora", format="int4-g32", hold="codes")
    before, after = _quantized(tmp_path / "quantized"), _quantized(run.last_path)
    assert all(torch.equal(after[name].scales(), before[name].scales()) for name in after)
    with pytest.raises(UsageError, match="hold: codes"):
        short(tmp_path / "quantized", data, tmp_path / "other", method="qat-lora", format="int4-g32")
    with pytest.raises(FormatError, match="held as int4-g32"):
        short(tmp_path / "quantized", data, tmp_path / "third", method="qat-lora", format="int3-g32", hold="codes")


# --- scales, starts and parts -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "int3"
    quantize(base, "int3-g32", output=folder, method="gptq")
    return folder


@pytest.mark.parametrize("scales", ["learned", "fixed"])
def test_training_begins_at_the_start_that_is_named(base, data, tmp_path, start, scales):
    settings = {"method": "qat", "format": "int3-g32", "start": str(start), "scales": scales}
    still = short(base, data, tmp_path / "still", max_steps=1, learning_rate=1e-12, scale_rate=1e-12, **settings)
    begun, wanted = _quantized(still.last_path), _quantized(start)
    assert all(_equal(begun[name], wanted[name]) for name in wanted)
    run = short(base, data, tmp_path / "run", max_steps=8, learning_rate=1e-2, scale_rate=1e-2, **settings)
    after = _quantized(run.last_path)
    assert max(_moved(wanted, after).values()) > 0
    kept = [torch.equal(after[name].scales(), wanted[name].scales()) for name in wanted]
    assert all(kept) if scales == "fixed" else not any(kept)


def test_scales_alone_leave_every_code_and_every_other_weight(base, data, tmp_path, start):
    run = short(base, data, tmp_path / "run", method="qat", format="int3-g32", start=str(start), train="scales",
                max_steps=8, scale_rate=1e-2)  # fmt: skip
    before, after = _quantized(start), _quantized(run.last_path)
    assert max(_moved(before, after).values()) == 0
    assert not any(torch.equal(after[name].scales(), before[name].scales()) for name in before)
    old, new = tensors(base), tensors(run.last_path)
    assert torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
    assert run.report["parameters"]["share"] < 0.2
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]


def test_the_last_blocks_alone_are_trained_and_the_others_stand_as_their_codes(base, data, tmp_path):
    run = short(base, data, tmp_path / "run", method="qat", format="int2-g32", train="last:1", max_steps=8,
                learning_rate=1e-2)  # fmt: skip
    plain = {
        name: module.qtensor
        for name, module in strop.load(base, format="int2-g32").model.named_modules()
        if isinstance(module, QuantLinear)
    }
    moved = _moved(plain, _quantized(run.last_path))
    assert all(share == 0 for name, share in moved.items() if ".layers.0." in name)
    assert max(share for name, share in moved.items() if ".layers.1." in name) > 0


@pytest.mark.parametrize("share", ["2%", 0.02])
def test_no_more_codes_move_than_may(base, data, tmp_path, share):
    run = short(base, data, tmp_path / "run", method="qat", format="gguf:q4_0", max_moved=share, max_steps=10,
                learning_rate=1e-2)  # fmt: skip
    assert run.config.method.max_moved == 0.02
    still = short(base, data, tmp_path / "still", method="qat", format="gguf:q4_0", max_moved=share, max_steps=1,
                  learning_rate=1e-12)  # fmt: skip
    moved = _moved(_quantized(still.last_path), _quantized(run.last_path))
    assert 0 < max(moved.values()) <= 0.02
    old, new = tensors(still.last_path), tensors(run.last_path)
    assert torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
    assert all(torch.equal(old[name], new[name]) for name in old if name.endswith("weight_scale"))


@pytest.mark.parametrize("activations", ["int8", "q8_0"])
def test_rounded_inputs_change_the_training(base, data, tmp_path, activations):
    settings = {"method": "qat", "format": "int4-g32", "max_steps": 2}
    plain = short(base, data, tmp_path / "plain", **settings)
    rounded = short(base, data, tmp_path / "rounded", activations=activations, **settings)
    assert rounded.metrics[0]["loss"] != plain.metrics[0]["loss"]
    assert rounded.metrics[0]["loss"] == pytest.approx(plain.metrics[0]["loss"], rel=0.02)


def test_a_delayed_start_trains_unrounded_first(base, data, tmp_path):
    settings = {"format": "int2-g32", "max_steps": 4}
    full = short(base, data, tmp_path / "full", method="full", max_steps=4, learning_rate=1e-3)
    run = short(base, data, tmp_path / "run", method="qat", delay="50%", learning_rate=1e-3, **settings)
    losses = [[row["loss"] for row in one.metrics] for one in (full, run)]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2] != losses[1][2]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"format": "int3-g48"}, FormatError, "48"),
        ({"train": "last:9"}, UsageError, "2 blocks"),
        ({"train": "first:1"}, ConfigError, "train"),
        ({"scales": "learned", "format": "nf4-dq"}, FormatError, "codes themselves"),
        ({"scales": "learned", "format": "mxfp4"}, FormatError, "codes themselves"),
        ({"scales": "learned", "max_moved": 0.1}, ConfigError, "max_moved keeps"),
        ({"train": "scales", "delay": 0.5, "scales": "fixed"}, ConfigError, "delay means nothing"),
        ({"delay": 0.7, "freeze": 0.7}, ConfigError, "more than the run"),
        ({"max_moved": "200%"}, ConfigError, "max_moved"),
        ({"activations": "int4"}, ConfigError, "activations"),
        ({"format": "int8-a8"}, FormatError, "activations"),
        ({"format": "gguf:q5_x"}, FormatError, "nearest"),
        ({"method": "qat-lora", "dropout": 0.1}, ConfigError, "dropout"),
        ({"method": "qat-lora", "hold": "zero-points"}, FormatError, "no zero points"),
        ({"method": "qat-lora", "rank": "auto"}, ConfigError, "rank"),
    ],
)
def test_what_cannot_be_is_refused_before_training(base, data, tmp_path, settings, error, said):
    with pytest.raises(error, match=said):
        short(base, data, tmp_path / "run", **({"method": "qat", "format": "int3-g32"} | settings))
    assert not (tmp_path / "run").exists()


def test_a_start_of_another_format_or_model_is_refused(base, data, tmp_path, start):
    with pytest.raises(UsageError, match="as int3-g32, and the format is int4-g32"):
        short(base, data, tmp_path / "run", method="qat", format="int4-g32", start=str(start))
    with pytest.raises(UsageError, match="holds no quantized layer"):
        short(base, data, tmp_path / "run", method="qat", format="int3-g32", start=str(base))


def test_an_adapter_as_the_base_is_refused(base, data, tmp_path):
    first = short(base, data, tmp_path / "first", method="lora", max_steps=1)
    with pytest.raises(UsageError, match="merge it first"):
        short(first.path, data, tmp_path / "run", method="qat-lora", format="int4-g32")


def test_a_resumed_run_with_other_phases_is_refused(base, data, tmp_path):
    class Stop(BaseException):
        pass

    def stop(step: int) -> None:
        if step == 2:
            raise Stop

    settings = {"method": "qat", "format": "int3-g32", "save_steps": 1, "delay": 0.5, "max_steps": 4}
    with pytest.raises(Stop):
        short(base, data, tmp_path / "run", reporter=Notes(stop), **settings)
    with pytest.raises(ConfigError, match="delay"):
        short(base, data, tmp_path / "run", resume=True, **(settings | {"delay": 0.25}))
    short(base, data, tmp_path / "run", resume=True, **settings)


def test_layers_stay_lora_in_the_saved_adapter_and_in_no_model(base, data, tmp_path):
    run = short(base, data, tmp_path / "run", method="qat-lora", format="int4-g32", max_steps=1)
    model = strop.load(run.path).model
    assert not lora_modules(model)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


# --- a grid that only a GGUF file holds -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose rows are whole superblocks."""
    return tiny_folder(
        tmp_path_factory.mktemp("wide"), "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        head_dim=64, dtype=torch.bfloat16,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["qat", "qat-lora"])
def test_superblocks_are_trained_and_the_run_holds_the_file_itself(wide, data, tmp_path, method):
    run = short(wide, data, tmp_path / "run", method=method, format="gguf:q4_k", max_steps=4, save_steps=4,
                learning_rate=1e-2)  # fmt: skip
    file = run.last_path / "model.gguf"
    reopened = _quantized(run.last_path)
    assert len(reopened) == 14
    dense = dict(strop.load(wide, dtype=torch.float32).model.named_modules())
    latent, scheme = _latent(run), parse_format("gguf:q4_k").scheme
    for name, stored in reopened.items():
        if method == "qat":
            weight = latent[f"{name}.weight"]
        else:
            weight = (
                dense[name].weight.detach() + latent[f"{name}.adapter.lora_B"] @ latent[f"{name}.adapter.lora_A"] * 2.0
            )
        assert _equal(stored, quantize_tensor(weight, scheme)), name
    assert GgufFile.open(file).tensors["token_embd.weight"].type == "f16"
    run.export(tmp_path / "model.gguf", verify=False)
    assert (tmp_path / "model.gguf").read_bytes() == (run.best_path / "model.gguf").read_bytes()
    assert (tmp_path / "model.gguf.json").is_file() or any(tmp_path.glob("model.gguf.*"))
    if method == "qat-lora":
        assert read_adapter_config(run.last_path / "adapter").merge_only
    with pytest.raises(UsageError, match=r"trained as gguf:q4_k"):
        run.export(tmp_path / "other.gguf", format="gguf:q8_0", verify=False)
    with pytest.raises(UsageError, match="leave targets out"):
        short(wide, data, tmp_path / "some", method=method, format="gguf:q4_k", targets="up_proj")
