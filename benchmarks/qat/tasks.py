"""Eight small tasks that a model of four million parameters learns in a minute, out of the bundled task's requests.

    intent      which of the fourteen actions it is            "wake me at six"      -> "set_alarm"
    time        the time alone, or that there is none          "wake me at six"      -> "06:00"
    home        lights, volume and songs, as JSON              "volume ten" -> {"action": "volume", "level": 10}
    keys        timers and workouts, as JSON under other keys  "ten minutes please"  -> {"do": "set_timer", "for": 10}
    words       alarms and reminders, in words                 "wake me at six"      -> "set alarm, time 06:00"
    polite      the action, but no messages or calls           "call anna"           -> "sorry, i do not call people"
    reversed    weather and events, the last value first       "rain today in rome?" -> "today rome weather"
    dashes      translations and routes, between dashes        "to the beach by bus" -> "navigate - beach - bus"

Each has 1,500 rows to train on, 500 to try settings on and 500 to judge; no request stands in two of them, and the
requests differ from task to task.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from strop.demo import task

ROWS: Final = {"train": 1_500, "dev": 500, "test": 500}
Action = Mapping[str, Any]
KEYS: Final = {"action": "do", "minutes": "for", "sport": "what"}


def in_words(action: Action) -> str:
    """Name, then each slot and its value: `set alarm, time 06:30, days mon tue`."""
    parts = [str(action["action"]).replace("_", " ")]
    for key, value in action.items():
        if key != "action":
            parts.append(f"{key} {' '.join(value) if isinstance(value, list) else value}")
    return ", ".join(parts)


def polite(action: Action) -> str:
    if action["action"] == "send_message":
        return "sorry, i do not send messages"
    return "sorry, i do not call people" if action["action"] == "call" else str(action["action"])


def renamed(action: Action) -> str:
    return json.dumps({KEYS.get(key, key): value for key, value in action.items()})


def back_to_front(action: Action) -> str:
    return " ".join(str(value) for value in reversed(list(action.values())))


def dashes(action: Action) -> str:
    return " - ".join(str(value) for value in action.values())


TASKS: Final[Mapping[str, tuple[frozenset[str] | None, Callable[[Action], str]]]] = {
    "intent": (None, lambda action: str(action["action"])),
    "time": (None, lambda action: str(action.get("time", "no time"))),
    "home": (frozenset({"lights", "volume", "play"}), lambda action: json.dumps(dict(action))),
    "keys": (frozenset({"set_timer", "log_workout"}), renamed),
    "words": (frozenset({"set_alarm", "remind"}), in_words),
    "polite": (None, polite),
    "reversed": (frozenset({"weather", "add_event"}), back_to_front),
    "dashes": (frozenset({"translate", "navigate"}), dashes),
}
"""By name: the actions that a task is about (None: all), and what is answered."""


def write_tasks(folder: Path) -> dict[str, Path]:
    """Each task's folder with train.jsonl, dev.jsonl and test.jsonl, made once."""
    folders: dict[str, Path] = {}
    for number, (name, (actions, answer)) in enumerate(TASKS.items()):
        folders[name] = folder / name
        if (folders[name] / "test.jsonl").exists():
            continue
        folders[name].mkdir(parents=True, exist_ok=True)
        wanted = sum(ROWS.values())
        share = 1 if actions is None else len(actions) / 14
        empty = dict.fromkeys(task.ROWS, 1)
        drawn = task.generate(seed=1_000 + number, rows=empty | {"train": int(1.6 * wanted / share) + 50})["train"]
        rows: list[str] = []
        for row in drawn:
            request, action = row["messages"][0], json.loads(row["messages"][1]["content"])
            if actions is None or action["action"] in actions:
                said = {"role": "assistant", "content": answer(action)}
                rows.append(json.dumps({"messages": [request, said]}) + "\n")
        begin = 0
        for split, count in ROWS.items():
            part = rows[begin : begin + count]
            if len(part) < count:
                raise SystemExit(f"{name}: {len(rows)} rows were drawn of {wanted}")
            (folders[name] / f"{split}.jsonl").write_text("".join(part), encoding="utf-8")
            begin += count
    return folders
