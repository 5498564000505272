"""Whether a GGUF file reads text as the model that it was made from: the same token ids, bit for bit.

Compared are texts (a built-in corpus that holds what tokenizers get wrong, random Unicode, and what the caller brings),
conversations through the chat template that stands in the file, and where an answer ends. A text that differs means
that the file is another model to its users, whatever its weights.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from strop.data.records import Message
from strop.data.templates import chat_format, prompt_ids, stop_ids
from strop.errors import DataError
from strop.runtime.llama_cpp import GgufModel

CORPUS: Final = (
    "",
    " ",
    "a",
    " a",
    "  two  spaces   three",
    "line\nbreaks\n\nand\ttabs\r\n  indented",
    "trailing space ",
    "It's we're I'LL they'd can't o'clock",
    "0 1 12 123 1234 12345 3.14159 1,000,000 -7 2026-11-25 06:30",
    "camelCase snake_case SCREAMING kebab-case x+=1; if (a<=b) { return a[0]; }",
    "def f(x):\n    return {'a': [1, 2], \"b\": None}  # comment\n",
    '{"action": "set_alarm", "time": "06:30", "days": ["mon", "tue"]}',
    "https://example.org/a?b=c&d=%20e#f user@example.org",
    "naïve café Ærøskøbing Ünïcödé façade ß ﬁ",
    "e\u0301 and \u00e9, A\u030a and \u00c5",
    "Привет мир. Ελληνικά. עברית. العربية. हिन्दी. ไทย. 한국어.",
    "数学 東京 中文，标点。「引号」",
    "🙂 👍🏽 👨‍👩‍👧 🇫🇷 ❤️",
    "\u200b zero \ufeff width \u00a0 no-break \u2028 line",
    "!!! ??? ... --- *** ___ ~~~ ((( )))",
    "<b>bold</b> &amp; [link](x) `code` $x^2$ \\frac{1}{2}",
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
)
RANDOM_TEXTS: Final = 200

_ALPHABETS: Final = (
    "abcdefghijklmnopqrstuvwxyz ABC 0123456789",
    " \n\t.,;:!?'\"-_()[]{}<>/\\@#$%^&*+=~`|",
    "".join(map(chr, range(0xA1, 0x180))),
    "".join(map(chr, (*range(0x400, 0x450), *range(0x5D0, 0x5EA), *range(0x905, 0x939)))),
    "".join(map(chr, (*range(0x3041, 0x3097), *range(0x4E00, 0x4E80), *range(0xAC00, 0xAC40)))),
    "".join(map(chr, (*range(0x1F600, 0x1F640), 0x200D, 0xFE0F))),
)
_SHOWN: Final = 3


@dataclass(frozen=True)
class TokenCheck:
    """What came of the comparison.

    Attributes:
        texts: Texts compared.
        conversations: Conversations compared; 0 where the model has no chat template.
        problems: What differs.
        warnings: What other programs may do otherwise with the file.
    """

    texts: int
    conversations: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def check_tokens(model: GgufModel, tokenizer: Any, texts: Sequence[str] = (), *, seed: int = 0) -> TokenCheck:
    """Compare the file's tokens with those of the tokenizer that the model was trained with.

    Args:
        model: The open file.
        tokenizer: transformers' tokenizer of the source.
        texts: More texts to compare.
        seed: Of the random texts.
    """
    corpus = [*CORPUS, *random_texts(RANDOM_TEXTS, seed=seed), *texts]
    problems = _text_problems(model, tokenizer, corpus)
    warnings: list[str] = []
    conversations = 0
    if tokenizer.chat_template:
        conversations, found, warnings = _through_template(model, tokenizer)
        problems += found
    endless = [token for token in stop_ids(tokenizer) if not model.ends_generation(token)]
    if endless:
        named = ", ".join(f"{model.token_text(token)!r} ({token})" for token in endless)
        problems.append(f"llama.cpp does not stop at {named}, where an answer ends")
    return TokenCheck(len(corpus), conversations, tuple(problems), tuple(warnings))


def random_texts(count: int, *, seed: int) -> list[str]:
    """Short texts of random characters, several scripts in each; the same for the same seed."""
    drawn = random.Random(seed)
    return [
        "".join(
            "".join(drawn.choices(drawn.choice(_ALPHABETS), k=drawn.randint(1, 8))) for _ in range(drawn.randint(1, 5))
        )
        for _ in range(count)
    ]


def _text_problems(model: GgufModel, tokenizer: Any, corpus: Sequence[str]) -> list[str]:
    expected = tokenizer(list(corpus))["input_ids"]
    differing = [
        f"{text[:60]!r}: {ids[:12]} in transformers, {found[:12]} in llama.cpp"
        for text, ids in zip(corpus, expected, strict=True)
        if (found := model.tokenize(text)) != list(ids)
    ]
    if not differing:
        return []
    return [f"{len(differing)} of {len(corpus)} texts get other token ids, such as {'; '.join(differing[:_SHOWN])}"]


def _through_template(model: GgufModel, tokenizer: Any) -> tuple[int, list[str], list[str]]:
    chats = [
        [Message("user", "What is 12 times 7?")],
        [Message("system", "Be brief."), Message("user", "wake me at seven")],
        [Message("user", "Hello!"), Message("assistant", "Hi."), Message("user", " And now?\n")],
    ]
    if not model.chat_template:
        return len(chats), ["the file holds no chat template, and the model has one"], []
    problems, warnings = [], []
    for chat in chats:
        said = " / ".join(turn.role for turn in chat)
        expected, found = _prompt(chat, tokenizer), _prompt(chat, model.tokenizer)
        if expected != found:
            problems.append(f"a conversation ({said}) becomes {found} through the file's template, needed {expected}")
        elif isinstance(expected, list) and (whole := _as_servers_do(chat, model, tokenizer)) != expected:
            warnings.append(
                f"a program that tokenizes a whole conversation ({said}) at once gets {len(whole)} tokens, beginning "
                f"{whole[:4]}, where the model was trained on {len(expected)}, beginning {expected[:4]}"
            )
    return len(chats), problems, warnings


def _prompt(chat: Sequence[Message], tokenizer: Any) -> list[int] | str:
    try:
        return prompt_ids(chat, tokenizer)
    except DataError as error:  # a template may refuse some roles; then both must
        return f"an error ({error})"


def _as_servers_do(chat: Sequence[Message], model: GgufModel, tokenizer: Any) -> list[int]:
    """The tokens of the whole rendered text; where it begins with BOS itself, llama.cpp's own is taken away."""
    [layout] = chat_format(tokenizer).lay_out_all([tuple(chat)], [frozenset()], prompt=True)
    if isinstance(layout, DataError):
        raise layout
    ids = model.tokenize(layout.text)
    bos = model.special_id("bos")
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
