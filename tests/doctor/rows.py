"""Conversations of ragged lengths, no two the same, and a session over them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from strop.config import TuneConfig
from strop.recipes.checks.collated import look
from strop.recipes.checks.finding import Finding
from strop.recipes.doctor import Examination, examine
from strop.recipes.session import Session, open_session


def chat(row: int) -> dict[str, Any]:
    words = ["red", "green", "blue", "brown", "black", "white", "pink", "grey"]
    turns: list[dict[str, str]] = []
    for turn in range(1 + row % 3):
        turns.append({"role": "user", "content": f"say {words[(row + turn) % 8]} {row}"})
        answer = " ".join(words[: 1 + (3 * row + turn) % 8])
        turns.append({"role": "assistant", "content": f"{answer} {row} {turn}"})
    return {"messages": turns}


def chat_file(path: Path, *, rows: int = 16, first: int = 0) -> Path:
    lines = [json.dumps(chat(row)) for row in range(first, first + rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config_of(base: Path, data: Path, **settings: Any) -> TuneConfig:
    return TuneConfig.from_flat({"model": base, "data": data, "dtype": "float32", "batch_size": 4, **settings})


def session_of(base: Path, data: Path, **settings: Any) -> Session:
    return open_session(config_of(base, data, **settings))


def examined(base: Path, data: Path, **settings: Any) -> Examination:
    return examine(config_of(base, data, **settings))


def seen_of(session: Session) -> Any:
    return look(session, most_tokens=10**9)


def one(findings: list[Finding], name: str) -> Finding:
    """The only finding of a name."""
    (found,) = [finding for finding in findings if finding.name == name]
    return found
