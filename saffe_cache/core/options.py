"""Options of a command, made from a config's dataclass: the only source of names, defaults and help texts.

A field `batch_size: int = 32` with a docstring below it becomes `--batch-size N`, and the docstring its help.
`tuple[X, ...]` is repeated or takes commas (texts, which may contain commas, are only repeated); `Mapping[str, X]` is
given as KEY=VALUE and repeated; a bool becomes a pair `--flag/--no-flag`. A field declared as `positional()` is given
without a flag; a tuple takes one or more. Fields that a config inherits are shown under the first line of the docstring
of the class that declares them. A field that chooses from a registry names it in its metadata, `entries`, and its help
lists the entries' summaries.

`--config FILE.toml` takes any of these options by their field names; an option on the command line replaces the file's.
`--print-config` prints such a file.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from saffe_cache.core.json_schema import typed

Config = TypeVar("Config")

_FILE, _PRINT = "config file", "print config"
"""Where the parser puts --config and --print-config; no field has such a name."""


def positional() -> Any:
    """A config's field that the command line takes without a flag."""
    return dataclasses.field(metadata={"positional": True})


def one_of(choices: Callable[[], Mapping[str, str]], default: str | None) -> Any:
    """A config's field whose value is one of some names; `choices` gives each with one line of help."""
    return dataclasses.field(default=default, metadata={"choices": choices})


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Options that belong together. A config inherits from several groups and keeps their options in one flat list."""

    def __post_init__(self) -> None:
        """Each group checks its own options, in the method `check`."""
        for group in reversed(type(self).__mro__):
            if "check" in vars(group):
                vars(group)["check"](self)


def parse_config(config_class: type[Config], arguments: Sequence[str] | None, prog: str) -> Config:
    """Read a config from the command line; exits with a message on a wrong option, as argparse does."""
    parser = argparse.ArgumentParser(
        prog=prog, description=inspect.getdoc(config_class), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, config_class)
    options = vars(parser.parse_args(arguments))
    file, is_printed = options.pop(_FILE), options.pop(_PRINT)
    try:
        given = _from_file(config_class, Path(file)) if file else {}
        given |= _from_command_line(config_class, options)
        lacking = [_option(one) for one in _required(config_class) if one.name not in given]
        if lacking and not is_printed:
            raise ValueError(f"the following arguments are required: {', '.join(lacking)}")
        config = None if lacking else config_class(**given)
    except ValueError as error:
        parser.error(str(error))
    if config is None or is_printed:
        print(_to_toml(config_class, given))
        parser.exit()
    return config


def add_options(parser: argparse.ArgumentParser, config_class: type[Any]) -> None:
    """Add the options of a config to a parser. None is required there: --config may give it instead."""
    hints, helps = typing.get_type_hints(config_class), attribute_docstrings(config_class)
    groups: dict[str | None, Any] = {None: parser}
    for field in dataclasses.fields(config_class):
        title = _group(config_class, field.name)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        entries = [f"{name}: {one.summary}" for name, one in field.metadata.get("entries", {}).items()]
        _add_option(groups[title], field, hints[field.name], " ".join([helps.get(field.name, ""), *entries]))
    parser.add_argument(
        "--config", metavar="FILE.toml", dest=_FILE, help="read options from a file; others override it"
    )
    parser.add_argument("--print-config", dest=_PRINT, action="store_true", help="print such a file and exit")
    needed = [_usage(field, hints[field.name]) for field in _required(config_class)]
    parser.usage = " ".join(["%(prog)s", *needed, "[options]"])


def require(holds: bool, option: str, found: Any, expected: str) -> None:
    """Raise ValueError if it does not hold, with the option, what was found and what is expected."""
    if not holds:
        raise ValueError(f"--{option.replace('_', '-')}: found {found}, expected {expected}.")


def require_seed(option: str, seed: int) -> None:
    """Raise ValueError if numpy or torch does not accept it."""
    require(0 <= seed < 2**63, option, seed, "0 or more, below 2**63")


def require_keys(option: str, mapping: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise ValueError if a key is not among the known ones."""
    for key in mapping:
        require(key in known, option, f"{key}=…", " or ".join(f"{name}=…" for name in known))


def attribute_docstrings(config_class: type) -> dict[str, str]:
    """The string below each field of a dataclass, inherited fields included."""
    found = {}
    for one in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(one):
            body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
            assert isinstance(body, ast.ClassDef)
            for field, below in zip(body.body, body.body[1:], strict=False):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = inspect.cleandoc(text).replace("\n", " ")
    return found


def _group(config_class: type, name: str) -> str | None:
    """Title of the group of an option; None for a config's own."""
    declaring = next(one for one in reversed(config_class.__mro__) if name in inspect.get_annotations(one))
    return None if declaring is config_class else (inspect.getdoc(declaring) or "").split("\n")[0].rstrip(".")


def _required(config_class: type[Any]) -> Iterator[dataclasses.Field[Any]]:
    return (one for one in dataclasses.fields(config_class) if _default(one) is dataclasses.MISSING)


