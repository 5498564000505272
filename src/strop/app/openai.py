"""OpenAI's requests and answers, as far as a local model has them, typed.

What would change an answer and is not done here (tools, several choices, penalties, log-probabilities) is refused by
name unless it asks for nothing; a name that is not known is refused with the nearest that is.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from strop import __version__
from strop.data.records import Message
from strop.errors import nearest
from strop.recipes.serve import Part, Wish

COMPLETION_TOKENS = 16
"""What a plain completion has where the request names no number, as OpenAI's."""

_Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
"""Fields that are taken where their value asks for nothing that is not done anyway."""

_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that say who asks."""


class StreamOptions(BaseModel):
    """What a stream brings along."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(BaseModel):
    """What both kinds of request hold."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_the_neutral(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("the body must be a JSON object, sent as content-type: application/json")
        kept = {key: given for key, given in value.items() if key not in _IGNORED}
        for key, neutral in _NEUTRAL.items():
            if key in kept and (given := kept.pop(key)) is not None and given not in neutral:
                raise ValueError(f"{key}={json.dumps(given)[:80]} is not done here; leave it out")
        for key in kept:
            if key not in cls.model_fields:
                raise ValueError(f"there is no {key!r}{nearest(str(key), cls.model_fields)}")
        return kept

    @property
    def most_tokens(self) -> int | None:
        """The most new tokens."""
        return self.max_tokens

    def wish(self) -> Wish:
        """How the answer is to be written; drawn with a seed of its own where none is given."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        seed = uuid.uuid4().int if self.seed is None else self.seed
        return Wish(
            self.most_tokens,
            self.temperature or 0.0,
            1.0 if self.top_p is None else self.top_p,
            seed % (1 << 32),
            tuple(stop),
        )


class TextPart(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """One message."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: str | None = None

    def message(self) -> Message:
        """The turn as strop writes it."""
        role: Any = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role, text)


class ChatAsked(Asked):
    """A request to /v1/chat/completions."""

    messages: list[Turn] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def most_tokens(self) -> int | None:
        """The most new tokens, by its newer name or its older one."""
        return self.max_completion_tokens or self.max_tokens

    def turns(self) -> list[Message]:
        """The conversation."""
        return [turn.message() for turn in self.messages]


class TextAsked(Asked):
    """A request to /v1/completions."""

    prompt: str | list[str] | list[int]

    @field_validator("prompt")
    @classmethod
    def _one(cls, value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], str):
            if len(value) > 1:
                raise ValueError(f"{len(value)} prompts; one at a time is answered")
            return value[0]
        return value

    @property
    def most_tokens(self) -> int | None:
        """The most new tokens."""
        return self.max_tokens or COMPLETION_TOKENS


class Shape:
    """Builds the answers to one request.

    Args:
        model: the model's name.
        chat: whether they are a conversation's.
        prompt_tokens: tokens asked with.
    """

    def __init__(self, model: str, *, chat: bool, prompt_tokens: int) -> None:
        self._chat, self._prompt_tokens = chat, prompt_tokens
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"strop-{__version__}",
        }

    def whole(self, text: str, last: Part) -> dict[str, Any]:
        """The answer at once."""
        kind = "chat.completion" if self._chat else "text_completion"
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        )
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": last.finish}
        return {**self._head, "object": kind, "choices": [choice], "usage": self._usage(last.tokens)}

    def first(self) -> dict[str, Any] | None:
        """What a stream begins with."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None) if self._chat else None

    def piece(self, part: Part) -> dict[str, Any] | None:
        """A part with text in it."""
        if not part.text:
            return None
        return self._chunk({"delta": {"content": part.text}} if self._chat else {"text": part.text}, None)

    def end(self, last: Part) -> dict[str, Any]:
        """Why a stream ended."""
        return self._chunk({"delta": {}} if self._chat else {"text": ""}, last.finish)

    def usage(self, last: Part) -> dict[str, Any]:
        """What a stream took."""
        return {**self._head, "object": self._kind, "choices": [], "usage": self._usage(last.tokens)}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return {**self._head, "object": self._kind, "choices": [choice]}

    def _usage(self, written: int) -> dict[str, int]:
        asked = self._prompt_tokens
        return {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written}


def error(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
