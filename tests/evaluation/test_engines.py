"""A GGUF file and the folder that it was made from behind the same calls: the same answers, scores and refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from strop.data.records import read_records
from strop.data.samples import prepare
from strop.errors import DataError, FileFormatError, MissingInputError, ModelError, UsageError
from strop.evaluation.divergence import Divergence, ReferenceLogits
from strop.evaluation.engines import Engine, as_engine, open_engine
from strop.evaluation.kv_cache import KVFormat
from strop.evaluation.likelihood import Likelihood
from strop.models import load
from strop.recipes.compare import compare
from strop.recipes.generate import Chat, predict
from strop.runtime.llama_cpp import GgufModel
from strop.scratch import Scratch
from tests.runtime.files import tiny_gguf
from tests.tiny import tiny_chat_file, tiny_folder, tiny_tokenizer

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    tiny_gguf(folder)
    tiny_gguf(folder, "q8_0")
    tiny_chat_file(folder / "rows.jsonl", rows=10)
    return folder


@pytest.fixture(scope="module")
def both(place: Path) -> tuple[Engine, Engine]:
    return open_engine(place / "llama"), open_engine(place / "tiny-f32.gguf")


def test_what_is_open_already_is_not_opened_again(place: Path):
    opened, model = load(place / "llama"), GgufModel.open(place / "tiny-f32.gguf")
    assert as_engine(opened).network is opened.model
    engine = as_engine(model)
    assert (engine.network, as_engine(engine)) == (None, engine)
    assert (engine.format, engine.context, engine.source) == ("gguf:f32", 256, str(place / "tiny-f32.gguf"))


def test_answers_are_the_same_streamed_or_not(both: tuple[Engine, Engine]):
    prompts = [tiny_tokenizer()(text)["input_ids"] for text in ("the quick", "say red", "what is the time")]
    folder, file = (
        engine.answers(prompts, stop_ids=engine.stop_ids(), max_new_tokens=16, batch_size=1) for engine in both
    )
    assert folder == file
    for engine in both:
        pieces: list[str] = []
        told: list[int] = []
        [answer] = engine.answers(
            prompts[:1], stop_ids=engine.stop_ids(), max_new_tokens=16, stream=pieces.append, on_batch=told.append
        )
        assert "".join(pieces) == answer == file[0]
        assert told == [1]
        ids = list(engine.stream(prompts[0], stop_ids=[], max_new_tokens=5))
        assert len(ids) == 5
        assert list(engine.stream(prompts[0], stop_ids=[ids[2]], max_new_tokens=5)) == ids[: ids.index(ids[2]) + 1]


def test_a_stream_that_is_closed_ends(both: tuple[Engine, Engine]):
    for engine in both:
        stream = engine.stream([5, 6], stop_ids=[], max_new_tokens=200)
        first = next(stream)
        stream.close()
        assert next(engine.stream([5, 6], stop_ids=[], max_new_tokens=1)) == first


def test_scores_and_divergence_are_the_same(both: tuple[Engine, Engine], place: Path):
    samples = list(prepare(read_records(place / "rows.jsonl"), tiny_tokenizer(), max_length=64))
    with Scratch() as scratch:
        reference, likelihood = ReferenceLogits(len(samples), scratch), Likelihood(len(samples))
        both[0].score(samples, [reference, likelihood], batch_size=3)
        divergence, other = Divergence(reference), Likelihood(len(samples))
        both[1].score(samples, [divergence, other], batch_size=3)
    assert torch.equal(likelihood.tokens, other.tokens)
    torch.testing.assert_close(likelihood.nll_sums, other.nll_sums, rtol=1e-5, atol=1e-4)
    assert divergence.mean_kl < 1e-6
    assert divergence.top1_agreement == 1


def test_speed_and_the_caches_size_are_told(both: tuple[Engine, Engine]):
    folder, file = both
    assert folder.cache_bytes(None) == file.cache_bytes(None)
    speed = file.speed()
    assert (speed.prefill.tokens, speed.decode.tokens, speed.decode.repeats) == (128, 32, 3)
    assert 0 < speed.decode.slowest <= speed.decode.median <= speed.decode.fastest


def test_what_llama_cpp_does_not_do_is_refused(both: tuple[Engine, Engine], place: Path):
    for use in (
        lambda: both[1].answers([[5]], stop_ids=[], kv_cache=KVFormat("int8")),
        lambda: both[1].score([], [], kv_cache=KVFormat("int8")),
        lambda: both[1].cache_bytes(KVFormat("int4")),
        lambda: compare([place / "llama", place / "tiny-f32.gguf"], place / "rows.jsonl", kv_cache="int8"),
    ):
        with pytest.raises(UsageError, match="rounds the cache of models that transformers runs"):
            use()
    with pytest.raises(UsageError, match="'cuda'"):
        open_engine(place / "tiny-f32.gguf", device="cuda")
    with pytest.raises(UsageError, match=r"prompt 1 has 300 tokens"):
        both[1].answers([[5], [5] * 300], stop_ids=[])


def test_predict_answers_a_file_of_rows_from_a_gguf_file_as_from_its_folder(place: Path, tmp_path: Path):
    for name in ("llama", "tiny-f32.gguf"):
        predict(place / name, place / "rows.jsonl", tmp_path / f"{name}.jsonl", max_new_tokens=8, batch_size=1)
    folder, file = ((tmp_path / f"{name}.jsonl").read_text() for name in ("llama", "tiny-f32.gguf"))
    assert folder == file
    assert len(file.splitlines()) == 10
    assert json.loads(file.splitlines()[0])["expected"] == "red 0"


def test_a_chat_with_a_file_is_the_chat_with_its_folder(place: Path):
    folder, file = (Chat(open_engine(place / name), max_new_tokens=8) for name in ("llama", "tiny-f32.gguf"))
    for text in ("say red", "and again"):
        assert folder.ask(text) == file.ask(text)
    assert folder.turns == file.turns


def test_a_hostile_template_in_a_file_is_refused(place: Path):
    for kind, template in (("bf16", "{{ ''.__class__.__mro__[1].__subclasses__() }}"), ("q4_0", "{{ 'x' * 10 ** 9 }}")):
        chat = Chat(open_engine(tiny_gguf(place, kind, template=template)))
        with pytest.raises(DataError):
            chat.ask("hello")


def test_files_and_folders_are_compared(place: Path):
    rows = place / "rows.jsonl"
    found = compare([place / "llama", place / "tiny-f32.gguf", place / "tiny-q8_0.gguf"], rows, task="exact-match")
    folder, exact, rounded = found.models
    assert (exact.format, rounded.format) == ("gguf:f32", "gguf:q8_0")
    assert exact.weights_bytes == (place / "tiny-f32.gguf").stat().st_size > rounded.weights_bytes
    assert exact.loss.estimate == pytest.approx(folder.loss.estimate, rel=1e-5)
    assert exact.kl is not None
    assert rounded.kl is not None
    assert exact.kl.estimate < 1e-6 < rounded.kl.estimate < 0.05
    assert exact.top1_agreement is not None
    assert exact.top1_agreement.estimate == 1
    assert exact.speed is not None
    assert exact.speed.decode.median > 0
    assert exact.layer_errors is None
    other = compare([place / "tiny-f32.gguf", place / "llama"], rows, speed=False)
    assert other.models[1].kl is not None
    assert other.models[1].kl.estimate < 1e-6
    assert [len(row) for row in found.rows()] == [len(found.headers())] * 3


@pytest.mark.parametrize("verb", ["predict", "compare", "compare second"])
@pytest.mark.parametrize(("name", "error"), [("broken.gguf", FileFormatError), ("nothing.gguf", MissingInputError)])
def test_a_truncated_or_missing_file_is_refused_by_name(
    place: Path, tmp_path: Path, verb: str, name: str, error: type[Exception]
):
    (tmp_path / "broken.gguf").write_bytes((place / "tiny-f32.gguf").read_bytes()[:-64])
    rows, answers, models = place / "rows.jsonl", tmp_path / "answers.jsonl", [tmp_path / name, place / "llama"]
    use = {
        "predict": lambda: predict(tmp_path / name, rows, answers),
        "compare": lambda: compare(models, rows),
        "compare second": lambda: compare(models[::-1], rows),
    }[verb]
    with pytest.raises(error, match=re.escape(name)):
        use()
    assert not answers.exists()


def test_models_of_other_vocabularies_are_not_compared(place: Path, tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|more|>"])
    other = tiny_folder(tmp_path, "llama", tokenizer=tokenizer, vocab_size=len(tokenizer))
    with pytest.raises(ModelError, match="need the same vocabulary"):
        compare([place / "tiny-f32.gguf", other], place / "rows.jsonl")
