"""The pretraining text and the program that trains on it: the same bits again, and nothing of the task in it."""

import hashlib
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from strop.demo import drills, everyday, model_path, packing, pretrain, text, tokenizer
from strop.demo import words as w

PROVENANCE = json.loads((Path(text.__file__).parent / "provenance.json").read_text())


@pytest.fixture(scope="module")
def sample():
    return list(text.documents(seed=3, count=1_500))


@pytest.fixture(scope="module")
def learnt(sample):
    return tokenizer.train((piece for document in sample for _, piece in document), vocab_size=500)


def test_text_hash_is_the_committed_one():
    if sys.version.split()[0] != PROVENANCE["python"]:
        pytest.skip(f"the text was made under Python {PROVENANCE['python']}; another library has other docstrings")
    first = text.documents(seed=PROVENANCE["seed"], count=PROVENANCE["sample_documents"])
    assert text.text_hash(first) == PROVENANCE["sample_sha256"]


def test_documents_are_deterministic_and_depend_on_the_seed(sample):
    assert list(text.documents(seed=3, count=50)) == sample[:50]
    assert list(text.documents(seed=4, count=50)) != sample[:50]


def test_library_prose_is_read_without_running_it():
    code = (
        "import sys\n"
        "from strop.demo.text import library_paragraphs\n"
        "assert len(library_paragraphs()) > 1000\n"
        "assert not {'this', 'antigravity', 'turtle', 'tkinter', 'pydoc_data.topics'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_document_holds_the_tasks_mapping(sample):
    chat = [piece for document in sample for role, piece in document if role == "assistant"]
    assert not any('"action"' in piece for piece in chat)
    assert not any(
        re.search(r"set_alarm|set_timer|send_message|log_workout|add_event|add_item", piece) for piece in chat
    )


def test_no_document_holds_an_invented_word_of_the_held_out_side():
    rng = random.Random(9)
    for _ in range(300):
        assert not w.is_held_out(w.invent(rng))


@pytest.mark.parametrize("drill", [d for d, _ in drills.DRILLS], ids=lambda d: d.__name__)
def test_a_drill_asks_and_answers(drill):
    rng = random.Random(1)
    for _ in range(50):
        question, answer = drill(rng)
        assert question.strip()
        assert answer.strip()
        assert "{" not in question.replace('{"', "")


def test_copying_drills_answer_with_what_the_question_holds():
    rng = random.Random(2)
    for _ in range(100):
        for drill in (drills.quote_part, drills.find_word):
            question, answer = drill(rng)
            assert answer in question


def test_dialogues_fill_every_field():
    rng = random.Random(3)
    for _ in range(300):
        assert not re.search(r"[{}]", "".join(everyday.dialogue(rng)) + everyday.paragraph(rng))


def test_packing_keeps_chat_whole_and_weights_answers_only(sample, learnt):
    ids, weights = packing.pack(learnt, sample, length=128)
    assert ids.shape == weights.shape
    assert ids.shape[1] == 128
    assert ids.dtype == np.int16
    bos, user, assistant = (learnt.token_to_id(t) for t in ("<|bos|>", "<|user|>", "<|assistant|>"))
    decoded = [learnt.decode(row.tolist(), skip_special_tokens=False) for row in ids]
    for row in decoded:
        for turn in row.split("<|user|>")[1:]:
            assert re.match(r"[^<]*<\|assistant\|>[^<]*<\|end\|>", turn), turn
    assert (weights[(ids == bos) | (ids == user) | (ids == assistant)] == 0).all()
    assert set(np.unique(weights).tolist()) <= {0.0, np.float16(packing.PROMPT_WEIGHT), 1.0}


def test_orthogonal_brings_singular_values_near_one():
    matrices = torch.randn(3, 48, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(pretrain.orthogonal(matrices).float())
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_learning_rate_warms_up_stays_and_decays():
    scales = [pretrain.learning_rate_scale(step, 1000) for step in range(1, 1001)]
    assert scales[0] == pytest.approx(1 / 50)
    assert scales[49:700] == [1.0] * 651
    assert scales[-1] == pytest.approx(0.01)
    assert all(later <= earlier for earlier, later in itertools.pairwise(scales[700:]))


def test_provenance_names_what_made_the_weights():
    wanted = {"python", "torch", "seed", "steps", "tokens", "final_loss", "minutes", "tokenizer_sha256", "text_sha256"}
    assert wanted <= set(PROVENANCE)


def test_shipped_weights_and_tokenizer_are_those_of_the_provenance():
    weights = (model_path() / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == PROVENANCE["weights_sha256"]
    shipped = Tokenizer.from_file(str(model_path() / "tokenizer.json"))
    assert hashlib.sha256(shipped.to_str().encode()).hexdigest() == PROVENANCE["tokenizer_sha256"]
