"""What every page is rendered with: escaped text, one head, styles within the page, nothing undefined."""

from __future__ import annotations

from pathlib import Path

import jinja2
from markupsafe import Markup


def render(page: str, *, title: str, **values: object) -> str:
    """The HTML text of `templates/PAGE.html`, which begins with head.html; page.css and PAGE.css are its styles.

    Args:
        page: The template's name.
        title: Of the page, its first heading too.
        values: What the template names.
    """
    templates = Path(__file__).parent / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    styles = dict.fromkeys(["page.css", f"{page}.css"])
    css = "\n".join((templates / name).read_text(encoding="utf-8") for name in styles)
    return environment.get_template(f"{page}.html").render(values, title=title, css=Markup(css))
