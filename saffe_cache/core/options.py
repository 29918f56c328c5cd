"""Options of a command, made from a config's dataclass: the only source of names, defaults and help texts.

A field `batch_size: int = 32` with a docstring below it becomes `--batch-size N`, and the docstring its help; a field
`k` becomes `-k` and `--k`.
`tuple[X, ...]` is repeated or takes commas (texts, which may contain commas, are only repeated); `Mapping[str, X]` is
given as KEY=VALUE and repeated; a bool becomes a pair `--flag/--no-flag`. A field declared as `positional()` is given
without a flag; a tuple takes one or more. Fields that a config inherits are shown under the first line of the docstring
of the class that declares them. A field that chooses from a registry names it in its metadata, `entries`, and its help
lists what each entry says in `help`.

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypeVar

from saffe_cache.core.json_schema import typed

Config = TypeVar("Config")

_FILE, _PRINT = "config file", "print config"
"""Where the parser puts --config and --print-config; no field has such a name."""


def positional(default: Any = dataclasses.MISSING) -> Any:
    """A config's field that the command line takes without a flag; required without a default."""
    return dataclasses.field(default=default, metadata={"positional": True})


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

    def resolved(self) -> Self:
        """The same with the defaults filled in that depend on other options."""
        return self


def parse_config(config_class: type[Config], arguments: Sequence[str] | None, prog: str) -> Config:
    """Read a config from the command line; exits with a message on a wrong option, as argparse does."""
    parser = argparse.ArgumentParser(
        prog=prog, description=inspect.getdoc(config_class), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, config_class)
    parsed, options = vars(parser.parse_args(arguments)), _options_of(config_class)
    file, is_printed = parsed.pop(_FILE), parsed.pop(_PRINT)
    try:
        given = _from_file(config_class, Path(file)) if file else {}
        given |= {one.name: one.joined(parsed[one.name]) for one in options if parsed[one.name] not in (None, [])}
        lacking = [one.shown for one in options if one.is_required and one.name not in given]
        if lacking and not is_printed:
            raise ValueError(f"the following arguments are required: {', '.join(lacking)}")
        config = None if lacking else config_class(**given)
    except ValueError as error:
        parser.error(str(error))
    if config is None or is_printed:
        print("\n".join(one.to_toml(given.get(one.name, one.default)) for one in options))
        parser.exit()
    return config


def add_options(parser: argparse.ArgumentParser, config_class: type[Any]) -> None:
    """Add the options of a config to a parser. None is required there: --config may give it instead."""
    helps, options = attribute_docstrings(config_class), _options_of(config_class)
    groups: dict[str | None, Any] = {None: parser}
    for option in options:
        declaring = next(one for one in reversed(config_class.__mro__) if option.name in inspect.get_annotations(one))
        inherited = (inspect.getdoc(declaring) or "").split("\n")[0].rstrip(".")
        title = None if declaring is config_class else inherited
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        option.add_to(groups[title], helps.get(option.name, ""))
    parser.add_argument(
        "--config", metavar="FILE.toml", dest=_FILE, help="read options from a file; others override it"
    )
    parser.add_argument("--print-config", dest=_PRINT, action="store_true", help="print such a file and exit")
    parser.usage = " ".join(["%(prog)s", *(one.usage for one in options if one.is_in_usage), "[options]"])


def require(holds: bool, option: str, found: Any, expected: str) -> None:
    """Refuse an option if it does not hold."""
    if not holds:
        refuse(option, found, expected)


def refuse(option: str, found: Any, expected: str) -> NoReturn:
    """Raise ValueError with the option, what was found and what is expected."""
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


def _options_of(config_class: type[Any]) -> list[_Option]:
    hints = typing.get_type_hints(config_class)
    return [_Option(field, hints[field.name]) for field in dataclasses.fields(config_class)]


