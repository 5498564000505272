"""GGUF files in llama.cpp: the tokens, logits and answers of transformers, and refusals instead of crashes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from strop.errors import DataError, FileFormatError, MissingInputError, ModelError, StropError, UsageError
from strop.models import load
from strop.runtime.library import library
from strop.runtime.llama_cpp import GgufModel, require_runtime
from tests.runtime.files import tiny_gguf
from tests.tiny import BOS, END, EOS, START, tiny_input

TEXTS = (
    "",
    "the quick brown fox",
    "  two  spaces\n\n\tand a tab",
    "naïve café, 数学 🙂",
    f"{START}user\nhello{END}\n",
    "1234567",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    return tmp_path_factory.mktemp("runtime")


@pytest.fixture(scope="module")
def path(place: Path) -> Path:
    return tiny_gguf(place)


@pytest.fixture(scope="module")
def gguf(path: Path):
    with GgufModel.open(path, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def opened(path: Path):
    return load(path.parent / "llama")


def divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    wanted, seen = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return (wanted.exp() * (wanted - seen)).sum(-1)


def test_logits_are_those_of_transformers_at_every_position(gguf: GgufModel, opened):
    ids = tiny_input(rows=1, length=200)
    with torch.inference_mode():
        expected = opened.model(ids).logits[0]
    found = torch.from_numpy(gguf.logits(ids[0].tolist()))
    assert (found.dtype, found.shape) == (torch.float32, (200, gguf.vocabulary))
    assert divergence(expected, found).max() < 1e-9


def test_logits_of_chosen_positions_are_those_of_the_whole_and_calls_are_independent(gguf: GgufModel):
    ids = tiny_input(rows=1, length=30)[0].tolist()
    whole = gguf.logits(ids)
    assert np.array_equal(whole, gguf.logits(ids))
    chosen = np.concatenate([*gguf.logit_pieces(ids, [3, 4, 20])])
    assert np.abs(chosen - whole[[3, 4, 20]]).max() < 1e-4


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_and_their_text_are_those_of_the_folders_tokenizer(gguf: GgufModel, opened, text: str):
    ids = gguf.tokenize(text, add_special=False)
    assert ids == opened.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert gguf.detokenize(ids, special=True) == text


def test_the_files_tokenizer_tells_what_a_template_asks_for(gguf: GgufModel, opened):
    mine, theirs = gguf.tokenizer, opened.tokenizer
    assert mine.chat_template == theirs.chat_template
    assert mine.special_tokens_map.items() >= {"bos_token": BOS, "eos_token": EOS}.items()
    assert (mine.bos_token_id, mine.eos_token_id, mine.pad_token_id) == (1, 2, 0)
    assert (mine.get_vocab(), len(mine)) == (theirs.get_vocab(), len(theirs))
    assert {START, END, EOS} <= {str(token) for token in mine.added_tokens_decoder.values() if token.special}


def test_greedy_answers_are_those_of_transformers(gguf: GgufModel, opened):
    for ids in tiny_input(rows=3, length=9):
        with torch.inference_mode():
            expected = opened.model.generate(
                ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=24, do_sample=False, eos_token_id=2
            )
        new = expected[0, len(ids) :].tolist()
        found = gguf.generate(ids.tolist(), 24, [2])
        assert found.ids == [token for token in new if token != 2]
        assert min(found.prompt_seconds, found.new_seconds) > 0


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(gguf: GgufModel):
    ids = tiny_input(rows=1, length=9)[0].tolist()
    free = gguf.generate(ids, 12, []).ids
    cut = gguf.generate(ids, 12, [free[5]])
    assert (cut.stopped, cut.ids) == (True, free[: free.index(free[5])])
    short = gguf.generate(ids, 3, [])
    assert (short.stopped, short.ids) == (False, free[:3])


def test_drawn_answers_follow_their_seed_and_the_share_of_probability(gguf: GgufModel):
    ids = tiny_input(rows=1, length=9)[0].tolist()

    def drawn(**options) -> list[int]:
        return list(gguf.stream(ids, max_tokens=20, stop_ids=[], temperature=1.5, **options))

    assert drawn(seed=1) == drawn(seed=1)
    assert len({tuple(drawn(seed=seed)) for seed in range(4)}) == 4
    assert drawn(seed=1, top_p=1e-6) == gguf.generate(ids, 20, []).ids


def test_an_answer_ends_where_the_context_does(place: Path):
    with GgufModel.open(place / "tiny-f32.gguf", context=16, threads=1) as model:
        context = model.context
        prompt = [5] * (context - 3)
        assert len(model.generate(prompt, 100, []).ids) == 3
        with pytest.raises(UsageError, match=f"context of {context}"):
            model.generate([5] * context, 1, [])
        with pytest.raises(UsageError, match=f"{context + 1} tokens"):
            model.logits([5] * (context + 1))


def test_misuse_is_refused_by_name(gguf: GgufModel, tmp_path: Path):
    with pytest.raises(UsageError, match="no token 9999"):
        gguf.logits([9999])
    with pytest.raises(UsageError, match="without a token"):
        gguf.logits([])
    with pytest.raises(UsageError, match="temperature"):
        gguf.generate([5], 4, temperature=-1)
    with pytest.raises(DataError, match="cannot be tokenized"):
        gguf.tokenize("\ud800")
    with pytest.raises(MissingInputError, match=r"nowhere\.gguf: no such file"):
        GgufModel.open(tmp_path / "nowhere.gguf")
    with pytest.raises(UsageError, match="threads 0"):
        GgufModel.open(gguf.path, threads=0)


@pytest.mark.parametrize("keep", [0, 3, 100, 20_000, -1])
def test_a_truncated_file_is_refused_and_no_crash(path: Path, tmp_path: Path, keep: int):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match=r"broken\.gguf"):
        GgufModel.open(broken)


def test_weights_that_are_no_numbers_are_refused(place: Path, tmp_path: Path):
    content = bytearray((place / "tiny-f32.gguf").read_bytes())
    content[-64:] = np.full(16, np.nan, np.float32).tobytes()
    broken = tmp_path / "nan.gguf"
    broken.write_bytes(content)
    with pytest.raises(ModelError, match=r"nan\.gguf"):
        GgufModel.open(broken, threads=1).logits([5, 6])


def test_nothing_reaches_the_screen(path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "broken.gguf").write_bytes(path.read_bytes()[:-1])
    with GgufModel.open(path, threads=1) as model:
        model.generate([5, 6], 2)
    with pytest.raises(StropError):
        GgufModel.open(tmp_path / "broken.gguf")
    assert capfd.readouterr() == ("", "")


def test_without_the_package_the_extra_to_install_is_named(monkeypatch: pytest.MonkeyPatch, path: Path):
    library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", None)
    try:
        for use in (require_runtime, lambda: GgufModel.open(path)):
            with pytest.raises(UsageError, match=r"strop\[gguf\]"):
                use()
    finally:
        library.cache_clear()
