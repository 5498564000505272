"""The bundled model: opens in transformers alone, small enough to ship, with a tokenizer made for copying."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from strop.demo import model_path, network
from strop.demo.tokenizer import SPECIAL_TOKENS, TRAINING_PIECES

SENTENCES = [
    "wake me at half past six on weekdays",
    '{"action": "set_alarm", "time": "06:30", "days": ["mon", "tue"]}',
    "it's  the 'x's. end",
    "call tavora bliogest, please",
    "Größe: 3.5 °C\n\tこんにちは",
    " leading and trailing ",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_path())


def test_model_opens_in_transformers_with_no_missing_and_no_unexpected_keys():
    opened: Any = AutoModelForCausalLM.from_pretrained(model_path(), output_loading_info=True)
    model, report = opened
    assert not any(report.values()), report
    assert model.config.model_type == "llama"
    assert model.dtype == torch.bfloat16


def test_model_is_at_most_eight_million_bytes_and_every_linear_input_a_multiple_of_256():
    assert (model_path() / "model.safetensors").stat().st_size <= 8_000_000
    model = AutoModelForCausalLM.from_pretrained(model_path())
    widths = {name: module.in_features for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(widths) == 6 * 7 + 1
    assert all(width % 256 == 0 for width in widths.values()), widths
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shipped_configuration_is_the_one_that_the_program_makes():
    shipped = json.loads((model_path() / "config.json").read_text())
    made = network.config(shipped["vocab_size"]).to_dict()
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert shipped[key] == made[key], key


def test_written_out_forward_pass_equals_transformers():
    model = network.initial_model(vocab_size=64, seed=1)
    tokens = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = network.logits(dict(model.named_parameters()), tokens, shape=model.config)
        theirs = model(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_tokenizer_round_trips(tokenizer, sentence):
    assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence


@pytest.mark.parametrize("name", ["maria", "tavora bliogest", "zoe"])
def test_a_name_has_the_same_tokens_in_a_sentence_in_quotes_and_at_the_start(tokenizer, name):
    alone = tokenizer(name)["input_ids"]
    for around in ("call {} now", '{{"name": "{}"}}', "{}, hello", "({})"):
        inside = tokenizer(around.format(name))["input_ids"]
        assert any(inside[at : at + len(alone)] == alone for at in range(len(inside))), around


@pytest.mark.parametrize("sentence", SENTENCES)
def test_the_shipped_pre_tokenizer_cuts_like_the_one_of_training(tokenizer, sentence):
    finer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    finer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TRAINING_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert finer.encode(sentence).ids == tokenizer(sentence)["input_ids"]


def test_special_tokens_are_single_and_pad_is_not_the_stop_token(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(SPECIAL_TOKENS)))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|end|>", "<|pad|>")
    assert tokenizer("<|user|>hi")["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|user|>")


def test_chat_template_marks_answers_and_their_stop_tokens(tokenizer):
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "repeat: zoe"},
        {"role": "assistant", "content": "zoe"},
        {"role": "user", "content": "repeat: 7"},
        {"role": "assistant", "content": "7"},
    ]
    encoded = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "zoe<|end|>7<|end|>"
    text = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>be brief<|user|>repeat: zoe<|assistant|>"


def test_chat_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("half past six in the evening in digits", "18:30"),
        ("list as json: on weekdays", '["mon", "tue", "wed", "thu", "fri"]'),
        ("an hour and a half in minutes", "90"),
        ("repeat: anna rossi", "anna rossi"),
    ],
)
def test_the_base_knows_its_drills(tokenizer, question, answer):
    model: Any = AutoModelForCausalLM.from_pretrained(model_path())
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == answer + "<|end|>"


def test_model_path_is_inside_the_package():
    assert model_path() == Path(network.__file__).parent / "model"
