"""Exercises in chat form that teach skills: copying, writing times and days, finding a word, writing `key: value` and
JSON.

Each drill returns (question, answer). None of them turns a request into an action: the records are of unrelated
things (arrivals, animals, shops, meals), so that the pretrained model knows how to copy and to normalise, and nothing
of the task. Roughly half of all strings come from `words.invent`, so that copying cannot be learnt by heart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from strop.demo import spoken
from strop.demo import words as w

Drill = Callable[[random.Random], tuple[str, str]]


def word(rng: random.Random) -> str:
    """One word, invented more often than known."""
    return w.invent(rng) if rng.random() < 0.6 else rng.choice(rng.choice((w.NOUNS, w.ADJECTIVES, w.NAMES, w.CITIES)))


def name(rng: random.Random) -> str:
    """A first name, at times with a surname; half of them invented."""
    first = w.invent(rng) if rng.random() < 0.5 else rng.choice(w.NAMES)
    if rng.random() < 0.35:
        return f"{first} {w.invent(rng) if rng.random() < 0.5 else rng.choice(w.SURNAMES)}"
    return first


def city(rng: random.Random) -> str:
    """A city, half of them invented."""
    return w.invent(rng) if rng.random() < 0.5 else rng.choice(w.CITIES)


def title(rng: random.Random) -> str:
    """A title of one to four words."""
    if rng.random() < 0.25:
        return rng.choice(w.SONGS + w.BANDS)
    return " ".join(word(rng) for _ in range(rng.choice((1, 2, 2, 3, 4))))


def phrase(rng: random.Random) -> str:
    """A few words that make sense, or a few that do not."""
    kind = rng.random()
    if kind < 0.35:
        return rng.choice(rng.choice((w.CHORES, w.REMARKS, w.PHRASES)))
    if kind < 0.6:
        return (
            f"{rng.choice(w.CHORES).split()[0]} the {word(rng)} {rng.choice(('for', 'with', 'near', 'of'))} {name(rng)}"
        )
    return " ".join(word(rng) for _ in range(rng.choice((2, 3, 3, 4, 5))))


def thing(rng: random.Random) -> str:
    """Something that can be bought, a quarter of it invented."""
    return f"{rng.choice(w.ADJECTIVES)} {w.invent(rng)}" if rng.random() < 0.25 else rng.choice(w.THINGS)


def number(rng: random.Random) -> int:
    """A whole number up to 999, small ones more often."""
    return (
        rng.randrange(21) if rng.random() < 0.4 else rng.randrange(101) if rng.random() < 0.7 else rng.randrange(1000)
    )


def any_string(rng: random.Random) -> str:
    """Something to copy: words, a name, a title, a phrase, digits or mixed characters."""
    kind = rng.random()
    if kind < 0.45:
        return " ".join(word(rng) for _ in range(rng.choice((1, 1, 2, 3, 4))))
    if kind < 0.6:
        return name(rng)
    if kind < 0.75:
        return phrase(rng)
    if kind < 0.85:
        return title(rng)
    if kind < 0.92:
        return " ".join(str(number(rng)) for _ in range(rng.choice((1, 2, 3))))
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz0123456789_-.:") for _ in range(rng.randrange(3, 9)))


def repeat(rng: random.Random) -> tuple[str, str]:
    """Say the same string again, bare, in quotes, or behind a key."""
    text = any_string(rng)
    form = rng.choice(
        ("repeat: {}", "say {}", "copy this: {}", "write {} again", "the same please: {}", "echo {}", "repeat {} once")
    )
    kind = rng.random()
    if kind < 0.5:
        return form.format(text), text
    if kind < 0.7:
        return f"put {text} in quotes", f'"{text}"'
    if kind < 0.85:
        key = word(rng)
        return f"write {text} behind {key}", f"{key}: {text}"
    return f"repeat {text} twice", f"{text} {text}"


def spell_time(rng: random.Random) -> tuple[str, str]:
    """A spoken time as HH:MM, alone or in a sentence."""
    said, written = spoken.clock(rng)
    form = rng.choice(
        (
            "write {} as a time",
            "{} in digits",
            "what time is {}",
            "{} on the clock",
            "the {n} leaves at {}. when?",
            "{n} woke up at {} and had tea. what time?",
            "we met at {} near the {p}. write the time",
            "at {} {n} goes home. when?",
        )
    )
    return form.format(said, n=name(rng), p=rng.choice(w.PLACES)), written


def spell_days(rng: random.Random) -> tuple[str, str]:
    """Spoken days as a list of short names, plain or as JSON."""
    said, listed = spoken.days(rng)
    if rng.random() < 0.5:
        form = rng.choice(("list the days: {}", "which days: {}", "the {p} is open {}. which days?"))
        return form.format(said, p=rng.choice(w.PLACES)), ", ".join(listed)
    form = rng.choice(("list as json: {}", "json days: {}", "{n} has a lesson {}. days as json"))
    return form.format(said, n=name(rng)), json.dumps(listed)


def spell_day(rng: random.Random) -> tuple[str, str]:
    """One spoken day as its short name."""
    said, written = spoken.day(rng)
    form = rng.choice(("which day: {}", "{} in short", "{n} comes back {}. which day?", "short day: it was cold {}"))
    return form.format(said, n=name(rng)), written


def spell_duration(rng: random.Random) -> tuple[str, str]:
    """A spoken duration in minutes."""
    said, minutes = spoken.duration(rng)
    if rng.random() < 0.5:
        form = rng.choice(("{} in minutes", "how many minutes are {}", "the trip took {}. minutes?", "minutes: {}"))
        return form.format(said), str(minutes)
    form = rng.choice(("{n} slept for {}. how long?", "write {} in minutes", "the {x} lasted {}. how long?"))
    return form.format(said, n=name(rng), x=word(rng)), f"{minutes} minutes"


def spell_number(rng: random.Random) -> tuple[str, str]:
    """Number words as digits, and back."""
    value = number(rng)
    said = spoken.number_words(value)
    if rng.random() < 0.75:
        form = rng.choice(
            ("{} in digits", "write {} as a number", "{n} counted {} boats. how many?", "{} percent in digits")
        )
        return form.format(said, n=name(rng)), str(value)
    return f"{value} in words", said


def find_word(rng: random.Random) -> tuple[str, str]:
    """The word after, before, first or last in a row of words."""
    row: list[str] = []
    while len(row) < rng.choice((3, 4, 5, 6, 7)):
        candidate = word(rng)
        if candidate not in row:
            row.append(candidate)
    at = rng.randrange(len(row) - 1)
    kind = rng.randrange(5)
    text = " ".join(row)
    if kind == 0:
        return f"which word comes after {row[at]} in: {text}", row[at + 1]
    if kind == 1:
        return f"which word comes before {row[at + 1]} in: {text}", row[at]
    if kind == 2:
        return f"what follows {row[at]} in: {text}", " ".join(row[at + 1 :])
    if kind == 3:
        return f"what stands between {row[0]} and {row[-1]} in: {text}", " ".join(row[1:-1])
    return rng.choice(((f"first word of: {text}", row[0]), (f"last word of: {text}", row[-1])))


def quote_part(rng: random.Random) -> tuple[str, str]:
    """The part of a sentence behind or between marking words."""
    part = title(rng) if rng.random() < 0.5 else phrase(rng)
    who, what = name(rng), rng.choice(w.NOUNS)
    form, ask = rng.choice(
        (
            ("{n} read a story called {p}", "quote the part after called"),
            ("a {x} called {p} was found by {n}", "what was it called?"),
            ("{n} said {p}", "what did {n} say?"),
            ("{n} wrote {p} on the {x}", "what was written?"),
            ("the {x} says {p} in big letters", "what does the {x} say?"),
            ("{n} sang {p} at the party", "what did {n} sing?"),
            ("they shouted {p} to {n}", "what did they shout?"),
            ("{n} wants to {p} today", "what does {n} want to do?"),
            ("{p} was the first thing that {n} said", "what did {n} say?"),
            ("the sign that says {p} belongs to {n}", "whose sign is it?"),
            ("{n} forgot to {p}", "who forgot?"),
            ("tell {n} that {p}", "who is told?"),
            ("tell {n} that {p}", "what is {n} told?"),
            ("i heard from {n} that {p}", "what did i hear?"),
        )
    )
    answer = who if ask.startswith("who") else part
    return f"{form}. {ask}".format(n=who, p=part, x=what), answer


Record = dict[str, str | int | list[str]]


def _record(rng: random.Random) -> tuple[str, Record]:
    """A declarative sentence about something that no watch would do, and its fields."""
    n, c, t = name(rng), city(rng), title(rng)
    said_time, time = spoken.clock(rng)
    said_days, listed = spoken.days(rng)
    said_day, day = spoken.day(rng)
    said_minutes, minutes = spoken.duration(rng)
    count = number(rng)
    said_count = spoken.number_words(count)
    animal, colour, job, place, item = (rng.choice(x) for x in (w.ANIMALS, w.COLOURS, w.JOBS, w.PLACES, w.THINGS))
    frames: tuple[tuple[str, Record], ...] = (
        (f"{n} arrives in {c} at {said_time}", {"person": n, "city": c, "arrives": time}),
        (f"the {job} from {c} is called {n}", {"person": n, "job": job, "home": c}),
        (f"{n} has a {colour} {animal} named {t}", {"owner": n, "animal": animal, "colour": colour, "pet": t}),
        (f"the {place} is open {said_days} from {said_time}", {"place": place, "days": listed, "opens": time}),
        (f"{n} sold {said_count} boxes of {item}", {"seller": n, "boxes": count, "goods": item}),
        (
            f"the ferry to {c} takes {said_minutes} and leaves at {said_time}",
            {"port": c, "minutes": minutes, "leaves": time},
        ),
        (f"{n} wrote the book {t} in {c}", {"author": n, "book": t, "written": c}),
        (f"{said_day} {n} visits the {place}", {"visitor": n, "place": place, "day": day}),
        (f"a {animal} was seen in {c} at {said_time}", {"animal": animal, "city": c, "seen": time}),
        (f"{n} is a {job} and works {said_days}", {"person": n, "job": job, "days": listed}),
        (
            f"the soup needs {said_minutes} and {said_count} grams of {item}",
            {"minutes": minutes, "grams": count, "of": item},
        ),
        (f"the film {t} by {n} lasts {said_minutes}", {"film": t, "by": n, "minutes": minutes}),
        (
            f"{n} left a {colour} {rng.choice(w.NOUNS)} in the {place} {said_day}",
            {"person": n, "place": place, "day": day},
        ),
        (f"the note from {n} reads {t}", {"from": n, "reads": t}),
        (f"{n} told us that the {rng.choice(w.NOUNS)} in {c} is {colour}", {"person": n, "city": c, "colour": colour}),
        (f"there were {said_count} people in {c} when {n} came", {"people": count, "city": c, "guest": n}),
        (f"the train to {c} stops {said_days}", {"train": c, "stops": listed}),
        (f"{n} lost {item} at the {place}", {"person": n, "lost": item, "where": place}),
        (f"the painting {t} hangs in {c}", {"painting": t, "city": c}),
        (f"the {animal} of {n} slept for {said_minutes}", {"animal": animal, "owner": n, "minutes": minutes}),
    )
    return rng.choice(frames)


def write_record(rng: random.Random) -> tuple[str, str]:
    """The fields of a sentence, as JSON or as `key: value`; which keys is said, or every key there is."""
    sentence, record = _record(rng)
    keys = list(record)
    if rng.random() < 0.4:
        keys = rng.sample(keys, rng.randrange(1, len(keys) + 1))
    chosen = {key: record[key] for key in keys}
    listed = spoken.join(keys)
    kind = rng.random()
    if kind < 0.7:
        form = rng.choice(
            ("{s}. json with {k}", "json with {k}: {s}", "write {k} as json: {s}", "{s}. give {k} as json")
        )
        return form.format(s=sentence, k=listed), json.dumps(chosen)
    form = rng.choice(("{s}. note {k}", "note {k}: {s}", "fields {k} of: {s}"))
    return form.format(s=sentence, k=listed), "; ".join(f"{k}: {_plain(v)}" for k, v in chosen.items())


def convert_record(rng: random.Random) -> tuple[str, str]:
    """JSON to `key: value`, back, or one field of it; keys may be invented."""
    record: Record = {}
    while len(record) < rng.choice((1, 2, 2, 3)):
        value = rng.choice((name, city, title, phrase, number))(rng)
        record[w.invent(rng) if rng.random() < 0.6 else rng.choice(w.NOUNS)] = value
    plain = "; ".join(f"{key}: {_plain(value)}" for key, value in record.items())
    kind = rng.random()
    if kind < 0.4:
        return f"as json: {plain}", json.dumps(record)
    if kind < 0.6:
        return f"without json: {json.dumps(record)}", plain
    key = rng.choice(list(record))
    return f"what is {key} in {json.dumps(record) if kind < 0.8 else plain}", _plain(record[key])


def json_list(rng: random.Random) -> tuple[str, str]:
    """Spoken items as a JSON list."""
    items = [rng.choice((word, name, city, thing))(rng) for _ in range(rng.choice((1, 2, 2, 3, 4)))]
    return f"json list of {spoken.join(items)}", json.dumps(items)


def _plain(value: str | int | list[str]) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def replace_word(rng: random.Random) -> tuple[str, str]:
    """A sentence again with one name exchanged."""
    old, new = w.invent(rng), name(rng)
    form = rng.choice(
        (
            "{} lives in the {a} {b}",
            "the {a} {b} belongs to {}",
            "{} {v} the {b}",
            "we gave the {b} to {} today",
            "{} and {c} {v} a {a} {b}",
        )
    )
    filled = {"a": rng.choice(w.ADJECTIVES), "b": rng.choice(w.NOUNS), "v": rng.choice(w.VERBS_PAST), "c": name(rng)}
    return f"write {new} for {old}: {form.format(old, **filled)}", form.format(new, **filled)


def remember(rng: random.Random) -> tuple[str, str]:
    """A short story of several people, and a question about one of them."""
    count = rng.choice((2, 2, 3))
    people = [name(rng) for _ in range(count)]
    kind = rng.randrange(4)
    if kind == 0:
        facts = [city(rng) for _ in people]
        story = ". ".join(f"{p} lives in {f}" for p, f in zip(people, facts, strict=True))
        ask = "where does {} live?"
    elif kind == 1:
        facts = [thing(rng) for _ in people]
        story = ". ".join(f"{p} bought {f}" for p, f in zip(people, facts, strict=True))
        ask = "what did {} buy?"
    elif kind == 2:
        pairs = [spoken.clock(rng) for _ in people]
        facts = [written for _, written in pairs]
        story = ". ".join(f"{p} came at {said}" for p, (said, _) in zip(people, pairs, strict=True))
        ask = "when did {} come?"
    else:
        facts = [phrase(rng) for _ in people]
        story = ". ".join(f"{p} said {f}" for p, f in zip(people, facts, strict=True))
        ask = "what did {} say?"
    at = rng.randrange(count)
    if people.count(people[at]) > 1:
        return remember(rng)
    return f"{story}. {ask.format(people[at])}", facts[at]


def politeness(rng: random.Random) -> tuple[str, str]:
    """The core of a polite sentence."""
    core = rng.choice(
        (
            "give {n} the {x}",
            "show me the {a} {x}",
            "tell me about {c}",
            "bring {t} to {n}",
            "ask {n} about the {x}",
            "put the {x} near the {p}",
            "wait for {n} at the {p}",
            "explain {q} to me",
        )
    ).format(
        n=name(rng),
        x=rng.choice(w.NOUNS),
        a=rng.choice(w.ADJECTIVES),
        c=city(rng),
        t=thing(rng),
        p=rng.choice(w.PLACES),
        q=title(rng),
    )
    polite = rng.choice(
        (
            "could you {}",
            "please {}",
            "{} please",
            "can you please {}",
            "i would like you to {}",
            "would you mind to {}",
            "hey {}",
            "i need you to {}",
            "go ahead and {}",
            "be so kind and {}",
            "{} thanks",
            "{} if you can",
        )
    ).format(core)
    return f"short: {polite}", core


DRILLS: tuple[tuple[Drill, float], ...] = (
    (repeat, 4.0),
    (spell_time, 2.5),
    (spell_days, 1.5),
    (spell_day, 0.6),
    (spell_duration, 1.2),
    (spell_number, 1.2),
    (find_word, 1.5),
    (quote_part, 2.5),
    (write_record, 6.0),
    (convert_record, 2.0),
    (json_list, 0.8),
    (replace_word, 1.0),
    (remember, 1.5),
    (politeness, 0.8),
)
"""Every drill with its weight in the mixture."""


def drill(rng: random.Random) -> tuple[str, str]:
    """One (question, answer) from the mixture."""
    chosen = rng.choices([d for d, _ in DRILLS], [weight for _, weight in DRILLS])[0]
    return chosen(rng)
