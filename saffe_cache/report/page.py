"""The page: one HTML file that loads nothing and runs nothing. The only importer of jinja2.

All that comes from data is escaped by the template; drawings and style are our own. A policy in the page's head forbids
scripts and every address, so that a mistake here could not let one in.
"""

from __future__ import annotations

import base64
from pathlib import Path

import jinja2
from markupsafe import Markup

from saffe_cache.core.features import printable
from saffe_cache.core.tables import percent
from saffe_cache.report.content import Content
from saffe_cache.report.photos import css_classes


def render(content: Content, title: str) -> bytes:
    """The page."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = percent
    environment.filters["printable"] = printable
    template = environment.from_string((folder / "page.html.j2").read_text(encoding="utf-8"))
    classes = css_classes(content.album.thumbnails)
    style = (folder / "page.css").read_text(encoding="utf-8") + _photo_rules(content, classes)
    page = template.render(
        title=title,
        content=content,
        style=Markup(style),  # ours, and thumbnails as base64
        drawings={plot.name: Markup(plot.inline) for plot in content.plots},  # texts in them were escaped by matplotlib
        classes=classes,
        kinds={"failure": "Control failed", "warning": "Warning", "note": "Note"},
    )
    return page.encode("utf-8", "backslashreplace")


def _photo_rules(content: Content, classes: dict[bytes, str]) -> str:
    rules = (
        f".{name}{{background-image:url(data:image/jpeg;base64,{base64.b64encode(content.album.thumbnails[photo]).decode()})}}"
        for photo, name in classes.items()
    )
    return "\n".join(rules)
