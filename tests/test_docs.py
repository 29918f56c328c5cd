"""README and the documentation: their commands parse, their Python compiles, their links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

import saffe_cache
from saffe_cache.cli import _parser
from saffe_cache.core.options import parse_config
from saffe_cache.fusion.registry import FUSIONS
from saffe_cache.protocols.registry import PROTOCOLS
from saffe_cache.verbs import VERBS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIXED_NAMES = {"saffe extract": "extract", "saffe train": "train", "saffe evaluate": "evaluate"}


def blocks(text: str, *languages: str) -> Iterator[str]:
    """The fenced code blocks of these languages."""
    for language, code in re.findall(r"^```([^\n`]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language in languages:
            yield code


def command_lines(page: Path) -> list[list[str]]:
    """The words of every shell command on a page."""
    code = "\n".join(blocks(page.read_text(encoding="utf-8"), "sh")).replace("\\\n", " ")
    return [words for line in code.splitlines() if (words := shlex.split(line, comments=True))]


ALL_COMMANDS = [(page.name, words) for page in PAGES for words in command_lines(page)]


def test_every_verb_has_an_example() -> None:
    assert len(ALL_COMMANDS) > 20
    shown = {words[1] for _, words in ALL_COMMANDS if words[0] == "saffe"}
    missing = {name.split()[0] for name in VERBS} - shown
    assert not missing, "give an example of each in a ```sh block of docs"


@pytest.mark.parametrize(("page", "words"), ALL_COMMANDS, ids=lambda one: one if isinstance(one, str) else one[0])
def test_commands_parse(page: str, words: list[str]) -> None:
    match words:
        case ["saffe", "--version" | "--print-completion", *_]:
            with pytest.raises(SystemExit) as stop:
                _parser(with_options=False).parse_args(words[1:])
            assert not stop.value.code
        case ["saffe", *rest]:
            verb = next(name for name in (" ".join(rest[:2]), rest[0]) if name in VERBS)
            check_options(verb, rest[len(verb.split()) :])
        case [name, *rest] if name in FIXED_NAMES:
            check_options(FIXED_NAMES[name], rest)
        case ["torchrun", *rest] if "saffe_cache" in rest:
            verb, *options = rest[rest.index("saffe_cache") + 1 :]
            assert VERBS[verb].over_ranks
            check_options(verb, options)
        case ["make", target]:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
        case ["python", path, *_] if path.endswith(".py"):
            assert (ROOT / path).exists()
        case _:
            assert words[0] in {"pip", "python", "cd", "ls", "mkdir", "source", "git"}


def check_options(verb: str, arguments: list[str]) -> None:
    parse_config(VERBS[verb].load_config(), arguments, f"saffe {verb}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_prose_exist(page: Path) -> None:
    """Every --option that a page quotes is one of a command, a pipeline or a tool that makes data."""
    configs = [verb.load_config() for verb in VERBS.values()]
    known = {f"--{field.name.replace('_', '-')}" for config in configs for field in dataclasses.fields(config)}
    scripts = "".join(
        path.read_text(encoding="utf-8") for path in (*ROOT.glob("pipelines/*.py"), *ROOT.glob("data/*.py"))
    )
    known |= set(re.findall(r'"(--[a-z][a-z-]+)"', scripts))
    known |= {"--help", "--version", "--config", "--print-config", "--print-completion"}
    quoted = {
        option.replace("--no-", "--")
        for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code)
    }
    assert quoted <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page_uses_public_names_that_exist(page: Path) -> None:
    for code in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(code)):
            match node:
                case ast.ImportFrom(module=str(module), names=names) if module.startswith("saffe_cache"):
                    imported = __import__(module, fromlist=[alias.name for alias in names])
                    assert not [alias.name for alias in names if not hasattr(imported, alias.name)]
                case ast.Attribute(value=ast.Name(id="sc"), attr=name):
                    assert hasattr(saffe_cache, name), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r"^```\{include\} (\S+)", text, re.MULTILINE)
    local = [target for target in targets if "://" not in target and not target.startswith("generated/")]
    assert not [target for target in local if not (page.parent / target).exists()]


def test_readme_counts_what_there_is() -> None:
    numbers = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    readme = (ROOT / "README.md").read_text()
    assert f"one of {len(FUSIONS)} [fusions]" in readme
    assert f"under {numbers[len(PROTOCOLS)]} [protocols]" in readme


def test_every_page_is_in_the_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {line for code in blocks(index, "{toctree}") for line in code.splitlines() if line and line[0] != ":"}
    assert listed == {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
