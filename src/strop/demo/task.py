"""The downstream task: a spoken request to a watch becomes one JSON action.

"wake me at half past six on weekdays" becomes `{"action": "set_alarm", "time": "06:30", "days": ["mon", "tue",
...]}`. Fourteen actions, at least 25 wordings each; slots come from closed pools (times, days, durations, a few
hundred names, cities, titles, errands). Rows are `{"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}`.
Every request occurs once over all splits:

- `train`, `valid`: known wordings, known values;
- `test_combinations`: the same wordings and values in combinations that training does not hold;
- `test_phrasings`: wordings that training does not hold;
- `test_strings`: names, cities, titles and texts that neither training nor the pretraining text's lists hold.

`nearest_copy_baseline` says how far copying from the training rows gets.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from strop.demo import phrasings, spoken
from strop.demo import words as w
from strop.demo.intent import Intent
from strop.errors import UsageError, nearest

Row = dict[str, list[dict[str, str]]]
Value = str | int | list[str]

ROWS: dict[str, int] = {
    "train": 12_000,
    "valid": 500,
    "test_combinations": 1_000,
    "test_phrasings": 1_000,
    "test_strings": 1_000,
}
"""The rows of each split, in the order in which they are written."""

OPEN_SLOTS = frozenset({"name", "city", "title", "text", "item"})
"""Slots whose values are strings of any kind; the others are closed sets."""

MODES = {"on foot": "walk", "by car": "car", "by bike": "bike", "by bus": "bus", "by train": "train"}

NEW_NAMES = w.split_words("""
cosima thaddeus ottilie barnaby philippa rupert winifred cornelius rosalind ambrose beatrix lysander hermione
algernon ludovic guinevere zebedee clementine perceval araminta fitzgerald montague eugenia leopold
calliope augustus millicent horatio
""")
NEW_CITIES = w.split_words("""
reykjavik timbuktu vladivostok albuquerque ouagadougou antananarivo chattanooga winnipeg samarkand marrakesh zanzibar
kathmandu tegucigalpa bratsk inverness aberystwyth wolverhampton gibraltar bruges ghent rotterdam utrecht eindhoven
""")
NEW_VERBS = w.split_words(
    "engrave sharpen unpack deliver collect sweep measure repair decorate rehearse photograph label"
)
NEW_OBJECTS = w.split_words("""
trumpet chimney canoe saddle tapestry microscope lantern aquarium greenhouse typewriter violin compass barometer hammock
telescope wardrobe bassoon kayak tractor scarecrow pendulum sculpture orchid cello banjo anvil sundial
""")
NEW_ADJECTIVES = w.split_words("crooked scarlet frosty gigantic marble wooden mossy turquoise rusty smoky")
NEW_ITEMS = """
saffron|mustard|pomegranates|celery|rhubarb|turmeric|vinegar|artichokes|pistachios|parsnips|coriander|horseradish|
marzipan|aubergines|cranberries|sauerkraut|asparagus|radishes
""".replace("\n", "").split("|")


@dataclass(frozen=True)
class Pools:
    """The values that open slots are drawn from."""

    names: list[str]
    cities: list[str]
    titles: list[str]
    errands: list[str]
    remarks: list[str]
    phrases: list[str]
    events: list[str]
    items: list[str]


def known_pools() -> Pools:
    """The values of training: the word lists and a few hundred composed and invented ones, the same for every seed."""
    rng = random.Random(20)
    first = w.NAMES + [w.invent(rng) for _ in range(150)]
    last = w.SURNAMES + [w.invent(rng) for _ in range(60)]
    return Pools(
        names=_distinct(first + [f"{rng.choice(first)} {rng.choice(last)}" for _ in range(250)]),
        cities=_distinct(w.CITIES + [w.invent(rng) for _ in range(120)]),
        titles=_distinct(
            w.SONGS
            + w.BANDS
            + [f"{rng.choice(w.ADJECTIVES)} {rng.choice(w.NOUNS)}" for _ in range(120)]
            + [f"{w.invent(rng)} {rng.choice(w.NOUNS)}" for _ in range(60)]
            + [w.invent(rng) for _ in range(60)]
        ),
        errands=_distinct(
            w.CHORES
            + [f"{_errand_verb(rng)} the {rng.choice(w.NOUNS)}" for _ in range(150)]
            + [f"{_errand_verb(rng)} the {w.invent(rng)}" for _ in range(60)]
            + [f"visit {w.invent(rng)}" for _ in range(30)]
        ),
        remarks=_distinct(
            w.REMARKS
            + [f"the {rng.choice(w.NOUNS)} is {rng.choice(w.ADJECTIVES)}" for _ in range(150)]
            + [f"i {rng.choice(w.VERBS_PAST)} the {rng.choice(w.NOUNS)}" for _ in range(100)]
            + [f"i saw {w.invent(rng)} near the {rng.choice(w.PLACES)}" for _ in range(60)]
        ),
        phrases=_distinct(
            w.PHRASES
            + [f"the {rng.choice(w.NOUNS)} is {rng.choice(w.ADJECTIVES)}" for _ in range(100)]
            + [f"a {rng.choice(w.ADJECTIVES)} {rng.choice(w.NOUNS)}" for _ in range(80)]
            + [f"my name is {w.invent(rng)}" for _ in range(40)]
        ),
        events=_distinct(
            [event for event in w.EVENTS if event != "flight to rome"]
            + [f"{rng.choice(('lunch', 'coffee', 'dinner', 'meeting'))} with {rng.choice(first)}" for _ in range(150)]
            + [f"{w.invent(rng)} {rng.choice(('class', 'meeting', 'party', 'call'))}" for _ in range(60)]
        ),
        items=_distinct(
            w.THINGS
            + [
                f"{rng.choice(w.ADJECTIVES)} {rng.choice(w.THINGS).removeprefix('a ').removeprefix('an ')}"
                for _ in range(80)
            ]
            + [f"{w.invent(rng)} {rng.choice(('oil', 'tea', 'cheese', 'soap', 'bread'))}" for _ in range(60)]
            + [w.invent(rng) for _ in range(60)]
        ),
    )


def new_pools() -> Pools:
    """The values of the test of new strings: held-out invented words, and words from lists that nothing else uses."""
    rng = random.Random(21)

    def invented() -> str:
        return w.invent(rng, held_out=True)

    first = NEW_NAMES + [invented() for _ in range(80)]
    return Pools(
        names=_distinct(first + [f"{rng.choice(first)} {invented()}" for _ in range(80)]),
        cities=_distinct(NEW_CITIES + [invented() for _ in range(60)]),
        titles=_distinct(
            [f"{rng.choice(NEW_ADJECTIVES)} {rng.choice(NEW_OBJECTS)}" for _ in range(80)]
            + [f"{invented()} {rng.choice(NEW_OBJECTS)}" for _ in range(60)]
            + [invented() for _ in range(40)]
        ),
        errands=_distinct(
            [f"{rng.choice(NEW_VERBS)} the {rng.choice(NEW_OBJECTS)}" for _ in range(100)]
            + [f"{rng.choice(NEW_VERBS)} the {invented()}" for _ in range(50)]
        ),
        remarks=_distinct(
            [f"the {rng.choice(NEW_OBJECTS)} is {rng.choice(NEW_ADJECTIVES)}" for _ in range(100)]
            + [f"i saw {invented()} near the {rng.choice(NEW_OBJECTS)}" for _ in range(50)]
        ),
        phrases=_distinct(
            [f"the {rng.choice(NEW_OBJECTS)} is {rng.choice(NEW_ADJECTIVES)}" for _ in range(80)]
            + [f"my name is {invented()}" for _ in range(40)]
        ),
        events=_distinct(
            [f"{rng.choice(('lunch', 'coffee', 'dinner', 'meeting'))} with {rng.choice(first)}" for _ in range(80)]
            + [f"{invented()} {rng.choice(('class', 'meeting', 'party', 'call'))}" for _ in range(60)]
        ),
        items=_distinct(
            NEW_ITEMS
            + [f"{rng.choice(NEW_ADJECTIVES)} {rng.choice(NEW_ITEMS)}" for _ in range(60)]
            + [invented() for _ in range(60)]
        ),
    )


def _errand_verb(rng: random.Random) -> str:
    return rng.choice(
        ("clean", "fix", "move", "paint", "sell", "find", "open", "bring", "wash", "check", "return", "buy")
    )


def _distinct(values: list[str]) -> list[str]:
    return list(dict.fromkeys(values))


def generate(*, seed: int = 0, rows: dict[str, int] | None = None) -> dict[str, list[Row]]:
    """All splits, in memory.

    Args:
        seed: Equal seeds give equal rows.
        rows: Rows of each split, where other than `ROWS`.

    Raises:
        UsageError: `rows` names a split that there is not.
    """
    wanted = dict(ROWS)
    for split, count in (rows or {}).items():
        if split not in wanted:
            raise UsageError(f"no split is called {split!r}{nearest(split, ROWS)}; the splits are {', '.join(ROWS)}")
        wanted[split] = count
    known, new = known_pools(), new_pools()
    every = phrasings.INTENTS
    with_strings = tuple(intent for intent in every if OPEN_SLOTS.intersection(intent.keys))
    plans: dict[str, tuple[Pools, tuple[Intent, ...], bool]] = {
        "train": (known, every, False),
        "valid": (known, every, False),
        "test_combinations": (known, every, False),
        "test_phrasings": (known, every, True),
        "test_strings": (new, with_strings, False),
    }
    seen: set[str] = set()
    result: dict[str, list[Row]] = {}
    for split, (pools, intents, held_out) in plans.items():
        rng = random.Random(f"{seed}-{split}")
        result[split] = _split(rng, pools, intents, held_out=held_out, count=wanted[split], seen=seen)
    return result


def write(folder: str | Path, *, seed: int = 0, rows: dict[str, int] | None = None) -> dict[str, Path]:
    """Write `train.jsonl`, `valid.jsonl` and the three tests into `folder`; returns the path of each split."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for split, records in generate(seed=seed, rows=rows).items():
        paths[split] = target / f"{split}.jsonl"
        paths[split].write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return paths


