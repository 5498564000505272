"""The proof of an export: a faithful file passes in every type, and each way of being unfaithful fails with its figure.

The files are written by the `gguf` package (tests.runtime.files), not by our own writer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from strop.errors import FileFormatError, GateError
from strop.files.peft_adapter import BaseRecord, save_adapter
from strop.layers.surgery import attach_lora, lora_modules
from strop.models import load
from strop.recipes import proof_measure
from strop.recipes.export_proof import measure_export, prove_export
from strop.recipes.merge import merge
from strop.recipes.proof_logits import Effect, Gap
from strop.recipes.proof_tokens import random_texts
from tests.runtime.files import write_llama
from tests.tiny import CHAT_TEMPLATE, tiny_chat_file, tiny_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in `llama`, an adapter over it in `adapter`, and the two merged in `merged`."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    folder = tmp_path_factory.mktemp("proof")
    base = tiny_folder(folder, "llama", initializer_range=0.05)
    opened = load(base)
    generator = torch.Generator().manual_seed(1)
    attach_lora(opened.model, "all-linear", rank=4, alpha=8.0, generator=generator)
    for module in lora_modules(opened.model).values():
        module.lora_B.data.normal_(std=0.05, generator=generator)
    save_adapter(opened.model, folder / "adapter", base=BaseRecord(str(base)), tokenizer=opened.tokenizer)
    merge(folder / "adapter", folder / "merged")
    return folder


@pytest.fixture(autouse=True)
def short_answers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models write nonsense: a few tokens of it are enough."""
    if "material" not in request.fixturenames:
        monkeypatch.setattr(proof_measure, "ANSWER_TOKENS", 6)


@pytest.mark.parametrize(("kind", "most"), [("f32", 1e-9), ("f16", 5e-6), ("bf16", 2e-4), ("q8_0", 1e-3)])
def test_a_faithful_file_passes_at_its_types_own_gate(place: Path, kind: str, most: float):
    file = write_llama(place / "llama", place / f"base-{kind}.gguf", kind)
    proof = prove_export(file, place / "llama")
    assert proof.passed
    assert proof.codes is not None
    assert 0 <= proof.codes.kl <= most
    assert proof.trained.kl <= most == proof.trained.gate
    assert proof.types == (kind,)
    assert (proof.effect, proof.tokens.problems, proof.tokens.conversations) == (None, (), 3)
    assert len(proof.answers) == 3
    assert min(proof.speed.prefill.median, proof.speed.decode.median, proof.memory_bytes, proof.seconds) > 0
    if kind == "f32":
        assert all(answer.same == answer.tokens for answer in proof.answers)
    told = "\n".join(proof.lines())
    for word in ("proved in llama-cpp-python 0.", "nats per token", "3 conversations", "tokens/s", "MiB"):
        assert word in told
    assert json.loads(json.dumps(proof.to_dict()))["passed"] is True


def test_an_adapter_that_was_merged_passes_and_one_that_was_lost_fails(place: Path):
    whole = prove_export(write_llama(place / "merged", place / "merged.gguf"), place / "adapter")
    assert whole.effect == pytest.approx(1, abs=1e-4)
    assert whole.trained.kl < 1e-9
    lost = write_llama(place / "llama", place / "lost.gguf")
    with pytest.raises(GateError, match=r"-?0\.0\d+ of what tuning changed is in the file, at least 0\.999"):
        prove_export(lost, place / "adapter")


def test_a_lost_adapter_fails_where_no_gate_of_the_divergence_would_see_it(place: Path):
    lost = write_llama(place / "llama", place / "lost-q4_0.gguf", "q4_0")
    proof = measure_export(lost, place / "adapter")
    assert proof.trained.gate is None
    assert proof.effect is not None
    assert [problem for problem in proof.problems if "at least 0.95 is needed" in problem]
    assert any(line.startswith("past the gate") for line in proof.lines())
    kept = measure_export(write_llama(place / "merged", place / "kept-q4_0.gguf", "q4_0"), place / "adapter")
    assert kept.effect is not None
    assert kept.effect > 0.5 > proof.effect


def test_an_adapter_that_may_only_be_merged_is_held_against_the_sum_and_it_is_said(place: Path, tmp_path: Path):
    opened = load(place / "adapter")
    save_adapter(
        opened.model,
        tmp_path / "only",
        base=BaseRecord(str(place / "llama")),
        tokenizer=opened.tokenizer,
        merge_only=True,
    )
    proof = prove_export(write_llama(place / "merged", tmp_path / "merged.gguf"), tmp_path / "only")
    assert proof.effect == pytest.approx(1, abs=1e-4)
    assert any("trained to be merged" in note for note in proof.notes)


def test_an_adapter_that_was_merged_twice_fails(place: Path, tmp_path: Path):
    shutil.copytree(place / "adapter", tmp_path / "again")
    config = json.loads((tmp_path / "again/adapter_config.json").read_text())
    (tmp_path / "again/adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(place / "merged")})
    )
    merge(tmp_path / "again", tmp_path / "twice")
    proof = measure_export(write_llama(tmp_path / "twice", tmp_path / "twice.gguf"), place / "adapter")
    assert proof.effect is not None
    assert proof.effect > 1.3
    assert any("merged, once" in problem for problem in proof.problems)


