"""A GGUF file's own tokenizer and chat template, with the few names of a transformers tokenizer that strop uses.

So conversations are written for a file exactly as for a folder (`strop.data.templates`, hostile templates included),
and every token comes from the runtime itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from strop.runtime.llama_cpp import GgufModel

_UNKNOWN, _UNUSED, _CONTROL, _USER_DEFINED = 1 << 0, 1 << 1, 1 << 3, 1 << 4  # llama_token_attr
_NAMES: Final = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class AddedToken:
    """A token that is read whole wherever its text stands; `special` ones are no content."""

    content: str
    special: bool

    def __str__(self) -> str:
        return self.content


class GgufTokenizer:
    """What turns text into a GGUF file's tokens and back.

    Args:
        model: The open file.

    Attributes:
        chat_template: The template that the file holds; None without one.
    """

    def __init__(self, model: GgufModel) -> None:
        self._model = model
        self.chat_template: str | None = model.chat_template
        self._ids = {name: model.special_id(name) for name in _NAMES}

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text."""
        return self._ids["bos"]

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        return self._ids["eos"]

    @property
    def pad_token_id(self) -> int | None:
        """The token to fill up with."""
        return self._ids["pad"]

    @property
    def eos_token(self) -> str | None:
        """The text of the token that ends a text."""
        return self.special_tokens_map.get("eos_token")

    @functools.cached_property
    def special_tokens_map(self) -> dict[str, str]:
        """Name to text of the tokens that a template may ask for."""
        return {f"{name}_token": self._model.token_text(at) for name, at in self._ids.items() if at is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """Texts of the tokens that are no content."""
        return list(
            dict.fromkeys([*self.special_tokens_map.values(), *map(str, filter(_special, self._added.values()))])
        )

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Id to token of those that are read whole wherever they stand."""
        return self._added

    @functools.cached_property
    def _added(self) -> dict[int, AddedToken]:
        found = {}
        for token in range(self._model.vocabulary):
            kind = self._model.token_attributes(token)
            if kind & (_CONTROL | _USER_DEFINED | _UNKNOWN):
                found[token] = AddedToken(self._model.token_text(token), special=bool(kind & (_CONTROL | _UNKNOWN)))
        return found

    def __len__(self) -> int:
        return self._model.vocabulary

    def get_vocab(self) -> dict[str, int]:
        """Text of every token to its id; rows that only fill the embedding up are left out."""
        return self._vocab

    @functools.cached_property
    def _vocab(self) -> dict[str, int]:
        tokens = range(self._model.vocabulary)
        return {self._model.token_text(at): at for at in tokens if not self._model.token_attributes(at) & _UNUSED}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self._model.tokenize(text, add_special=add_special_tokens)

    def __call__(self, text: str | Sequence[str], *, add_special_tokens: bool = True, **_: Any) -> dict[str, list[Any]]:
        """Token ids of a text, or of several."""
        if isinstance(text, str):
            return {"input_ids": self.encode(text, add_special_tokens=add_special_tokens)}
        return {"input_ids": [self.encode(one, add_special_tokens=add_special_tokens) for one in text]}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False, **_: Any) -> str:
        """The text of tokens."""
        return self._model.detokenize(ids, special=not skip_special_tokens)


def _special(token: AddedToken) -> bool:
    return token.special