def _split(
    rng: random.Random,
    pools: Pools,
    intents: Sequence[Intent],
    *,
    held_out: bool,
    count: int,
    seen: set[str],
) -> list[Row]:
    """`count` rows whose requests are not in `seen`, which grows. Actions are equally likely, then their intents."""
    by_action: dict[str, list[Intent]] = {}
    for intent in intents:
        by_action.setdefault(intent.action, []).append(intent)
    actions = list(by_action)
    made: list[Row] = []
    while len(made) < count:
        intent = rng.choice(by_action[rng.choice(actions)])
        request, answer = _example(rng, intent, pools, held_out=held_out)
        if request in seen:
            continue
        seen.add(request)
        made.append({"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]})
    return made


def _example(rng: random.Random, intent: Intent, pools: Pools, *, held_out: bool) -> tuple[str, str]:
    wording = rng.choice(intent.wordings(held_out=held_out))
    said: dict[str, str] = {}
    answer: dict[str, Value] = {"action": intent.action}
    for key in intent.keys:
        said[key], answer[key] = _slot(rng, key, intent.action, pools)
    answer.update(intent.constants)
    if wording.startswith("= "):
        request = wording.removeprefix("= ").format(**said)
    else:
        request = wording.format(**said)
        # "please" behind a free text could belong to it; in front it cannot.
        closed_end = not any(wording.endswith("{" + slot + "}") for slot in OPEN_SLOTS)
        kind = rng.random()
        if kind < 0.3:
            request = f"{rng.choice(phrasings.PREFIXES)} {request}"
        elif kind < 0.45 and closed_end:
            request = f"{request} {rng.choice(phrasings.SUFFIXES)}"
    return request, json.dumps(answer)


def _slot(rng: random.Random, key: str, action: str, pools: Pools) -> tuple[str, Value]:
    """What is said for a slot, and what is written."""
    spoken_slots: dict[str, Callable[[random.Random], tuple[str, Value]]] = {
        "time": spoken.clock,
        "days": spoken.days,
        "day": spoken.day,
        "minutes": spoken.duration,
    }
    if key in spoken_slots:
        return spoken_slots[key](rng)
    if key == "level":
        level = 5 * rng.randrange(1, 21)
        return spoken.number_words(level), level
    if key == "mode":
        mode = rng.choice(tuple(MODES))
        return mode, MODES[mode]
    pool = {
        "name": pools.names,
        "city": pools.cities,
        "title": pools.events if action == "add_event" else pools.titles,
        "text": {"remind": pools.errands, "send_message": pools.remarks, "translate": pools.phrases}.get(action, []),
        "item": pools.items,
        "place": w.PLACES,
        "sport": w.SPORTS,
        "room": w.ROOMS,
        "language": w.LANGUAGES,
    }[key]
    value = rng.choice(pool)
    return value, value


def nearest_copy_baseline(train: Sequence[Row], test: Sequence[Row]) -> float:
    """The share of `test` rows whose answer is, character for character, that of the nearest training row.

    Nearest is the greatest Jaccard overlap |a & b| / |a | b| of the two requests' sets of words; of equals, the first.
    """
    requests = [row["messages"][0]["content"] for row in train]
    answers = [row["messages"][-1]["content"] for row in train]
    index = {word: i for i, word in enumerate(sorted({word for request in requests for word in request.split()}))}
    table = np.zeros((len(requests), len(index)), dtype=np.float32)
    for at, request in enumerate(requests):
        table[at, [index[word] for word in set(request.split())]] = 1
    sizes = table.sum(1)
    right = 0
    for start in range(0, len(test), 250):
        part = test[start : start + 250]
        words = [set(row["messages"][0]["content"].split()) for row in part]
        queries = np.zeros((len(part), len(index)), dtype=np.float32)
        for at, own in enumerate(words):
            queries[at, [index[word] for word in own if word in index]] = 1
        shared = queries @ table.T  # [test rows, training rows]
        union = sizes[None, :] + np.array([len(own) for own in words], dtype=np.float32)[:, None] - shared
        nearest = (shared / union).argmax(1)
        right += sum(answers[at] == row["messages"][-1]["content"] for at, row in zip(nearest, part, strict=True))
    return right / max(1, len(test))
