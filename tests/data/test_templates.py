"""What is learned, what is served, and that the two agree."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strop.data.records import Message, Record
from strop.data.samples import prepare
from strop.data.templates import (
    IGNORED,
    Sample,
    prompt_ids,
    render,
    set_chat_template,
    stop_ids,
)
from strop.errors import DataError, MissingInputError
from tests.data.chats import (
    APPENDING,
    CHATML,
    COUNTING,
    LLAMA2,
    LLAMA3,
    MARKED,
    STOPLESS,
    THINKING,
    TRIMMING,
    conversation,
    record,
)
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat_template=False)

CHATS = {
    "one turn": ("what is the time", "half past six"),
    "two turns": ("set the alarm", "for six?", "yes", "done"),
    "three turns": ("a", "b", "c", "d", "e", "f"),
    "spaces": ("  hi ", "  the quick  ", "\nok\n", "\n\nfox\n"),
    "same words": ("again again", "again", "again", "again"),
    "scripts": ("größe 多少", "שלום 🙂", "é", "ñandú"),
}


def supervised_texts(sample: Sample) -> list[str]:
    """The runs of learned tokens as text."""
    runs: list[list[int]] = []
    for place, label in enumerate(sample.labels):
        if label == IGNORED:
            continue
        assert label == sample.input_ids[place]
        if place == 0 or sample.labels[place - 1] == IGNORED:
            runs.append([])
        runs[-1].append(label)
    return [TOKENIZER.decode(run) for run in runs]


def oracle(name: str, content: str, *, last: bool) -> str:
    """What the model must write for an answer under each template, worked out by hand."""
    stop = {"llama2": "<|eos|>", "llama3": "<|eos|>", "built-in-plain": "<|eos|>"}.get(name, "<|im_end|>")
    if name == "llama2":
        return f" {content} {stop}"
    if name == "built-in-plain":
        return f" {content}{stop}"
    if name in ("llama3", "trimming"):
        return content.strip() + stop
    if name == "thinking":
        return ("<think>\n\n</think>\n\n" if last else "") + content.lstrip("\n") + stop
    return content + stop


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", APPENDING)
def test_exactly_the_answers_and_their_stop_tokens_are_learned(name: str, chat: str) -> None:
    contents = CHATS[chat]
    sample = render(record(*contents), TOKENIZER, chat_template=APPENDING[name])
    answers = contents[1::2]
    expected = [oracle(name, text, last=place == len(answers) - 1) for place, text in enumerate(answers)]
    assert supervised_texts(sample) == expected
    assert [TOKENIZER.decode(sample.input_ids[start:end]) for start, end in sample.answers] == expected


@pytest.mark.parametrize("max_length", range(4, 60, 5))
@pytest.mark.parametrize("name", APPENDING)
def test_truncation_keeps_the_beginning_and_the_mask_as_it_was(name: str, max_length: int) -> None:
    contents = CHATS["two turns"]
    whole = render(record(*contents), TOKENIZER, chat_template=APPENDING[name])
    if not any(start < max_length for start, _ in whole.answers):
        with pytest.raises(DataError, match=f"beyond max_length {max_length}.*raise max_length"):
            prepare([record(*contents)], TOKENIZER, max_length=max_length, chat_template=APPENDING[name])
        return
    [cut] = prepare([record(*contents)], TOKENIZER, max_length=max_length, chat_template=APPENDING[name])
    assert cut.input_ids == whole.input_ids[:max_length]
    assert cut.labels == whole.labels[:max_length]


def test_the_first_token_is_never_learned_and_all_the_others_are_on_request() -> None:
    for name, template in APPENDING.items():
        sample = render(record("hi", "ho"), TOKENIZER, train_on="all", chat_template=template)
        assert sample.labels == [IGNORED, *sample.input_ids[1:]], name


def test_answers_marked_as_context_are_not_learned() -> None:
    messages = (Message("user", "a"), Message("assistant", "b", supervise=False), *conversation("c", "d"))
    sample = render(Record("f", 1, messages=messages), TOKENIZER, chat_template=CHATML)
    assert supervised_texts(sample) == ["d<|im_end|>"]


WRITTEN = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)
CONTROL = st.sampled_from(["<|im_end|>", "<|eos|>", "<|bos|> x", "a<|im_start|>user\n", "<think>x", "\n\n\n a \n"])
# One template drops reasoning, which makes it one that does not only append; that has a test of its own.
TEXT = st.one_of(WRITTEN, WRITTEN, CONTROL).filter(lambda text: text.strip() and "</think>" not in text)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4).map(lambda pairs: [t for pair in pairs for t in pair])


@pytest.mark.parametrize("name", APPENDING)
@settings(deadline=None, max_examples=30)
@given(contents=TURNS)
def test_a_prompt_is_the_beginning_of_the_tokens_that_were_trained(name: str, contents: list[str]) -> None:
    template = APPENDING[name]
    messages = conversation(*contents)
    sample = render(Record("f", 1, messages=messages), TOKENIZER, chat_template=template)
    for turn, (start, _) in zip(range(1, len(messages), 2), sample.answers, strict=True):
        prompt = prompt_ids(messages[:turn], TOKENIZER, chat_template=template)
        assert prompt == sample.input_ids[: len(prompt)]
        assert len(prompt) == start


@pytest.mark.parametrize("name", APPENDING)
@settings(deadline=None, max_examples=15)
@given(contents=TURNS)
def test_the_tokens_spell_the_templates_text(name: str, contents: list[str]) -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    set_chat_template(tokenizer, APPENDING[name])
    messages = conversation(*contents)
    sample = render(Record("f", 1, messages=messages), tokenizer)
    chat = [{"role": message.role, "content": message.content} for message in messages]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(sample.input_ids) == text


@pytest.mark.parametrize("name", APPENDING)
def test_a_first_prompt_has_the_tokens_that_transformers_serves(name: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    set_chat_template(tokenizer, APPENDING[name])
    chat = [{"role": "user", "content": "what is the time"}]
    served = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(chat, tokenizer) == served


def test_tokens_do_not_cross_from_the_prompt_into_the_answer() -> None:
    # "\n" at the prompt's end and "\n\n" at the answer's start are one token to a tokenizer that has it.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["a\n\n\nb\n\nc\n\n\n"] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    assert len(tokenizer.encode("\n\n\n")) == 1
    messages = conversation("hi", "\n\nyes", "ok", "\nno")
    sample = render(Record("f", 1, messages=messages), tokenizer, chat_template=CHATML)
    for turn in (1, 3):
        prompt = prompt_ids(messages[:turn], tokenizer, chat_template=CHATML)
        assert sample.input_ids[: len(prompt)] == prompt
    spans = [tokenizer.decode(sample.input_ids[start:end]) for start, end in sample.answers]
    assert spans == ["\n\nyes<|im_end|>", "\nno<|im_end|>"]


def leading_bos(ids: list[int]) -> int:
    return next((place for place, token in enumerate(ids) if token != 1), len(ids))


@pytest.mark.parametrize(
    ("template", "expected"),
    [(CHATML, 0), (LLAMA3, 1), (LLAMA2, 1), ("{{ bos_token }}" + LLAMA3, 1), ("{{ bos_token * 3 }}" + LLAMA3, 1)],
    ids=["none", "one", "per turn", "two", "four"],
)
def test_a_row_and_a_prompt_begin_with_one_bos_at_most(template: str, expected: int) -> None:
    sample = render(record("hi", "ho", "he", "ha"), TOKENIZER, chat_template=template)
    assert leading_bos(sample.input_ids) == expected
    assert leading_bos(prompt_ids(conversation("hi"), TOKENIZER, chat_template=template)) == expected
    assert supervised_texts(sample)[0].strip().startswith("ho")


def bos_tokenizer():
    """The tiny tokenizer, adding BOS to every text as Llama's does."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 1)]
    )
    return tokenizer


