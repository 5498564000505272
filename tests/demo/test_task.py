"""The downstream task's rows: deterministic, deduplicated, with what is held out truly held out."""

import json
import random
import re

import pytest

from strop.demo import phrasings, spoken, task
from strop.demo import words as w
from strop.errors import UsageError

SMALL = {"train": 3_000, "valid": 100, "test_combinations": 300, "test_phrasings": 300, "test_strings": 300}


@pytest.fixture(scope="module")
def splits():
    return task.generate(seed=0, rows=SMALL)


def _requests(rows):
    return [row["messages"][0]["content"] for row in rows]


def _answers(rows):
    return [json.loads(row["messages"][1]["content"]) for row in rows]


def test_splits_have_the_rows_asked_for_and_no_request_occurs_twice(splits):
    assert {split: len(rows) for split, rows in splits.items()} == SMALL
    every = [request for rows in splits.values() for request in _requests(rows)]
    assert len(every) == len(set(every))


def test_equal_seeds_give_equal_rows_and_other_seeds_others(splits):
    assert task.generate(seed=0, rows=SMALL) == splits
    assert task.generate(seed=1, rows=SMALL)["train"] != splits["train"]


def test_each_action_has_at_least_25_wordings_and_held_out_ones_apart():
    per_action: dict[str, int] = {}
    for intent in phrasings.INTENTS:
        known, held_out = intent.wordings(held_out=False), intent.wordings(held_out=True)
        assert len(set(known)) == len(known)
        assert not set(known) & set(held_out)
        per_action[intent.action] = per_action.get(intent.action, 0) + len(known) + len(held_out)
        for wording in known + held_out:
            assert sorted(re.findall(r"{(\w+)}", wording)) == sorted(intent.keys), wording
    assert len(per_action) == 14
    assert min(per_action.values()) >= 25, per_action


def test_answers_are_json_with_the_slots_of_an_intent(splits):
    shapes = {("action", *intent.keys, *intent.constants) for intent in phrasings.INTENTS}
    for rows in splits.values():
        assert {tuple(answer) for answer in _answers(rows)} <= shapes


def test_rows_of_new_phrasings_use_held_out_wordings_and_the_others_known_ones(splits):
    def matches(request, *, held_out):
        for intent in phrasings.INTENTS:
            for wording in intent.wordings(held_out=held_out):
                body = re.sub(r"{\w+}", ".+", wording.removeprefix("= "))
                before = f"(({'|'.join(phrasings.PREFIXES)}) )?"
                after = f"( ({'|'.join(phrasings.SUFFIXES)}))?"
                if re.fullmatch(before + body + after, request):
                    return True
        return False

    for request in _requests(splits["test_phrasings"]):
        assert matches(request, held_out=True), request
    for split in ("train", "valid", "test_combinations", "test_strings"):
        for request in _requests(splits[split])[:100]:
            assert matches(request, held_out=False), request


def test_values_of_the_test_of_new_strings_occur_nowhere_else():
    known, new = task.known_pools(), task.new_pools()
    for field in vars(known):
        assert not set(getattr(known, field)) & set(getattr(new, field)), field
    lists = {
        word
        for values in vars(w).values()
        if isinstance(values, list)
        for value in values
        if isinstance(value, str)
        for word in value.split()
    }
    own = {*task.NEW_NAMES, *task.NEW_CITIES, *task.NEW_VERBS, *task.NEW_OBJECTS, *task.NEW_ADJECTIVES, *task.NEW_ITEMS}
    assert not own & lists, own & lists


def test_new_strings_are_absent_from_training(splits):
    train_words = {word for request in _requests(splits["train"]) for word in request.split()}
    known = task.known_pools()
    known_words = {word for values in vars(known).values() for value in values for word in value.split()}
    for answer in _answers(splits["test_strings"]):
        strings = [word for key in task.OPEN_SLOTS if key in answer for word in answer[key].split()]
        fresh = [word for word in strings if word not in known_words]
        assert fresh, answer
        assert not set(fresh) & train_words, answer


def test_invented_words_belong_to_one_side():
    rng = random.Random(5)
    for held_out in (False, True):
        assert all(w.is_held_out(w.invent(rng, held_out=held_out)) == held_out for _ in range(200))


def test_values_of_new_combinations_are_known(splits):
    known = task.known_pools()
    pool = {value for values in vars(known).values() for value in values}
    for answer in _answers(splits["test_combinations"]):
        assert all(answer[key] in pool for key in task.OPEN_SLOTS if key in answer), answer


def test_one_spoken_time_has_one_written_form():
    rng = random.Random(0)
    written: dict[str, set[str]] = {}
    for _ in range(20_000):
        said, clock = spoken.clock(rng)
        assert re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", clock), said
        written.setdefault(said, set()).add(clock)
    assert all(len(forms) == 1 for forms in written.values())
    assert written["half past six in the evening"] == {"18:30"}
    assert written["a quarter to seven in the morning"] == {"06:45"}
    assert written["half past six"] == {"06:30"}


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "zero"), (19, "nineteen"), (42, "forty two"), (250, "two hundred and fifty"), (900, "nine hundred")],
)
def test_number_words(value, words):
    assert spoken.number_words(value) == words


def test_write_makes_one_file_a_split_that_reads_back(tmp_path, splits):
    paths = task.write(tmp_path, seed=0, rows=SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{split}.jsonl" for split in SMALL)
    for split, path in paths.items():
        assert [json.loads(line) for line in path.read_text().splitlines()] == splits[split]


def test_an_unknown_split_is_refused_by_name():
    with pytest.raises(UsageError, match=r"did you mean 'valid'.*test_combinations"):
        task.generate(rows={"valis": 10})


def _row(request, answer):
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}


def test_nearest_copy_baseline_by_hand():
    train = [_row("call anna now", "A"), _row("play blue river", "B"), _row("call ben", "C")]
    test = [
        _row("call anna please", "A"),  # shares 2 of 4 words with the first, 1 of 4 with the third
        _row("play red river", "B"),  # shares 2 of 4 with the second
        _row("call carla", "D"),  # nearest is the third (1 of 3), whose answer is another
        _row("xyzzy", "A"),  # shares nothing: the first row answers
    ]
    assert task.nearest_copy_baseline(train, test) == 0.75


def test_nearest_copy_baseline_is_far_from_solving_the_task(splits):
    assert task.nearest_copy_baseline(splits["train"], splits["test_combinations"]) < 0.3
    assert task.nearest_copy_baseline(splits["train"], splits["test_strings"]) < 0.02
