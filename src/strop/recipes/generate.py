"""`strop chat` and `strop predict`: answers of one model, to one question or to a file of them.

Everything that `strop.load` opens can answer (full and quantized folders, adapters, runs), and so can GGUF files, in
llama.cpp. Prompts are written with
the tokenizer's chat template exactly as training wrote them, and an answer ends at the token that training taught to
stop at. Temperature 0, the default, is plain greedy decoding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from strop.data.records import Message, Record
from strop.data.templates import as_messages, prompt_ids
from strop.errors import DataError, UsageError
from strop.evaluation.engines import Engine, as_engine
from strop.evaluation.generation import Stream
from strop.evaluation.kv_cache import STRIDE, KVFormat
from strop.models import OpenedModel
from strop.pages.atomic import write_whole
from strop.progress import SILENT, Reporter
from strop.recipes.rows import Rows, held_out_records, rows_name
from strop.runtime.llama_cpp import GgufModel

Turn = Message | Mapping[str, str]
"""A message, or a mapping with `role` and `content`."""

Open = OpenedModel | GgufModel | Engine
"""A model that is open: what `strop.load` gives, a GGUF file, or the engine of either."""


def answer(
    opened: Open,
    asked: str | Sequence[Turn],
    *,
    max_new_tokens: int = 256,
    kv_cache: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    chat_template: str | Path | None = None,
    stream: Stream | None = None,
) -> str:
    """Ask once.

    Args:
        opened: What `strop.load` gives, or an open GGUF file.
        asked: A question, or a conversation that ends with a turn that is not the assistant's.
        max_new_tokens: Longest answer, in tokens; shortened to what the model's context leaves.
        kv_cache: "int8" or "int4" rounds the cache of keys and values; None leaves it in full precision.
        temperature: 0 takes the likeliest token always; above, tokens are drawn.
        seed: Of the drawing.
        chat_template: For models that have none, as `strop tune` takes it.
        stream: Called with each piece of the answer as it comes.

    Returns:
        The answer's text, without its stop token.

    Raises:
        ModelError: There is no tokenizer.
        DataError: There is no chat template, or it refuses the turns.
        UsageError: Nothing is asked, or the conversation fills the context.
    """
    turns = as_messages([{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked))
    if not turns or turns[-1].role == "assistant":
        raise UsageError("nothing is asked: the conversation must end with a turn of the user")
    engine = as_engine(opened)
    (text,) = engine.answers(
        [prompt_ids(turns, engine.require_tokenizer(), chat_template=chat_template)],
        stop_ids=engine.stop_ids(chat_template),
        max_new_tokens=max_new_tokens,
        kv_cache=None if kv_cache is None else KVFormat(kv_cache),
        temperature=temperature,
        seed=seed,
        stream=stream,
    )
    return text


def kv_cache_line(kv_cache: str | None) -> Callable[[Open], str] | None:
    """What words a rounded cache's size for an open model; None without one. A wrong name is refused before opening.

    Raises:
        UsageError: Neither int8 nor int4.
    """
    if kv_cache is None:
        return None
    form = KVFormat(kv_cache)

    def line(opened: Open) -> str:
        engine = as_engine(opened)
        small, whole = engine.cache_bytes(form), engine.cache_bytes(None)
        window = f" past the last {form.window} to {form.window + STRIDE - 1}" if form.window else ""
        return f"key-value cache in {form.name}: {small:,.0f} bytes a token{window}, {whole:,.0f} in full precision"

    return line


class Chat:
    """A conversation that remembers its turns.

        chat = Chat(strop.load("run"))
        chat.ask("wake me at seven")
        chat.ask("and on sunday?")

    Args:
        opened: What `strop.load` gives, or an open GGUF file.
        system: A system message to begin with.
        options: As `answer` takes them.

    Attributes:
        turns: What was said so far.
    """

    def __init__(self, opened: Open, *, system: str | None = None, **options: Any) -> None:
        self._opened, self._options = as_engine(opened), options
        self.turns: list[Message] = [Message("system", system)] if system else []

    def ask(self, text: str, *, stream: Stream | None = None) -> str:
        """Say `text` and return the answer; both are remembered, unless answering fails."""
        asked = [*self.turns, Message("user", text)]
        said = answer(self._opened, asked, stream=stream, **self._options)
        self.turns = [*asked, Message("assistant", said)]
        return said

    def forget(self) -> None:
        """Go back to the system message."""
        self.turns = [turn for turn in self.turns if turn.role == "system"]


def predict(
    model: str | os.PathLike[str] | Open,
    data: Rows,
    output: str | os.PathLike[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    kv_cache: str | None = None,
    max_rows: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    chat_template: str | Path | None = None,
    device: str = "cpu",
    reporter: Reporter = SILENT,
) -> Path:
    """Answer every row of a file.

    Each line of the output is a JSON object: `row` (the row's number in its source), `messages` (what was asked),
    `answer` (the model's) and, where the row holds one, `expected`. The last assistant turn of a row is what is
    expected; earlier ones are part of the question. The file appears whole or not at all.

    Args:
        model: A folder, run, adapter, hub id or GGUF file, or an open model.
        data: A file or list of rows, or a folder or hub id with a test split. Plain texts are continued as they stand.
        output: The jsonl file.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Rows answered at once.
        kv_cache: "int8" or "int4" rounds the cache of keys and values; None leaves it in full precision.
        max_rows: Answer only the first so many.
        temperature: 0 takes the likeliest token always.
        seed: Of the drawing.
        chat_template: For models that have none.
        device: Where a model that is opened here runs.
        reporter: Told the rows done.

    Returns:
        The path written.

    Raises:
        UsageError: The output is a folder, a row fills the model's context, or an option makes no sense.
        MissingInputError: Model or data are not there.
        DataError: A row is broken or asks nothing.
        ModelError: There is no tokenizer.
    """
    target = Path(output)
    if target.is_dir():
        raise UsageError(f"{target}: is a folder; name a file for the answers, such as {target / 'answers.jsonl'}")
    if max_rows is not None and max_rows < 1:
        raise UsageError(f"max_rows is {max_rows}; needed at least 1, or none for all rows")
    rounded = None if kv_cache is None else KVFormat(kv_cache)
    records = held_out_records(data)[:max_rows]
    questions = [_question(record) for record in records]
    engine = as_engine(model, device=device)
    tokenizer = engine.require_tokenizer()
    prompts = [
        prompt_ids(turns, tokenizer, chat_template=chat_template) if turns else _text_ids(tokenizer, record)
        for turns, record in zip(questions, records, strict=True)
    ]
    reporter.start(f"answer {rows_name(data)}", len(records), "rows")
    try:
        answers = engine.answers(
            prompts,
            stop_ids=engine.stop_ids(chat_template),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            kv_cache=rounded,
            temperature=temperature,
            seed=seed,
            on_batch=reporter.advance,
        )
    finally:
        reporter.finish()
    return write_whole(target, _lines(records, questions, answers))


def _question(record: Record) -> tuple[Message, ...]:
    """The turns up to the answer that is expected; empty for a plain text.

    Raises:
        DataError: Nothing stands before the answer.
    """
    messages = record.messages
    if messages is None:
        return ()
    asked = messages[:-1] if messages[-1].role == "assistant" else messages
    if not asked:
        raise DataError(f"{record.source}, row {record.row}: asks nothing; a turn must come before the answer")
    return asked


def _text_ids(tokenizer: Any, record: Record) -> list[int]:
    return list(tokenizer(record.text)["input_ids"])


def _lines(
    records: Sequence[Record], questions: Sequence[tuple[Message, ...]], answers: Sequence[str]
) -> Iterator[str]:
    for record, asked, text in zip(records, questions, answers, strict=True):
        line: dict[str, Any] = {"row": record.row}
        if record.messages is None:
            line["prompt"] = record.text
        else:
            line["messages"] = [{"role": turn.role, "content": turn.content} for turn in asked]
        line["answer"] = text
        if record.messages is not None and len(asked) < len(record.messages):
            line["expected"] = record.messages[-1].content
        yield json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
