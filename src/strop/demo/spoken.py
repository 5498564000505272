"""Times, days, durations and numbers as people say them, beside the form that a program wants.

Every function returns (spoken, written): `("half past six in the evening", "18:30")`. Twelve-hour words without a
part of the day are read as the morning ("at seven" is 07:00, "twelve" is 12:00), so that each spoken form has one
written form.
"""

from __future__ import annotations

import random

from strop.demo.words import split_words

ONES = split_words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = split_words("zero ten twenty thirty forty fifty sixty seventy eighty ninety")

DAY_NAMES = split_words("monday tuesday wednesday thursday friday saturday sunday")
DAYS = [name[:3] for name in DAY_NAMES]

DURATIONS: dict[str, int] = {
    "a minute": 1,
    "a quarter of an hour": 15,
    "half an hour": 30,
    "three quarters of an hour": 45,
    "an hour": 60,
    "an hour and a quarter": 75,
    "an hour and a half": 90,
    "an hour and ten minutes": 70,
    "an hour and twenty minutes": 80,
    "an hour and forty minutes": 100,
    "two hours": 120,
    "two and a half hours": 150,
    "three hours": 180,
    "three and a half hours": 210,
    "four hours": 240,
    "five hours": 300,
    "six hours": 360,
    "eight hours": 480,
    "a couple of minutes": 2,
    "a couple of hours": 120,
}


def number_words(value: int) -> str:
    """A whole number from 0 to 999 in words: 42 is "forty two", 250 is "two hundred and fifty"."""
    if value < 20:
        return ONES[value]
    if value < 100:
        tens, ones = divmod(value, 10)
        return TENS[tens] + (f" {ONES[ones]}" if ones else "")
    hundreds, rest = divmod(value, 100)
    return f"{ONES[hundreds]} hundred" + (f" and {number_words(rest)}" if rest else "")


DURATIONS.update({f"{number_words(n)} minutes": n for n in [*range(2, 21), 25, 30, 35, 40, 45, 50, 55, 60, 75, 90]})


def clock(rng: random.Random) -> tuple[str, str]:
    """A spoken time of day and its HH:MM, minutes in steps of five."""
    if rng.random() < 0.06:
        return rng.choice((("noon", "12:00"), ("midday", "12:00"), ("midnight", "00:00")))
    hour = rng.choice((1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8, 9, 10, 11, 12))
    minute = rng.choice((0, 0, 0, 0, 30, 30, 30, 15, 15, 45, 45, 5, 10, 20, 25, 35, 40, 50, 55))
    following = ONES[hour % 12 + 1]
    style = rng.random()
    if minute == 0:
        words = ONES[hour] + (" o'clock" if style < 0.3 else "")
    elif style < 0.3:
        words = f"{ONES[hour]} {'oh five' if minute == 5 else number_words(minute)}"
    elif minute == 30:
        words = f"half past {ONES[hour]}"
    elif minute == 15:
        words = f"{'a ' if style < 0.6 else ''}quarter past {ONES[hour]}"
    elif minute == 45:
        words = f"{'a ' if style < 0.6 else ''}quarter to {following}"
    elif minute < 30:
        words = f"{number_words(minute)} past {ONES[hour]}"
    else:
        words = f"{number_words(60 - minute)} to {following}"
    # "a quarter to one in the afternoon" is 12:45: the part of the day belongs to the hour that is said.
    said = hour % 12 + 1 if " to " in words else hour
    part, hour24 = _part_of_day(rng, said=said, hour=hour)
    return words + part, f"{hour24:02d}:{minute:02d}"


def _part_of_day(rng: random.Random, *, said: int, hour: int) -> tuple[str, int]:
    if rng.random() < 0.4 or hour == 12 or said == 12:
        return "", hour
    parts = [" in the morning", " am"]
    if said <= 5 and hour <= 5:
        parts += [" in the afternoon", " pm"]
    if said >= 6 and hour >= 5:
        parts += [" in the evening", " in the evening", " pm"]
    if said >= 9 and hour >= 8:
        parts += [" at night"]
    part = rng.choice(parts)
    return part, hour if part in {" in the morning", " am"} else hour + 12


def join(items: list[str]) -> str:
    """A spoken list: "a", "a and b", "a, b and c" without commas, as speech recognisers write it."""
    return items[0] if len(items) == 1 else " ".join(items[:-1]) + " and " + items[-1]


def days(rng: random.Random) -> tuple[str, list[str]]:
    """Spoken days of repetition, and the list of three-letter days from Monday to Sunday."""
    kind = rng.random()
    if kind < 0.16:
        return rng.choice(("on weekdays", "every weekday", "from monday to friday", "on working days")), DAYS[:5]
    if kind < 0.28:
        return rng.choice(("at weekends", "on the weekend", "every weekend", "on weekends")), DAYS[5:]
    if kind < 0.40:
        return rng.choice(("every day", "each day", "daily", "all week")), DAYS[:]
    if kind < 0.48:
        return "every day except sunday", DAYS[:6]
    picked = sorted(rng.sample(range(7), rng.choice((1, 1, 2, 2, 3))))
    plural = rng.random() < 0.4 and len(picked) == 1
    lead = rng.choice(("on", "every", "each")) if len(picked) == 1 else rng.choice(("on", "every"))
    if plural:
        lead = "on"
    return f"{lead} {join([DAY_NAMES[i] + ('s' if plural else '') for i in picked])}", [DAYS[i] for i in picked]


def day(rng: random.Random) -> tuple[str, str]:
    """One spoken day and its short form: today, tomorrow, or a day of the week."""
    pick = rng.randrange(10)
    if pick == 0:
        return "today", "today"
    if pick <= 2:
        return "tomorrow", "tomorrow"
    which = rng.randrange(7)
    return rng.choice(("on {}", "on {}", "this {}", "next {}")).format(DAY_NAMES[which]), DAYS[which]


def duration(rng: random.Random) -> tuple[str, int]:
    """A spoken duration and its whole minutes."""
    spoken = rng.choice(tuple(DURATIONS))
    return spoken, DURATIONS[spoken]
