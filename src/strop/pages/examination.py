"""One self-contained HTML page of what `doctor` found: the verdict, the findings, and rows with their loss mask.

What is learned is told by colour and by a line below it, so that it survives without colour. No script, no font and no
picture from elsewhere; all text from models and data is escaped. Input is the dictionary of `Examination.to_dict()`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup


def render_examination(examination: Mapping[str, Any]) -> str:
    """The page's HTML text."""
    templates = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    styles = [Markup((templates / name).read_text(encoding="utf-8")) for name in ("page.css", "examination.css")]
    names = [Path(str(examination[key])).name for key in ("model", "data")]
    return environment.get_template("examination.html").render(
        examination, css=Markup("\n").join(styles), title=f"{examination['method']} of {names[0]} on {names[1]}"
    )
