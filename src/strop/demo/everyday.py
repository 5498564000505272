"""Everyday sentences and small dialogues from a grammar: people, times, places, reminders, shopping, weather.

The dialogues hold requests and plain spoken replies ("remind me to buy milk at seven" - "sure, at seven you buy
milk"), never an action of the downstream task. Everything is lower case, as a speech recogniser writes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from strop.demo import drills as d
from strop.demo import spoken
from strop.demo import words as w

SENTENCES = """
{n} went to {c} {day} to see {n2}.|the {place} opens at {time} and closes late.|
{n} bought {item} and {item2} at the {place}.|
it is {weather} in {c} today.|{n} works as a {job} in {c}.|the {adj} {noun} stands near the {place}.|
{n} {verb} the {adj} {noun} {day}.|at {time} {n} has breakfast with {n2}.|{n} needs {dur} to walk to the {place}.|
the train to {c} leaves at {time}.|{n} asked {n2} to {chore}.|{n} told {n2} that {remark}.|do not forget to {chore}.|
we have to {chore} {day}.|{n} sings {song} in the {room}.|{song} by {band} is on the radio.|{n} likes {song} by {band}.|
the {room} light is {level} percent bright.|{n} went {sport} for {dur}.|{n} does {sport} {days}.|
{n} has {event} {day} at {time}.|the {event} was moved to {time}.|{n} speaks {lang} and lives in {c}.|
how do you say {phrase} in {lang}?|{n} turned the volume down to {num}.|the timer rang after {dur}.|
the alarm rings at {time} {days}.|{n} woke up at {time}.|{n} sent a message to {n2}. it said: {remark}.|
{n} rang {n2} at {time}.|it takes {dur} by car from {c} to {c2}.|{n} rides the bike to the {place}.|
the way to the {place} is long.|{n} wrote {item} on the shopping list.|the list says {item}, {item2} and {item3}.|
tomorrow it will be {weather} in {c}.|{n} switched off the lamp in the {room}.|there are {num} people in the {place}.|
{n} paid {num} coins for {item}.|the {animal} of {n} is {colour}.|{n2} saw a {colour} {animal} near the {place}.|
{n} gave the {noun} to {n2} because it was {adj}.|when the {noun} broke, {n} fixed it in {dur}.|
my name is {n} and i come from {c}.|{n} and {n2} are friends. {n} is a {job}. {n2} is a {job2}.|
in {c} everyone knows {n}. {n} is the {job} there.|this is {inv}. {inv} is very {adj}. we all like {inv}.|
{n} found a book called {title}. the first page of {title} was {adj}.|the word {inv} means {adj}. {n} said {inv} twice.
""".replace("\n", "").split("|")

DIALOGUES: tuple[tuple[str, str], ...] = tuple(
    (line.split(" = ")[0].strip(), line.split(" = ")[1].strip())
    for line in """