def test_a_tokenizer_that_adds_bos_gives_one_to_texts_and_to_the_built_in_templates() -> None:
    tokenizer = bos_tokenizer()
    for text in ("the quick", "<|bos|>the quick"):
        assert leading_bos(render(Record("f.txt", 1, text=text), tokenizer).input_ids) == 1
    for name in ("chatml", "plain"):
        assert leading_bos(render(record("hi", "ho"), tokenizer, chat_template=name).input_ids) == 1
        assert leading_bos(prompt_ids(conversation("hi"), tokenizer, chat_template=name)) == 1
    assert leading_bos(render(record("hi", "ho"), tokenizer, chat_template=LLAMA3).input_ids) == 1


def test_a_text_is_learned_whole_and_closed_by_the_end_token_where_it_ends() -> None:
    sample = render(Record("f.txt", 1, text="the quick fox"), TOKENIZER)
    assert sample.labels == [IGNORED, *sample.input_ids[1:]]
    assert TOKENIZER.decode(sample.input_ids) == "the quick fox<|eos|>"
    piece = render(Record("f.txt", 1, text="the quick fox", ends=False), TOKENIZER)
    assert TOKENIZER.decode(piece.input_ids) == "the quick fox"


def test_a_tokenizer_without_a_template_is_refused_with_the_ways_out() -> None:
    for call in (
        lambda: render(record("hi", "ho"), TOKENIZER),
        lambda: prompt_ids(conversation("hi"), TOKENIZER),
    ):
        with pytest.raises(DataError, match=r"--chat-template chatml, --chat-template plain, or --chat-template FILE"):
            call()


