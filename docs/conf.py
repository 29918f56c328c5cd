"""Sphinx builds the documentation: `make docs`. Warnings are errors, so a broken link or a missing page fails.

Sphinx rather than MkDocs: it is actively maintained, its strict mode covers every kind of reference, and autodoc reads
the docstrings without a plugin of a plugin. MyST lets the pages be Markdown; Furo is readable on a phone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

sys.path.insert(0, str(Path(__file__).parents[1]))

import saffe_cache
from docs import generate

project = "saffe_cache"
author = "the saffe_cache developers"
copyright = author
version = release = saffe_cache.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
smartquotes = False  # which would change --option
html_theme = "furo"
html_title = "saffe_cache"
html_show_copyright = False
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 4
default_role = "code"  # docstrings quote code with single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures of options are on the command pages; attributes show their types
autodoc_class_signature = "separated"
autodoc_default_options = {"members": True, "exclude-members": "__init__,__new__"}
nitpick_ignore_regex = [("py:.*", ".*")]  # types in signatures are links where the class is on these pages


generate.write_pages(Path(__file__).parent / "generated")


def read_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Read sections such as "Args:". Napoleon would take the first words of an attribute's docstring for its type."""
    if what not in ("attribute", "property", "data"):
        lines[:] = GoogleDocstring(lines, Config(), app, what, name, obj, options).lines()


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", read_docstring)