class _Option:
    """A config's field as the command line takes it."""

    def __init__(self, field: dataclasses.Field[Any], hint: Any) -> None:
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            hint = next(one for one in typing.get_args(hint) if one is not type(None))
        self.name, self._metadata, self._kind = field.name, field.metadata, hint
        self._container = typing.get_origin(hint)
        self._one = typing.get_args(hint)[-1] if self._container is Mapping else hint
        self.default = field.default_factory() if callable(field.default_factory) else field.default
        self.is_required = self.default is dataclasses.MISSING
        self._is_positional = "positional" in field.metadata
        self.shown = field.name.upper() if self._is_positional else "--" + field.name.replace("_", "-")

    @property
    def is_in_usage(self) -> bool:
        """Whether the one-line usage names it; the other options have help alone."""
        return self.is_required or self._is_positional

    @property
    def usage(self) -> str:
        """How it is shown in the one-line usage."""
        if self._is_positional:
            shown = self.shown + " …" * (self._container is tuple)
            return shown if self.is_required else f"[{shown}]"
        return f"{self.shown} {'KEY=' * (self._container is Mapping)}{_metavar(self._one)}"

    def add_to(self, parser: Any, text: str) -> None:
        """Add it to a parser with its docstring as help."""
        text = " ".join([text, *(f"{name}: {one.help}" for name, one in self._metadata.get("entries", {}).items())])
        if self._is_positional:
            # "?" and "*": --config may give it instead
            count, read = ("*", _list_of(str)) if self._container is tuple else ("?", self._kind)
            parser.add_argument(self.name, metavar=self.shown, type=read, nargs=count, help=text)
            return
        choices = self._metadata.get("choices", dict)()
        text = " ".join([text, *(f"{name}: {summary}." for name, summary in choices.items())])
        if self.is_required:
            text += " (required)"
        elif self.default not in (None, (), {}):
            text += f" (default: {_show(self.default)})"
        reading = {"choices": tuple(choices)} if choices else self._reading()
        flags = (f"-{self.name}", self.shown) if len(self.name) == 1 else (self.shown,)
        parser.add_argument(*flags, dest=self.name, default=None, help=text.replace("%", "%%"), **reading)

    def _reading(self) -> dict[str, Any]:
        """What argparse needs to read its values."""
        if self._kind is bool:
            return {"action": argparse.BooleanOptionalAction}
        if self._container is Literal:
            return {"choices": typing.get_args(self._kind)}
        if self._container is tuple:
            one = typing.get_args(self._kind)[0]
            return {"action": "append", "type": _list_of(one), "metavar": _metavar(one) + "[,…]" * (one is not str)}
        if self._container is Mapping:
            return {"action": "append", "type": _pair_of(self._one), "metavar": "KEY=" + _metavar(self._one)}
        return {"type": self._kind, "metavar": _metavar(self._kind)}

    def joined(self, parsed: Any) -> Any:
        """Its value, of what argparse collected; ValueError if a key of a mapping is given twice."""
        if self._container is tuple:
            return tuple(part for parts in parsed for part in parts)
        if self._container is not Mapping:
            return parsed
        if len(dict(parsed)) < len(parsed):
            raise ValueError(f"{self.shown}: a key is given twice; give each once")
        return dict(parsed)

    def to_toml(self, value: Any) -> str:
        """A line that `_from_file` reads; a comment where there is no value."""
        if value is None or (self.is_required and value is self.default):
            return f"# {self.name} =  # {'not set' if value is None else 'required'}"
        return f"{self.name} = {_toml_value(value)}"


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


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        keys = {key: key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key) for key in value}
        return "{" + ", ".join(f"{keys[key]} = {_toml_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, (str, Path)):
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return _metavar(typing.get_args(kind)[0]) + ",…"
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _list_of(kind: Any) -> Callable[[str], list[Any]]:
    """Reads A,B,… for argparse; of texts, which may contain commas, one."""
    return lambda text: [text] if kind is str else [_convert(kind, part) for part in text.split(",")]


def _pair_of(kind: Any) -> Callable[[str], tuple[str, Any]]:
    """Reads KEY=VALUE for argparse."""

    def parse(text: str) -> tuple[str, Any]:
        key, _, value = text.partition("=")
        if not key or not value:
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
    return ("no", "yes")[default] if isinstance(default, bool) else str(default)
