from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from strop.errors import FileFormatError, FormatError, ModelError
from strop.files.gguf import pretokenizers
from strop.files.gguf.sentencepiece import SentencePieceModel, read_sentencepiece
from strop.files.gguf.vocabulary import TokenType, Vocabulary, vocabulary, vocabulary_of_pieces
from strop.models.opening import open_tokenizer
from strop.models.sources import find_folder
from tests.files.gguf_texts import LlamaVocabulary, unicode_texts
from tests.tiny import tiny_tokenizer

TEXTS = unicode_texts(10_000)


def _differing(tokenizer: Any, words: Vocabulary, folder: Path, texts: list[str] = TEXTS) -> list[str]:
    """Texts that llama.cpp turns into other ids than transformers."""
    pytest.importorskip("llama_cpp")
    opened = LlamaVocabulary(words, folder / "vocabulary.gguf")
    try:
        wanted = _ids(tokenizer, texts)
        return [text for text, ids in zip(texts, wanted, strict=True) if opened.ids(text) != ids]
    finally:
        opened.close()


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """transformers' ids, kept with the tokenizer for the next vocabulary that is made of it."""
    known = vars(tokenizer).setdefault("_ids_of_texts", {})
    if len(texts) not in known:
        known[len(texts)] = tokenizer(texts)["input_ids"]
    return known[len(texts)]


def _words(tokenizer: Any, **options: Any) -> Vocabulary:
    return vocabulary(tokenizer, rows=len(tokenizer) + 3, stops=[tokenizer.eos_token_id], **options)


# --- 10,000 texts -----------------------------------------------------------------------------------------------------