def _default(field: dataclasses.Field[Any]) -> Any:
    """`dataclasses.MISSING` where it is required."""
    return field.default_factory() if callable(field.default_factory) else field.default


def _add_option(parser: Any, field: dataclasses.Field[Any], hint: Any, help_text: str) -> None:
    default = _default(field)
    if field.metadata.get("positional"):
        several = typing.get_origin(hint) is tuple
        parse = _list_of(str) if several else hint
        # "?" and "*": --config may give it instead
        parser.add_argument(
            field.name, metavar=field.name.upper(), type=parse, nargs="*" if several else "?", help=help_text
        )
        return
    choices = field.metadata.get("choices", dict)()
    help_text = " ".join([help_text, *(f"{name}: {summary}." for name, summary in choices.items())])
    if default is dataclasses.MISSING:
        help_text += " (required)"
    elif default not in (None, (), {}):
        help_text += f" (default: {_show(default)})"
    options: dict[str, Any] = {"help": help_text.replace("%", "%%"), "dest": field.name, "default": None}
    kind = _without_none(hint)
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif choices or typing.get_origin(kind) is Literal:
        options["choices"] = tuple(choices) or typing.get_args(kind)
    elif typing.get_origin(kind) is tuple:
        one = typing.get_args(kind)[0]
        options |= {"action": "append", "type": _list_of(one), "metavar": _metavar(one) + "[,…]" * (one is not str)}
    elif _is_mapping(kind):
        one = typing.get_args(kind)[1]
        options |= {"action": "append", "type": _pair_of(one), "metavar": "KEY=" + _metavar(one)}
    else:
        options |= {"type": kind, "metavar": _metavar(kind)}
    parser.add_argument(_flag(field.name), **options)


def _from_command_line(config_class: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Raise ValueError if a key of a mapping is given twice."""
    hints = typing.get_type_hints(config_class)
    given = {name: value for name, value in options.items() if value not in (None, [])}
    for name, value in given.items():
        kind = _without_none(hints[name])
        if typing.get_origin(kind) is tuple:
            given[name] = tuple(part for parts in value for part in parts)
        elif _is_mapping(kind):
            given[name] = dict(value)
            if len(given[name]) < len(value):
                raise ValueError(f"{_flag(name)}: a key is given twice; give each once")
    return given


def _from_file(config_class: type, path: Path) -> dict[str, Any]:
    """Raise ValueError if the file is not readable, or an option in it is unknown or of another kind."""
    hints = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        for name in content:
            if name not in names:
                raise ValueError(f"{name} is not an option, expected some of {', '.join(names)}")
        return {name: typed(hints[name], name, value) for name, value in content.items()}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"--config {path}: {error}.") from None


def _to_toml(config_class: type, given: Mapping[str, Any]) -> str:
    """What `_from_file` reads; options without a value stand there as comments."""
    lines = []
    for field in dataclasses.fields(config_class):
        value = given.get(field.name, _default(field))
        is_absent = value is None or value is dataclasses.MISSING
        note = "required" if value is dataclasses.MISSING else "not set"
        lines.append(f"# {field.name} =  # {note}" if is_absent else f"{field.name} = {_toml_value(value)}")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, (str, Path)):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _option(field: dataclasses.Field[Any]) -> str:
    return field.name.upper() if field.metadata.get("positional") else _flag(field.name)


def _usage(field: dataclasses.Field[Any], hint: Any) -> str:
    """How a required option is shown in the one-line usage."""
    if field.metadata.get("positional"):
        return field.name.upper() + " …" * (typing.get_origin(hint) is tuple)
    one = typing.get_args(hint)[-1] if _is_mapping(hint) else hint
    return f"{_flag(field.name)} {'KEY=' * _is_mapping(hint)}{_metavar(one)}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(one for one in typing.get_args(hint) if one is not type(None))
    return hint


def _is_mapping(kind: Any) -> bool:
    return typing.get_origin(kind) is Mapping


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return _metavar(typing.get_args(kind)[0]) + ",…"
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _list_of(kind: Any) -> Any:
    def parse(text: str) -> list[Any]:
        return [text] if kind is str else [_convert(kind, part) for part in text.split(",")]

    return parse


def _pair_of(kind: Any) -> Any:
    """Reads KEY=VALUE, for argparse."""

    def parse(text: str) -> tuple[str, Any]:
        key, separator, value = text.partition("=")
        if not separator or not key or not value:
            raise argparse.ArgumentTypeError(f"expected KEY=VALUE, found {text!r}")
        if typing.get_origin(kind) is tuple:
            return key, tuple(_convert(typing.get_args(kind)[0], part) for part in value.split(","))
        return key, _convert(kind, value)

    return parse


def _convert(kind: Any, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from None


def _show(default: Any) -> str:
    if isinstance(default, tuple):
        return ", ".join(map(str, default))
    return {True: "yes", False: "no"}.get(default, str(default)) if isinstance(default, bool) else str(default)
