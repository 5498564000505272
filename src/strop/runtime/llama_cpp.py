"""`GgufModel`: a GGUF file, open in llama.cpp in this process.

    with GgufModel.open("model.gguf") as model:
        ids = model.tokenize("once upon a time")
        model.logits(ids)                       # float32 [tokens, vocabulary]
        list(model.stream(ids, max_tokens=32))  # greedy

Computed on the CPU, keys and values kept in float32, attention without approximations (no flash attention), so that
what differs from the trained model is the file. One thread count for everything; the same inputs give the same bits.
The file is read into memory, not mapped: nothing that happens to it later changes what is computed. Every call starts
from an empty context: nothing is remembered from the call before.

A file is checked by our own reader before llama.cpp sees it, and every tensor's values by llama.cpp's own check.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from strop.errors import DataError, ModelError, UsageError
from strop.files.gguf.reader import GgufFile
from strop.runtime.library import forget_words, last_words, library, require_runtime
from strop.runtime.settings_check import check_settings
from strop.runtime.tokenizer import GgufTokenizer

__all__ = ["Generation", "GgufModel", "require_runtime"]

MOST_CONTEXT: Final = 4096
"""Tokens of context where nothing else is asked for and the model could take more."""

_BATCH: Final = 512
_OUTPUT_NUMBERS: Final = 1 << 23
"""Logits computed at once: 32 MiB."""


@dataclass(frozen=True)
class Generation:
    """What was written after a prompt.

    Attributes:
        ids: The new tokens, the one that ended them left out.
        stopped: Whether a stop token ended them, not the limit.
        prompt_seconds: Until the prompt was read.
        new_seconds: What the new tokens took.
    """

    ids: list[int]
    stopped: bool
    prompt_seconds: float
    new_seconds: float


class GgufModel:
    """An open GGUF file; made by `open`, given back by `close` or at the end of a `with` block.

    Attributes:
        path: The file.
        vocabulary: Width of the logits.
        context: The most tokens that fit, prompt and answer together.
        trained_context: What the model was made for.
        threads: Threads that compute.
        seed: Of what is drawn where a call names none.
        architecture: The architecture's name in the file.
        format: The types of its matrices, those with most weights first, such as `gguf:q4_k + q6_k`.
        chat_template: The template in the file; None without one.
    """

    def __init__(self, file: GgufFile, model: Any, context: Any, *, threads: int, seed: int) -> None:
        lib = library()
        self.path, self.threads, self.seed = file.path, threads, seed
        self.format = _format(file)
        self._model, self._context = model, context
        self._vocab = lib.llama_model_get_vocab(model)
        self.vocabulary = int(lib.llama_vocab_n_tokens(self._vocab))
        self.trained_context = int(lib.llama_model_n_ctx_train(model))
        self.context = min(int(lib.llama_n_ctx(context)), self.trained_context or 1 << 31)
        self._at_once = int(lib.llama_n_batch(context))  # never more than the context that was asked for
        self._outputs = min(self._at_once, _outputs_at_once(self.vocabulary))
        self._batch: Any = lib.llama_batch_init(self._at_once, 0, 1)
        self.architecture = self.metadata_text("general.architecture") or "unknown"
        template = lib.llama_model_chat_template(model, None)
        self.chat_template = template.decode("utf-8", errors="replace") if template else None
        self.tokenizer = GgufTokenizer(self)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, context: int | None = None, threads: int | None = None, seed: int = 0
    ) -> GgufModel:
        """Open a file.

        Args:
            path: The file.
            context: Tokens that must fit; by default what the model was made for, 4096 at the most.
            threads: Threads that compute; by default as many as torch uses (OMP_NUM_THREADS, torch.set_num_threads).
            seed: Of what is drawn where a call names none.

        Raises:
            MissingInputError: llama-cpp-python is not installed, or there is no such file.
            FileFormatError: The file is truncated or broken.
            ModelError: llama.cpp cannot open it (an architecture that it does not know, a tensor that is missing).
            UsageError: A context or a thread count below 1.
        """
        file = Path(path).expanduser()
        if (context is not None and context < 1) or (threads is not None and threads < 1):
            raise UsageError(f"context {context}, threads {threads}: needed at least 1 of each")
        lib = library()
        checked = GgufFile.open(file)
        check_settings(checked)
        if threads is None:
            import torch

            threads = torch.get_num_threads()
        forget_words()
        model = _load(lib, file)
        try:
            made = _new_context(lib, file, model, context, threads)
        except BaseException:
            lib.llama_model_free(model)
            raise
        return cls(checked, model, made, threads=threads, seed=seed)

    def close(self) -> None:
        """Give the memory back; nothing can be asked of the model afterwards."""
        if self._model is None:
            return
        lib = library()
        lib.llama_batch_free(self._batch)
        lib.llama_free(self._context)
        lib.llama_model_free(self._model)
        self._model = self._context = self._vocab = None

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_model", None) is not None:
            self.close()

    # What the file says of itself

    @property
    def weights_bytes(self) -> int:
        """Bytes of all tensors."""
        return int(library().llama_model_size(self._model))

    @property
    def cache_bytes_per_token(self) -> float:
        """Bytes of keys and values that a token takes, as they are kept here (float32)."""
        lib = library()
        heads = int(lib.llama_model_n_head(self._model)) or 1
        width = int(lib.llama_model_n_embd(self._model)) // heads
        key = int(self.metadata_text(f"{self.architecture}.attention.key_length") or width)
        value = int(self.metadata_text(f"{self.architecture}.attention.value_length") or width)
        return 4.0 * lib.llama_model_n_layer(self._model) * lib.llama_model_n_head_kv(self._model) * (key + value)

    def metadata_text(self, key: str) -> str | None:
        """A value of the file's metadata as text; None where there is no such key or it is a list."""
        buffer = ctypes.create_string_buffer(1 << 12)
        lib = library()
        length = lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        if length >= len(buffer):
            buffer = ctypes.create_string_buffer(length + 1)
            length = lib.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.raw[:length].decode("utf-8", errors="replace") if length >= 0 else None

    def special_id(self, name: str) -> int | None:
        """The id of the token called `bos`, `eos`, `pad` or `unk`; None where the file names none."""
        if name == "unk":
            told = self.metadata_text("tokenizer.ggml.unknown_token_id")
            return int(told) if told is not None and told.isdecimal() else None
        token = int(getattr(library(), f"llama_vocab_{name}")(self._vocab))
        return token if token >= 0 else None

    def token_text(self, token: int) -> str:
        """A token as the vocabulary writes it (with its marks for spaces and bytes)."""
        return library().llama_vocab_get_text(self._vocab, token).decode("utf-8", errors="replace")

    def token_attributes(self, token: int) -> int:
        """llama.cpp's attributes of a token, as bits."""
        return int(library().llama_vocab_get_attr(self._vocab, token))

    def ends_generation(self, token: int) -> bool:
        """Whether the runtime itself stops at a token."""
        return bool(library().llama_vocab_is_eog(self._vocab, token))

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """Every token at which the runtime itself stops."""
        return [token for token in range(self.vocabulary) if self.ends_generation(token)]

    # Text and tokens

    def tokenize(self, text: str, add_special: bool = True, *, parse_special: bool = True) -> list[int]:  # noqa: FBT001, FBT002  the interface's own order
        """Token ids of a text.

        Args:
            text: Any text.
            add_special: Put BOS in front (and EOS behind) where the file asks for it.
            parse_special: Read the texts of special tokens as those tokens.

        Raises:
            DataError: The text is no Unicode (half of a surrogate pair).
        """
        try:
            content = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"a text cannot be tokenized: {error}") from error
        lib, room = library(), len(content) + 8
        for _ in range(2):
            tokens = (lib.llama_token * room)()
            count = lib.llama_tokenize(self._vocab, content, len(content), tokens, room, add_special, parse_special)
            if count >= 0:
                return list(tokens[:count])
            room = -count
        raise DataError(f"llama.cpp does not tokenize a text of {len(content)} bytes: {last_words() or 'no reason'}")

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of tokens; bytes that make no character become U+FFFD.

        Args:
            ids: Tokens.
            special: Write special tokens out instead of leaving them away.
        """
        self._check_ids(ids)
        lib, count = library(), len(ids)
        tokens = (lib.llama_token * count)(*ids)
        room = 16 * count + 16
        for _ in range(2):
            buffer = ctypes.create_string_buffer(room)
            length = lib.llama_detokenize(self._vocab, tokens, count, buffer, room, False, special)  # noqa: FBT003  C call
            if length >= 0:
                return buffer.raw[:length].decode("utf-8", errors="replace")
            room = -length
        raise ModelError(f"{self.path}: llama.cpp does not detokenize {count} tokens")

    def _check_ids(self, ids: Sequence[int]) -> None:
        wrong = [token for token in ids if not 0 <= token < self.vocabulary]
        if wrong:
            raise UsageError(f"{self.path}: there is no token {wrong[0]}; it has {self.vocabulary} tokens")

    def _check_prompt(self, ids: Sequence[int], *, room: int) -> None:
        self._check_ids(ids)
        if not ids:
            raise UsageError("a prompt without a token cannot be read")
        if len(ids) + room > self.context:
            raise UsageError(
                f"{self.path}: the prompt has {len(ids)} tokens, and the context of {self.context} leaves "
                f"{max(0, self.context - len(ids))}; shorten it, or open the file with more context (trained for "
                f"{self.trained_context})"
            )

    # Computing

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every token of a text [tokens, vocabulary], float32.

        Raises:
            UsageError: No token, an unknown one, or more than the context holds.
            ModelError: llama.cpp fails, or the logits are not finite.
        """
        return np.concatenate([*self.logit_pieces(ids)])

    def logit_pieces(self, ids: Sequence[int], wanted: Sequence[int] | None = None) -> Iterator[NDArray[np.float32]]:
        """The same, some positions at a time, so that the whole never has to be held; each piece is a copy.

        Args:
            ids: The text.
            wanted: Positions after which logits are needed, in order; by default all.

        Raises:
            As `logits`.
        """
        self._check_prompt(ids, room=0)
        places = set(range(len(ids)) if wanted is None else wanted)
        lib = library()
        self._forget()
        start, last = 0, max(places, default=-1)
        while start <= last:
            end, outputs = start, 0
            while end <= last and end - start < self._at_once and outputs < self._outputs:
                outputs += end in places
                end += 1
            self._decode(ids[start:end], start, places)
            if outputs:
                pointer = lib.llama_get_logits(self._context)
                yield self._finite(np.ctypeslib.as_array(pointer, shape=(outputs, self.vocabulary)).copy())
            start = end

    def stream(
        self,
        ids: Sequence[int],
        *,
        max_tokens: int,
        stop_ids: Sequence[int] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Write after a prompt, token by token; a stop token ends it and is handed out last.

        Args:
            ids: The prompt.
            max_tokens: The most new tokens; fewer where the context ends.
            stop_ids: Tokens that end it; by default those of the file.
            temperature: 0 takes the likeliest token always.
            top_p: Draw from the likeliest tokens that hold this share of the probability together.
            seed: Of the drawing; by default the model's.

        Raises:
            UsageError: The prompt fills the context, or an option makes no sense.
            ModelError: llama.cpp fails, or the logits are not finite.
        """
        if max_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise UsageError(
                f"max_tokens {max_tokens}, temperature {temperature:g}, top_p {top_p:g}: needed at least 1 token, a "
                "temperature of 0 or above and a share above 0 and at most 1"
            )
        self._check_prompt(ids, room=1)
        stops = set(self.stop_ids if stop_ids is None else stop_ids)
        chosen = _Sampler(temperature, top_p, self.seed if seed is None else seed)
        try:
            self._forget()
            for start in range(0, len(ids), self._at_once):
                self._decode(ids[start : start + self._at_once], start, {len(ids) - 1})
            end = min(len(ids) + max_tokens, self.context)
            for place in range(len(ids), end):
                token = chosen.take(self._context, self._last_logits())
                yield token
                if token in stops or place + 1 == end:
                    return
                self._decode([token], place, {place})
        finally:
            chosen.close()

    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        stop_ids: Sequence[int] | None = None,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Generation:
        """Write after a prompt, as `stream`, and time it.

        Raises:
            As `stream`.
        """
        stops = set(self.stop_ids if stop_ids is None else stop_ids)
        start = read = time.perf_counter()
        new: list[int] = []
        options: dict[str, Any] = {"temperature": temperature, "seed": seed}
        for token in self.stream(ids, max_tokens=max_tokens, stop_ids=list(stops), **options):
            if not new:
                read = time.perf_counter()
            new.append(token)
        stopped = bool(new) and new[-1] in stops
        return Generation(new[:-1] if stopped else new, stopped, read - start, time.perf_counter() - read)

    def _forget(self) -> None:
        lib = library()
        if self._model is None:
            raise RuntimeError(f"{self.path}: the model is closed")
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)  # noqa: FBT003  C call: the data too

    def _decode(self, ids: Sequence[int], start: int, wanted: Collection[int]) -> None:
        """Feed up to a batch of tokens that stand from `start` on; logits at the positions wanted."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = start + index in wanted
        forget_words()
        code = library().llama_decode(self._context, batch)
        if code:
            raise ModelError(f"{self.path}: llama.cpp failed to compute (code {code}): {last_words() or 'no reason'}")

    def _last_logits(self) -> NDArray[np.float32]:
        pointer = library().llama_get_logits_ith(self._context, -1)
        return self._finite(np.ctypeslib.as_array(pointer, shape=(self.vocabulary,)))

    def _finite(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if not math.isfinite(float(np.abs(logits).max())):
            raise ModelError(
                f"{self.path}: the logits hold NaN or infinity: weights or scales of the file are broken, or overflow"
            )
        return logits


class _Sampler:
    """Chooses the next token: the likeliest, or one drawn by llama.cpp's own samplers."""

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self._chain: Any = None
        if temperature == 0:
            return
        lib = library()
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        lib.llama_sampler_chain_add(self._chain, lib.llama_sampler_init_temp(temperature))
        if top_p < 1:
            lib.llama_sampler_chain_add(self._chain, lib.llama_sampler_init_top_p(top_p, 1))
        lib.llama_sampler_chain_add(self._chain, lib.llama_sampler_init_dist(seed % 0xFFFFFFFF))

    def take(self, context: Any, logits: NDArray[np.float32]) -> int:
        """The next token after the last one that was decoded."""
        if self._chain is None:
            return int(logits.argmax())
        return int(library().llama_sampler_sample(self._chain, context, -1))

    def close(self) -> None:
        """Give the samplers back."""
        if self._chain is not None:
            library().llama_sampler_free(self._chain)
            self._chain = None


def _format(file: GgufFile) -> str:
    weights: dict[str, int] = {}
    for info in file.tensors.values():
        if len(info.shape) > 1:
            weights[info.type] = weights.get(info.type, 0) + math.prod(info.shape)
    return f"gguf:{' + '.join(sorted(weights, key=lambda name: -weights[name])) or 'empty'}"


def _outputs_at_once(vocabulary: int) -> int:
    return max(1, min(_BATCH, _OUTPUT_NUMBERS // vocabulary))


def _load(lib: Any, file: Path) -> Any:
    wanted = lib.llama_model_default_params()
    wanted.n_gpu_layers = 0
    wanted.load_mode = lib.LLAMA_LOAD_MODE_NONE
    wanted.check_tensors = True
    model = lib.llama_model_load_from_file(os.fsencode(file), wanted)
    if not model:
        raise ModelError(f"{file}: llama.cpp cannot open it: {last_words() or 'it gives no reason'}")
    return model


def _new_context(lib: Any, file: Path, model: Any, context: int | None, threads: int) -> Any:
    trained = int(lib.llama_model_n_ctx_train(model))
    wanted = lib.llama_context_default_params()
    wanted.n_ctx = min(context or MOST_CONTEXT, trained or MOST_CONTEXT)
    wanted.n_batch = wanted.n_ubatch = _BATCH
    wanted.n_outputs_max = _outputs_at_once(int(lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))))
    wanted.n_threads = wanted.n_threads_batch = threads
    wanted.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    wanted.type_k = wanted.type_v = lib.GGML_TYPE_F32
    wanted.offload_kqv = wanted.op_offload = False
    wanted.no_perf = True
    made = lib.llama_init_from_model(model, wanted)
    if not made:
        raise ModelError(
            f"{file}: llama.cpp cannot make a context of {wanted.n_ctx} tokens: {last_words() or 'it gives no reason'}"
        )
    return made