def test_a_template_file_and_the_built_in_names_are_found_and_others_refused(tmp_path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML, encoding="utf-8")
    tokenizer = tiny_tokenizer(chat_template=False)
    assert set_chat_template(tokenizer, file) == CHATML == tokenizer.chat_template
    assert render(record("a", "b"), tokenizer) == render(record("a", "b"), TOKENIZER, chat_template=CHATML)
    with pytest.raises(MissingInputError, match=r"'chatm'.*did you mean 'chatml'"):
        set_chat_template(tokenizer, "chatm")
    file.write_text("{% for m in messages %}\n{{ m.content }", encoding="utf-8")
    with pytest.raises(DataError, match=r"chat\.jinja, line 2: not valid Jinja"):
        set_chat_template(tokenizer, file)
    file.write_bytes(b"\xff\xfe{{")
    with pytest.raises(DataError, match="UTF-8"):
        set_chat_template(tokenizer, file)


def test_the_tokenizers_default_template_is_taken_from_several() -> None:
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.chat_template = {"default": CHATML, "tool_use": COUNTING}
    assert render(record("a", "b"), tokenizer) == render(record("a", "b"), TOKENIZER, chat_template=CHATML)


def test_a_changed_template_or_token_is_noticed() -> None:
    tokenizer = tiny_tokenizer()
    before = prompt_ids(conversation("hi"), tokenizer)
    set_chat_template(tokenizer, LLAMA3)
    assert prompt_ids(conversation("hi"), tokenizer) != before
    tokenizer.bos_token = "<|pad|>"
    assert prompt_ids(conversation("hi"), tokenizer)[0] == 0


def test_a_template_that_refuses_a_system_turn_says_what_to_do() -> None:
    with pytest.raises(DataError, match=r"chats\.jsonl, row 7: .*system, user, assistant.*takes no system turn: move"):
        render(record("hi", "ho", system="be brief", row=7), TOKENIZER, chat_template=TRIMMING)


def test_a_template_that_refuses_the_order_names_the_turns() -> None:
    messages = (Message("user", "a"), Message("user", "b"), Message("assistant", "c"))
    with pytest.raises(DataError, match=r"\(user, user, assistant\).*must alternate"):
        render(Record("f", 1, messages=messages), TOKENIZER, chat_template=TRIMMING)


def test_a_template_without_a_stop_token_is_refused() -> None:
    with pytest.raises(DataError, match=r"no special token after the answer .*learn to stop.*eos_token"):
        render(record("hi", "ho"), TOKENIZER, chat_template=STOPLESS)


def test_a_template_that_rewrites_what_stands_before_is_refused_for_the_row_and_split_by_prepare() -> None:
    with pytest.raises(DataError, match=r"turn 2 .*training would not match serving"):
        render(record("a", "b", "c", "d"), TOKENIZER, chat_template=COUNTING)
    with pytest.raises(DataError, match=r"chats\.jsonl, row 1: turn 2"):
        prepare([record("a", "b", "c", "d")], TOKENIZER, max_length=64, chat_template=COUNTING)