can you wake me at {time} = yes, your alarm rings at {time}.
i have to get up at {time} {days} = then i wake you at {time} {days}.
i must not oversleep, {time} is when i get up = i make sure that you are awake at {time}.
boil the eggs for {dur} = fine, the eggs take {dur}.
tell me when {dur} are over = i say so after {dur}.
i should {chore} at {time} = i remind you at {time} to {chore}.
do not let me forget to {chore} = i remind you to {chore}.
help me remember to {chore} {day} = sure, {day} you want to {chore}.
i want to talk to {n} = {n} is on the phone now.
give {n} a ring = i ring {n}.
dial the number of {n} = dialling {n}.
let {n} know that {remark} = {n} knows now: {remark}.
write to {n} that {remark} = i wrote to {n}: {remark}.
drop {n} a line saying {remark} = {n} gets your line: {remark}.
i feel like hearing {song} = here comes {song}.
put on something by {band} = here is some music by {band}.
do you know {song} by {band} = yes, {band} sing {song}.
do i need an umbrella in {c} {day} = it will be {weather} in {c} {day}.
is it cold in {c} = it is {weather} in {c}.
what is it like outside in {c} {day} = {day} it is {weather} in {c}.
how do i get to the {place} = go straight on to the {place}.
which way is the {place} = the {place} is near the {place2}.
bring me to {c} by car = the road to {c} is free.
i just did {dur} of {sport} = well done, {sport} for {dur}.
i went {sport} for {dur} = {dur} of {sport}, very good.
it is too dark in the {room} = i make the {room} brighter.
no light in the {room} please = the {room} is dark now.
dim the {room} to {num} percent = the {room} is at {num} percent.
it is too loud = i make it quieter.
louder please, {num} percent = now it is at {num} percent.
there is {event} {day} at {time} = i keep {day} at {time} free for {event}.
i am meeting {n} {day} at {time} = {day} at {time} you meet {n}.
we are out of {item} = i write {item} on the list.
i need {item} and {item2} = {item} and {item2} are on the list.
what is {phrase} in {lang} = i do not know much {lang} yet.
who is {n} = {n} is a {job} from {c}.
where does {n} work = {n} works at the {place}.
good morning = good morning. how can i help you?
thank you = you are welcome.
what day comes after {wd} = {wd2}.
""".strip().split("\n")
)

WEATHER = w.split_words("sunny cloudy rainy windy foggy snowy stormy icy hot cold mild dry wet humid")


def _fill(rng: random.Random, template: str) -> str:
    """The template with every field drawn once, so that a field that returns is a copy."""
    weekday = rng.randrange(7)
    values: dict[str, object] = {
        "n": d.name(rng),
        "n2": d.name(rng),
        "c": d.city(rng),
        "c2": d.city(rng),
        "day": spoken.day(rng)[0],
        "days": spoken.days(rng)[0],
        "time": spoken.clock(rng)[0],
        "dur": spoken.duration(rng)[0],
        "num": spoken.number_words(d.number(rng)),
        "level": spoken.number_words(rng.randrange(101)),
        "inv": w.invent(rng),
        "title": d.title(rng),
        "item": d.thing(rng),
        "item2": d.thing(rng),
        "item3": d.thing(rng),
        "chore": d.phrase(rng) if rng.random() < 0.3 else rng.choice(w.CHORES),
        "remark": d.phrase(rng) if rng.random() < 0.3 else rng.choice(w.REMARKS),
        "song": d.title(rng) if rng.random() < 0.5 else rng.choice(w.SONGS),
        "band": d.title(rng) if rng.random() < 0.5 else rng.choice(w.BANDS),
        "wd": spoken.DAY_NAMES[weekday],
        "wd2": spoken.DAY_NAMES[(weekday + 1) % 7],
        "weather": rng.choice(WEATHER),
    }
    for key, choices in _CHOICES.items():
        values[key] = rng.choice(choices)
    return template.format(**values)


_CHOICES: dict[str, Sequence[str]] = {
    "place": w.PLACES,
    "place2": w.PLACES,
    "job": w.JOBS,
    "job2": w.JOBS,
    "adj": w.ADJECTIVES,
    "noun": w.NOUNS,
    "verb": w.VERBS_PAST,
    "room": w.ROOMS,
    "sport": w.SPORTS,
    "event": w.EVENTS,
    "lang": w.LANGUAGES,
    "phrase": w.PHRASES,
    "animal": w.ANIMALS,
    "colour": w.COLOURS,
}


def paragraph(rng: random.Random) -> str:
    """Two to five everyday sentences."""
    return " ".join(_fill(rng, rng.choice(SENTENCES)) for _ in range(rng.choice((2, 3, 4, 5))))


def dialogue(rng: random.Random) -> tuple[str, str]:
    """A spoken request and a plain spoken reply. Fields that stand in both have the same value."""
    question, answer = rng.choice(DIALOGUES)
    filled = _fill(rng, f"{question} = {answer}").split(" = ")
    return filled[0], filled[1]