def test_a_base_that_is_named_is_what_tuning_is_measured_from(place: Path):
    proof = measure_export(place / "merged.gguf", place / "merged", base=place / "llama")
    assert proof.effect == pytest.approx(1, abs=1e-6)
    same = measure_export(place / "base-f32.gguf", place / "llama", base=place / "llama")
    assert same.effect is None
    assert any("changed no logit" in note for note in same.notes)


def test_a_gate_can_be_asked_for_where_the_type_has_none(place: Path):
    file = write_llama(place / "llama", place / "base-q4_0.gguf", "q4_0")
    assert prove_export(file, place / "llama").trained.kl > 1e-3
    with pytest.raises(GateError, match=r"KL from the trained model: .* at most 0\.0001 is allowed"):
        prove_export(file, place / "llama", max_kl=1e-4)


def test_weights_in_the_wrong_order_fail(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.runtime.files._paired", lambda weight, heads: weight)
    file = write_llama(place / "llama", place / "order.gguf")
    with pytest.raises(GateError, match="KL from the trained model"):
        prove_export(file, place / "llama")


def test_tokens_that_differ_fail_with_the_text(place: Path, tmp_path: Path):
    shutil.copytree(place / "llama", tmp_path / "other")
    backend = json.loads((tmp_path / "other/tokenizer.json").read_text())
    backend["model"]["merges"] = backend["model"]["merges"][:20]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(GateError, match=r"texts get other token ids, such as .*in llama\.cpp"):
        prove_export(write_llama(tmp_path / "other", tmp_path / "tokens.gguf"), place / "llama")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CHAT_TEMPLATE.replace("assistant\n", "assistant: "), "through the file's template"),
        (" ", "through the file's template"),
        ("", "holds no chat template"),
    ],
)
def test_a_template_that_differs_fails(place: Path, tmp_path: Path, template: str, words: str):
    file = write_llama(place / "llama", tmp_path / "template.gguf", template=template)
    with pytest.raises(GateError, match=words):
        prove_export(file, place / "llama")


def test_a_file_that_does_not_end_where_an_answer_does_fails(place: Path, tmp_path: Path):
    # The template ends a turn by a token that the runtime knows by no rule: not by its name, not as end of the text.
    source = tmp_path / "endless"
    shutil.copytree(place / "llama", source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            (source / name).write_text((source / name).read_text().replace("<|im_end|>", "<|stopping|>"))
    with pytest.raises(GateError, match=r"llama\.cpp does not stop at '<\|stopping\|>'"):
        prove_export(write_llama(source, tmp_path / "endless.gguf"), source)


def test_rows_that_are_given_are_asked(place: Path, tmp_path: Path):
    data = tiny_chat_file(tmp_path / "rows.jsonl", rows=4)
    proof = prove_export(place / "base-f32.gguf", place / "llama", data=data)
    assert (proof.prompts, proof.asked) == (4, "rows of the data")
    assert [answer.prompt for answer in proof.answers] == ["say red 0", "say green 1", "say blue 2"]


def test_little_time_asks_less_and_says_so(place: Path):
    proof = prove_export(place / "base-f32.gguf", place / "llama", seconds=1e-3)
    assert proof.prompts == 2
    assert proof.codes is None
    assert "2 of 8 prompts" in proof.notes[0]
    assert "own codes" in proof.notes[1]


def test_without_memory_for_the_codes_the_rest_is_proved(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proof_measure, "free_memory", lambda: 1000)
    proof = prove_export(place / "base-f32.gguf", place / "llama")
    assert proof.codes is None
    assert proof.trained.kl < 1e-9


def test_a_truncated_file_is_refused_before_anything_is_opened(place: Path, tmp_path: Path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((place / "base-f32.gguf").read_bytes()[:-100])
    with pytest.raises(FileFormatError, match=r"broken\.gguf"):
        prove_export(broken, tmp_path / "no such model")


def test_the_gap_is_the_divergence_and_the_effect_its_projection():
    generator = torch.Generator().manual_seed(0)
    base, change, noise = (torch.randn(40, 30, generator=generator) for _ in range(3))
    tuned = base + change
    gap = Gap()
    gap.add(tuned, base)
    p, q = tuned.double().softmax(-1), base.double().softmax(-1)
    assert gap.kl == pytest.approx(float((p * (p.log() - q.log())).sum(-1).mean()))
    assert gap.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    for share in (0.0, 0.5, 1.0):
        effect = Effect()
        effect.add(base, tuned, base + share * change + 7.0)  # a constant added to all logits changes nothing
        assert effect.share == pytest.approx(share, abs=1e-6)
    effect = Effect()
    effect.add(base, tuned, tuned + noise)
    assert effect.share == pytest.approx(1, abs=0.1)


def test_random_texts_follow_their_seed():
    assert random_texts(5, seed=1) == random_texts(5, seed=1) != random_texts(5, seed=2)


def test_figures_on_the_bundled_model_and_the_stories_model(material: Path, tmp_path: Path):
    from strop.recipes.export import export

    for source in ("demo", str(material / "models/stories260K")):
        for kind, most in (("f32", 1e-9), ("f16", 5e-6), ("q8_0", 1e-3)):
            file = tmp_path / f"{kind}.gguf"
            export(source, file, format=f"gguf:{kind}", verify=False, overwrite=True)
            proof = prove_export(file, source)
            assert proof.trained.kl <= most
            assert proof.seconds < 120