def test_reasoning_that_a_template_drops_from_earlier_turns_is_trained_turn_by_turn() -> None:
    messages = conversation("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd")
    row = Record("f", 1, messages=messages)
    with pytest.raises(DataError, match=r"turn 2 .*drop reasoning"):
        render(row, TOKENIZER, chat_template=THINKING)
    prepared = prepare([row, record("x", "y")], TOKENIZER, max_length=256, chat_template=THINKING)
    assert [sample.index for sample in prepared] == [0, 0, 1]
    assert prepared.report.split_rows == 1
    assert supervised_texts(prepared[0]) == ["<think>\nhm\n</think>\n\nb<|im_end|>"]
    assert supervised_texts(prepared[1]) == ["<think>\nso\n</think>\n\nd<|im_end|>"]
    for sample, turn in ((prepared[0], 1), (prepared[1], 3)):
        prompt = prompt_ids(messages[:turn], TOKENIZER, chat_template=THINKING)
        assert sample.input_ids[: len(prompt)] == prompt
        assert sample.answers[0][0] == len(prompt)


def test_turns_of_a_tool_are_given_as_the_users_where_the_template_knows_no_tools() -> None:
    messages = (
        Message("user", "weather?"),
        Message("assistant", '{"name": "weather"}'),
        Message("tool", "sunny"),
        Message("assistant", "It is sunny."),
    )
    for template, role in ((CHATML, "tool"), (TRIMMING, "user"), (LLAMA2, "[INST]")):
        sample = render(Record("f", 1, messages=messages), TOKENIZER, chat_template=template)
        text = TOKENIZER.decode(sample.input_ids)
        assert role in text.split("sunny")[0].split("weather")[-1]
        assert [text.strip() for text in supervised_texts(sample)][1].startswith("It is sunny.")
        prompt = prompt_ids(messages[:3], TOKENIZER, chat_template=template)
        assert sample.input_ids[: len(prompt)] == prompt


def test_stop_ids_are_the_end_token_and_the_one_that_closes_an_answer() -> None:
    assert stop_ids(TOKENIZER, chat_template=CHATML) == [2, 4]
    assert stop_ids(TOKENIZER, chat_template=MARKED) == [2, 4]
    assert stop_ids(TOKENIZER, chat_template=LLAMA3) == [2]
    assert stop_ids(TOKENIZER, chat_template="plain") == [2]
    assert stop_ids(TOKENIZER) == [2]


def test_chatml_on_a_tokenizer_without_its_tokens_closes_answers_with_the_end_token(material) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(material / "models" / "stories260K")
    sample = render(record("hi", "ho", "he", "ha"), tokenizer, chat_template="chatml")
    assert leading_bos(sample.input_ids) == 1
    assert [sample.input_ids[end - 1] for _, end in sample.answers] == [tokenizer.eos_token_id] * 2
    assert stop_ids(tokenizer, chat_template="chatml") == [tokenizer.eos_token_id]


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_prompts_are_prefixes_with_a_tokenizer_that_puts_a_space_before_first_words(material, name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(material / "models" / "stories260K")
    messages = conversation("Once upon", "a time", "there was", " a little girl", "and", "\nshe")
    sample = render(Record("f", 1, messages=messages), tokenizer, chat_template=name)
    for turn, (start, _) in zip((1, 3, 5), sample.answers, strict=True):
        prompt = prompt_ids(messages[:turn], tokenizer, chat_template=name)
        assert sample.input_ids[: len(prompt)] == prompt
        assert len(prompt) == start


def test_a_conversation_that_ends_with_an_answer_asks_for_nothing() -> None:
    with pytest.raises(DataError, match="nothing to answer"):
        prompt_ids(conversation("a", "b"), TOKENIZER, chat_template=CHATML)
    with pytest.raises(DataError, match="nothing to answer"):
        prompt_ids([], TOKENIZER, chat_template=CHATML)
    with pytest.raises(DataError, match="needs a role"):
        prompt_ids([{"content": "a"}], TOKENIZER, chat_template=CHATML)


def test_a_conversation_may_begin_with_an_answer() -> None:
    messages = (Message("assistant", "welcome"), *conversation("a", "b"))
    sample = render(Record("f", 1, messages=messages), TOKENIZER, chat_template=CHATML)
    assert supervised_texts(sample) == ["welcome<|im_end|>", "b<|im_end|>"]
