"""Pages that are made from the code: commands from their configs, the Python reference, the file tree."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import saffe_cache
from saffe_cache.core.options import add_options, attribute_docstrings
from saffe_cache.verbs import VERBS

ROOT = Path(__file__).parents[1]
"""The repository."""

FIXED_NAMES = {"extract": "saffe-extract", "train": "saffe-train-fam", "evaluate": "saffe-index-eval"}
"""Second names of verbs."""

KINDS = {"N": "integer", "X": "number", "PATH": "path", "TEXT": "text"}


def write_pages(folder: Path) -> None:
    """Write every generated page, and the parts that other pages include; remove pages of commands that are gone."""
    pages = {f"saffe-{name.replace(' ', '-')}.md": command_page(name) for name in VERBS}
    pages |= {"commands.txt": command_table(), "python.txt": public_names(), "tree.txt": file_tree()}
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in pages:
            path.unlink()
    for name, lines in pages.items():
        _write(folder / name, "\n".join(lines) + "\n")


def _write(path: Path, text: str) -> None:
    """Leave an unchanged file alone, so that Sphinx does not rebuild it."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def command_table() -> Iterator[str]:
    """All commands with one line each."""
    yield from ("| command | what it does |", "|---|---|")
    for name, verb in VERBS.items():
        yield f"| [`saffe {name}`](generated/saffe-{name.replace(' ', '-')}.md) | {verb.summary} |"


def command_page(name: str) -> Iterator[str]:
    """One command: usage, what it does, and its options grouped by the class that declares them."""
    config_class = VERBS[name].load_config()
    parser = argparse.ArgumentParser(prog=f"saffe {name}")
    add_options(parser, config_class)
    yield from (f"# saffe {name}", "", f"```{{program}} saffe {name}", "```", "")
    yield from ("```text", parser.format_usage().removeprefix("usage: ").strip(), "```", "")
    yield from _code_in(inspect.getdoc(config_class) or "").split("\n")
    if name in FIXED_NAMES:
        yield from ("", f"`{FIXED_NAMES[name]}` is the same command.")
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    helps = {name: _code_in(text) for name, text in attribute_docstrings(config_class).items()}
    shown = [[action for action in group._group_actions if action.dest in fields] for group in parser._action_groups]
    arguments, own, *others = shown
    titled = [("Arguments", arguments), ("Options", own)]
    titled += [(str(group.title), actions) for group, actions in zip(parser._action_groups[2:], others, strict=True)]
    for title, actions in titled:
        if actions:
            yield from ("", f"## {title}", "")
            for action in actions:
                yield from _option(action, fields[action.dest], helps.get(action.dest, ""))
    yield from ("", "`--config FILE.toml` reads any of these options from a file; an option on the command line wins.")
    yield "`--print-config` prints such a file."


def _option(action: argparse.Action, field: dataclasses.Field[Any], text: str) -> Iterator[str]:
    flag = ", ".join(action.option_strings) or action.dest.upper()
    metavar = "" if action.nargs == 0 or not action.option_strings else f" {_metavar(action)}"
    yield from (f"```{{option}} {flag}{metavar}", f"*{_kind(action)}{_default(field)}*", "", text, "```", "")


def _code_in(text: str) -> str:
    """Options and commands in a help text as code."""
    return re.sub(r"(?<![`\w-])(--[a-z][a-z-]*|saffe-[a-z-]+)", r"`\1`", text)


def _metavar(action: argparse.Action) -> str:
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else str(action.metavar)


def _kind(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "yes or no"
    if action.choices:
        return "one of " + ", ".join(f"`{choice}`" for choice in action.choices)
    metavar = str(action.metavar)
    if not action.option_strings:
        return "one or more" if action.nargs == "*" else "text"
    kind = KINDS.get(re.split(r"[\[,]", metavar.split("=")[-1])[0], "text")
    if "," in metavar:
        kind += "s, separated by commas"
    if "=" in metavar:
        return f"key and {kind}; repeat it for several keys"
    return f"{kind}; repeat it for several" if type(action).__name__ == "_AppendAction" else kind


def _default(field: dataclasses.Field[Any]) -> str:
    default = field.default_factory() if callable(field.default_factory) else field.default
    if default is dataclasses.MISSING:
        return "; required"
    if default in (None, (), {}):
        return ""
    if isinstance(default, bool):
        return f"; default {'yes' if default else 'no'}"
    shown = ", ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"; default `{shown}`"


def public_names() -> Iterator[str]:
    """The public names of the package, each documented where it is defined."""
    commands = {f"saffe_cache.{verb.config}": name for name, verb in VERBS.items()}
    for name in sorted(dir(saffe_cache), key=lambda name: (name[0].isupper(), name)):
        defined = getattr(saffe_cache, name)
        if name.startswith("_") or not getattr(defined, "__module__", "").startswith("saffe_cache."):
            continue
        directive = "autoclass" if isinstance(defined, type) else "autofunction"
        verb = commands.get(f"{defined.__module__}:{name}")
        yield from (f"## {name}", "")
        if verb:
            yield from (
                f"Its fields are the options of [`saffe {verb}`](generated/saffe-{verb.replace(' ', '-')}.md).",
                "",
            )
        members = "   :no-members:" if verb else ""
        yield from ("```{eval-rst}", f".. {directive}:: saffe_cache.{name}", members, "```", "")


def file_tree() -> Iterator[str]:
    """Folders with the first paragraph of their docstrings, and in each the files worth opening."""
    doors = _doors()
    for folder in sorted({path.parent for path in (ROOT / "saffe_cache").rglob("*.py")}):
        yield from _folder(folder, [path for path in sorted(folder.glob("*.py")) if path in doors])
    for name in ("pipelines", "data"):
        yield from _folder(ROOT / name, sorted((ROOT / name).glob("*.py")))
    for name in ("benchmarks", "torture"):
        yield from _folder(ROOT / "tests" / name, sorted((ROOT / "tests" / name).glob("*.py")))


def _folder(folder: Path, files: list[Path]) -> Iterator[str]:
    name = folder.relative_to(ROOT).as_posix()
    about = folder / "__init__.py"
    yield from (f"## {name}/", "")
    if about.exists():
        yield from (_first_paragraph(about), "")
    files = [path for path in files if path.name != "__init__.py"]
    if files:
        yield from ("| file | what it is |", "|---|---|")
        yield from (f"| `{path.name}` | {_first_paragraph(path)} |" for path in files)
        yield ""


def _first_paragraph(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def _doors() -> set[Path]:
    """Modules that another package imports or a verb names: by these a package is entered."""
    imported: set[str] = set()
    for path in (ROOT / "saffe_cache").rglob("*.py"):
        package = ".".join(path.relative_to(ROOT).parts[:-1])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("saffe_cache."):
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
                imported.update(name for name in names if name.rpartition(".")[0] != package)
    imported.update(f"saffe_cache.{verb.run.partition(':')[0]}" for verb in VERBS.values())
    return {
        path
        for path in (ROOT / "saffe_cache").rglob("*.py")
        if _module(path) in imported or path.parent.name == "saffe_cache"
    }


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)
