"""How the requests of the downstream task are worded: per intent, known wordings and wordings held out for a test.

Fields in braces are slots that `task.py` fills. A wording that begins with "=" is complete as it stands; before and
after the others a polite phrase may come. Several intents may share one action and differ in constant fields (lights
on, lights off).
"""

from __future__ import annotations

from strop.demo.intent import Intent
from strop.demo.phrasings_people import PEOPLE
from strop.demo.phrasings_things import THINGS

INTENTS: tuple[Intent, ...] = (*PEOPLE, *THINGS)

PREFIXES = (
    "please",
    "could you",
    "can you",
    "can you please",
    "could you please",
    "would you",
    "hey",
    "ok",
    "i want you to",
    "i would like you to",
)
SUFFIXES = ("please", "thanks", "for me please", "now")
