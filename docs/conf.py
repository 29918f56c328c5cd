"""Sphinx builds the documentation: `make docs`. Warnings are errors, so a broken link or a missing page fails.

Sphinx rather than MkDocs: it is actively maintained, its strict mode covers every kind of reference, and autodoc reads
the docstrings without a plugin of a plugin. MyST lets the pages be Markdown; Furo is readable on a phone.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import saffe_cache
from docs import generate

project = "saffe_cache"
author = "the saffe_cache developers"
copyright = author
version = release = saffe_cache.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
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
copybutton_prompt_text = "$ "

generate.write_pages(Path(__file__).parent / "generated")
