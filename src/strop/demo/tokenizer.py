r"""The bundled model's tokenizer: byte-level BPE whose words are the same tokens wherever they stand.

A word is a run of letters: the space before it, the quote around it and the digits beside it are tokens of their own,
so that `call maria` and `"maria"` hold the same tokens and copying a name means repeating its tokens. This is reached
in training, not with a pre-tokenizer of our own: merges are learnt inside letters, inside single digits and inside `
?[punctuation]+` only, so the usual pre-tokenizer (single digits, then GPT-2's pattern), which other engines know,
cuts text into the very same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% elif message['role'] in ('user', 'system') %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% else %}{{ raise_exception('a role is system, user or assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TRAINING_PIECES = r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"
"""The pieces within which merges are learnt: letters, one digit, punctuation with the space before it, one space."""


def train(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Learn the merges from `texts`; the result carries the pre-tokenizer that is shipped, not the one of training."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(TRAINING_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return with_shipped_pre_tokenizer(learner)


def with_shipped_pre_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary and merges behind single digits and GPT-2's pattern."""
    shipped = Tokenizer.from_str(tokenizer.to_str())
    shipped.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    shipped.decoder = decoders.ByteLevel()
    shipped.post_processor = processors.ByteLevel(trim_offsets=False)
    return shipped


def save(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> None:
    """Write a folder that `AutoTokenizer` opens, chat template included."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    ).save_pretrained(folder)
    # The class and key that transformers 4 knows too; 5 reads them alike.
    written = folder / "tokenizer_config.json"
    settings = json.loads(written.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    written.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
