from __future__ import annotations

import json
from pathlib import Path

import pytest

from strop.files.gguf.reader import GgufFile
from strop.recipes.export import export
from strop.recipes.export_beside import _method_words, ollama_template
from tests.tiny import tiny_folder, tiny_tokenizer


def test_the_card_and_the_receipt_say_what_the_file_is(tmp_path: Path) -> None:
    result = export(tiny_folder(tmp_path, "llama"), tmp_path / "m.gguf", format="gguf:q4_k_m", verify=False)
    text = (tmp_path / "m.gguf.md").read_text(encoding="utf-8")
    for said in ("gguf:q4_k_m", result.receipt["sha256"], result.receipt["base_sha256"], "NOT PROVED: --no-verify"):
        assert said in text
    assert "llama-cli -m m.gguf -cnv" in text
    receipt = json.loads((tmp_path / "m.gguf.json").read_text(encoding="utf-8"))
    assert receipt["bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert len(receipt["tensors"]) == len(GgufFile.open(tmp_path / "m.gguf").tensors)
    assert receipt["run"] is None


def test_a_method_is_said_with_what_was_set() -> None:
    settings = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ["q_proj", "v_proj"], "rank_stabilised": True}
    assert (
        _method_words({**settings, "name": "lora"}) == "lora: rank 8, alpha 16, targets q_proj, v_proj, rank stabilised"
    )
    assert _method_words({"name": "full"}) == "full"


def test_the_modelfile_writes_conversations_as_the_chat_template_does(tmp_path: Path) -> None:
    export(tiny_folder(tmp_path, "llama"), tmp_path / "m.gguf", format="gguf:q8_0", modelfile=True, verify=False)
    text = (tmp_path / "m.gguf.Modelfile").read_text(encoding="utf-8")
    assert "FROM ./m.gguf\n" in text
    assert 'PARAMETER stop "<|eos|>"\nPARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 256\n' in text
    assert (
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n{{ else if eq .Role "user" }}' in text
    )
    assert "{{ .Content }}<|im_end|>\n<|im_start|>assistant\n{{ else if" in text


@pytest.mark.parametrize(
    ("template", "begins"),
    [
        ("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}", "<|bos|>"),
        (
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[I] {{ m.content }} [/I]"
            "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
            "<|bos|>",
        ),
    ],
)  # fmt: skip
def test_templates_of_other_kinds_are_found_and_a_first_token_that_is_added_is_left_out(
    template: str, begins: str
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    found = ollama_template(tokenizer, adds_bos=False)
    assert found is not None
    assert found.startswith(f"{begins}{{{{ range")
    without = ollama_template(tokenizer, adds_bos=True)
    assert without == found.removeprefix(begins)


def test_a_template_that_ollama_cannot_say_is_left_to_the_file() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }}{{ m.content }}<|im_end|>{% endfor %}"
    assert ollama_template(tokenizer, adds_bos=False) is None
