"""One self-contained HTML page of what `doctor` found: the verdict, the findings, and rows with their loss mask.

What is learned is told by colour and by a line below it, so that it survives without colour. No script, no font and no
picture from elsewhere; all text from models and data is escaped. Input is the dictionary of `Examination.to_dict()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strop.pages.rendering import render


def render_examination(examination: Mapping[str, Any]) -> str:
    """The page's HTML text."""
    names = [Path(str(examination[key])).name for key in ("model", "data")]
    return render("examination", title=f"{examination['method']} of {names[0]} on {names[1]}", **examination)