def test_the_bundled_models_ids_are_the_same_in_llama_cpp(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(find_folder("demo"))
    words = _words(tokenizer)
    assert (words.model, words.keys["pre"], words.notes) == ("gpt2", "smollm", [])
    assert not _differing(tokenizer, words, tmp_path)


def test_a_sentencepiece_bpe_gives_the_same_ids_by_scores_and_by_ranks_of_merges(
    material: Path, tmp_path: Path
) -> None:
    folder = material / "models" / "stories260K"
    tokenizer, pieces = open_tokenizer(folder), read_sentencepiece(folder / "tokenizer.model")
    for words in (_words(tokenizer, pieces=pieces), _words(tokenizer)):
        assert (words.model, words.keys["add_bos_token"], words.keys["add_space_prefix"]) == ("llama", True, True)
        assert not _differing(tokenizer, words, tmp_path)


def test_gpt2s_ids_are_the_same_in_llama_cpp(material: Path, tmp_path: Path) -> None:
    folder = material / "tokenizers" / "gpt2"
    known = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    backend = Tokenizer(models.BPE(known, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    words = _words(tokenizer)
    assert words.keys["pre"] == "gpt-2"
    assert not _differing(tokenizer, words, tmp_path)


def test_mistrals_sentencepiece_file_alone_gives_the_ids_of_its_fast_tokenizer(material: Path, tmp_path: Path) -> None:
    pieces = read_sentencepiece(material / "tokenizers" / "mistral-v3" / "tokenizer.model")
    assert (len(pieces.texts), pieces.special) == (32768, {"unk": 0, "bos": 1, "eos": 2})
    tokenizer = _fast(pieces)
    alone = vocabulary_of_pieces(pieces, rows=32770, stops=[2])
    assert alone.types[3] == TokenType.CONTROL  # [INST]
    assert not _differing(tokenizer, alone, tmp_path)
    assert not _differing(tokenizer, _words(tokenizer), tmp_path)


@pytest.fixture(scope="module")
def sample() -> list[str]:
    return [
        "the quick brown fox jumps over the lazy dog, and it's half past 6:30 today!\n\n",
        *unicode_texts(800, seed=1),
    ]


@pytest.mark.parametrize("name", [name for name in pretokenizers._KNOWN if name not in pretokenizers.APPROXIMATE])
def test_every_pre_tokenizer_is_recognised_and_gives_the_same_ids(name: str, sample: list[str], tmp_path: Path) -> None:
    tokenizer = _byte_level(name, sample)
    words = _words(tokenizer)
    assert words.keys["pre"] == name
    assert not _differing(tokenizer, words, tmp_path, TEXTS[:2000])


@pytest.mark.parametrize("name", sorted(pretokenizers.APPROXIMATE))
def test_where_llama_cpp_knows_no_combining_marks_the_difference_is_said(
    name: str, sample: list[str], tmp_path: Path
) -> None:
    tokenizer = _byte_level(name, sample)
    words = _words(tokenizer)
    assert words.keys["pre"] == name
    assert any("combining marks" in note for note in words.notes)
    plain = ["It's 1,234 o'clock.\n\n Ärger, déjà vu! FOO barBaz", "привет, мир 漢字"]
    assert not _differing(tokenizer, words, tmp_path, plain)


def test_a_unigram_gives_the_same_ids(tmp_path: Path) -> None:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    words = [text for text in Path(__file__).read_text(encoding="utf-8").splitlines() if text.strip()]
    backend.train_from_iterator(words, trainer)
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    made = _words(tokenizer)
    assert (made.model, made.keys["add_eos_token"], made.keys["remove_extra_whitespaces"]) == ("t5", True, True)
    assert any("tabs and line ends" in note for note in made.notes)
    texts = [text for text in TEXTS if text.rstrip() == text.rstrip(" ")]
    assert len(texts) > 9000
    assert not _differing(tokenizer, made, tmp_path, texts)


# --- special tokens, padding, templates -------------------------------------------------------------------------------


def test_rows_without_a_token_are_padded_with_tokens_that_no_text_reaches() -> None:
    words = vocabulary(tiny_tokenizer(), rows=320, stops=[2])
    assert (len(words.tokens), len(words.types), len(set(words.tokens))) == (320, 320, 320)
    assert words.types[304:] == [TokenType.UNUSED] * 16
    assert words.types[:5] == [TokenType.CONTROL] * 5


def test_special_ids_flags_and_the_template_are_embedded(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    words = vocabulary(tokenizer, rows=304, stops=[2, 4, 3, 0])
    keys = words.metadata()
    ids = {name: keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "eom", "padding")}
    assert ids == {"bos": 1, "eos": 2, "eot": 4, "eom": 3, "padding": 0}
    assert any("left out: <|pad|>" in note for note in words.notes)
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (False, False)
    assert keys["tokenizer.chat_template"] == tokenizer.chat_template
    pytest.importorskip("llama_cpp")
    opened = LlamaVocabulary(words, tmp_path / "v.gguf")
    assert [token for token in range(304) if opened.stops(token)] == [2, 3, 4]
    opened.close()


def test_what_the_tokenizer_puts_around_a_text_is_flagged_or_noted(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|bos|> $A <|eos|>", special_tokens=[("<|bos|>", 1), ("<|eos|>", 2)]
    )
    words = vocabulary(tokenizer, rows=304, stops=[2])
    assert (words.keys["add_bos_token"], words.keys["add_eos_token"]) == (True, True)
    assert not _differing(tokenizer, words, tmp_path, TEXTS[:200])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|bos|> <|im_start|> $A", special_tokens=[("<|bos|>", 1), ("<|im_start|>", 3)]
    )
    assert any("[1, 3] before" in note for note in vocabulary(tokenizer, rows=304, stops=[2]).notes)


def test_a_token_beyond_the_embedding_is_left_out_and_named_a_piece_beyond_it_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|beyond|>"], special_tokens=True)
    words = vocabulary(tokenizer, rows=304, stops=[2])
    assert "<|beyond|>" not in words.tokens
    assert any("<|beyond|>" in note for note in words.notes)
    with pytest.raises(ModelError, match="a token of id 303, the embedding 303 rows"):
        vocabulary(tiny_tokenizer(), rows=303, stops=[2])


# --- refused ----------------------------------------------------------------------------------------------------------


def _changed(**steps: Any) -> Any:
    tokenizer = tiny_tokenizer()
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    fields["model"] |= steps.pop("model", {})
    backend = Tokenizer.from_str(json.dumps(fields))
    for name, step in steps.items():
        setattr(backend, name, step)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (
            lambda: _changed(
                pre_tokenizer=pre_tokenizers.Sequence(
                    [pre_tokenizers.Split(Regex(r"\w+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
                )
            ),
            "no pre-tokenizer of llama.cpp does.*Known are gpt-2, smollm, llama-bpe",
        ),
        (lambda: _changed(model={"ignore_merges": True}), "nearest, gpt-2, cuts alike and has ignore_merges False"),
        (lambda: _changed(pre_tokenizer=pre_tokenizers.Whitespace()), "works neither on bytes .*Whitespace"),
        (lambda: _changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
        (lambda: _changed(normalizer=normalizers.Lowercase()), "normalizes text .Lowercase."),
        (lambda: _changed(model={"end_of_word_suffix": "</w>"}), "end_of_word_suffix"),
        (lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))), "WordLevel"),
    ],
    ids=["pre-tokenizer", "ignore_merges", "words", "prefix", "normalizer", "suffix", "kind"],
)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused_with_what_they_do(tokenizer: Any, said: str) -> None:
    made = tokenizer()
    with pytest.raises(FormatError, match=f"(?s){said}"):
        vocabulary(made, rows=400, stops=[0])


def test_normal_forms_are_noted_as_llama_cpp_has_none() -> None:
    words = vocabulary(_changed(normalizer=normalizers.NFC()), rows=304, stops=[2])
    assert any("NFC" in note for note in words.notes)


def test_two_tokens_of_one_text_are_refused() -> None:
    pieces = SentencePieceModel("bpe", ["a", "b", "a"], [0.0] * 3, [1] * 3, True, {}, b"", True, False)
    with pytest.raises(ModelError, match="two tokens of the text 'a'"):
        vocabulary_of_pieces(pieces, rows=3, stops=[])


# --- tokenizer.model --------------------------------------------------------------------------------------------------


def _field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return bytes([number << 3]) + bytes([value])
    return bytes([number << 3 | 2, len(value)]) + value


def test_a_sentencepiece_file_is_read_byte_by_byte(tmp_path: Path) -> None:
    piece = _field(1, "▁a".encode()) + b"\x15\x00\x00\x80\xbf"  # field 2, fixed 32 bits: -1.0
    trainer = _field(3, 2) + b"\x98\x02\x01"  # field 35, byte fallback
    normalizer = _field(3, 0) + _field(4, 1)
    raw = _field(1, _field(1, b"<unk>") + _field(3, 2)) + _field(1, piece) + _field(2, trainer) + _field(3, normalizer)
    (tmp_path / "tokenizer.model").write_bytes(raw)
    found = read_sentencepiece(tmp_path / "tokenizer.model")
    assert (found.algorithm, found.texts, found.scores, found.kinds) == ("bpe", ["<unk>", "▁a"], [0.0, -1.0], [2, 1])
    assert (found.byte_fallback, found.space_before, found.merges_spaces) == (True, False, True)
    for length in range(len(raw)):  # cut anywhere: our own error, or the pieces that were whole
        (tmp_path / "cut").write_bytes(raw[:length])
        with contextlib.suppress(FileFormatError):
            assert len(read_sentencepiece(tmp_path / "cut").texts) <= 2


@pytest.mark.parametrize("raw", [b"", b"\x0a\xff\xff\xff\xff\x7f", b"\x0b", b"\xff" * 12, b"{}", b"GGUF" * 9])
def test_what_is_no_sentencepiece_file_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(FileFormatError, match="no SentencePiece model"):
        read_sentencepiece(tmp_path / "tokenizer.model")


# --- made here --------------------------------------------------------------------------------------------------------


def _byte_level(name: str, texts: list[str]) -> Any:
    """A byte-level BPE that cuts by one of the known expressions, trained on a few texts."""
    backend = Tokenizer(models.BPE(ignore_merges=pretokenizers._KNOWN[name].ignore_merges))
    backend.pre_tokenizer = pretokenizers._built(name)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def _fast(pieces: SentencePieceModel) -> Any:
    """The tokenizer that transformers makes of a SentencePiece BPE: a merge for every way to make a piece of two."""
    place = {text: at for at, text in enumerate(pieces.texts)}

    def merges() -> Iterator[tuple[float, int, str, str]]:
        for text, score in zip(pieces.texts, pieces.scores, strict=True):
            ways = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
            for left, right in sorted(
                (way for way in ways if way[0] in place and way[1] in place),
                key=lambda way: (place[way[0]], place[way[1]]),
            ):
                yield -score, len(text), left, right

    ordered = sorted(merges(), key=lambda one: one[0])
    backend = Tokenizer(
        models.BPE(
            place, [(left, right) for *_, left, right in ordered], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([text for text, kind in zip(pieces.texts, pieces.kinds, strict=True) if kind in (2, 3)])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
