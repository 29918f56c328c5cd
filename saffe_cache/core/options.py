"""Command-line options made from a config's dataclass, so that a default and its help are written once.

A field `batch_size: int = 32` with a docstring below it becomes `--batch-size N`, its help the docstring.
`tuple[X, ...]` may be given several times or with commas (texts, which may hold commas, only several times);
`Mapping[str, X]` is given as KEY=VALUE, several times; a bool becomes a pair `--flag/--no-flag`. A field declared as
`positional()` is given without a flag; a tuple takes one or more.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")


def positional() -> Any:
    """A config's field that the command line takes without a flag."""
    return dataclasses.field(metadata={"positional": True})


def parse_config(config_class: type[Config], arguments: Sequence[str] | None, prog: str) -> Config:
    """Read a config from the command line; exits with a message on a wrong option, as argparse does."""
    parser = argparse.ArgumentParser(
        prog=prog, description=inspect.getdoc(config_class), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    hints = typing.get_type_hints(config_class)
    helps = attribute_docstrings(config_class)
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        _add_option(parser, field, hints[field.name], helps.get(field.name, ""))
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    for name, value in given.items():
        kind = _without_none(hints[name])
        if typing.get_origin(kind) is tuple:
            given[name] = tuple(part for parts in value for part in parts)
        elif _is_mapping(kind):
            given[name] = dict(value)
            if len(given[name]) < len(value):
                parser.error(f"{_flag(name)}: a key is given twice; give each once")
    try:
        return config_class(**given)
    except ValueError as error:
        parser.error(str(error))


def require(holds: bool, option: str, found: Any, expected: str) -> None:
    """
    Raises:
        ValueError: it does not hold; names the option, what was found and what is expected.
    """
    if not holds:
        raise ValueError(f"--{option.replace('_', '-')}: found {found}, expected {expected}.")


def require_seed(option: str, seed: int) -> None:
    """
    Raises:
        ValueError: it is none that both numpy and torch take.
    """
    require(0 <= seed < 2**63, option, seed, "0 or more, below 2**63")


def require_keys(option: str, mapping: Mapping[str, Any], known: Sequence[str]) -> None:
    """
    Raises:
        ValueError: a key is not among the known ones.
    """
    for key in mapping:
        require(key in known, option, f"{key}=…", " or ".join(f"{name}=…" for name in known))


def attribute_docstrings(config_class: type) -> dict[str, str]:
    """The string below each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text).replace("\n", " ")
    return found


def _add_option(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any, help_text: str) -> None:
    if field.metadata.get("positional"):
        several = typing.get_origin(hint) is tuple
        parse = _list_of(str) if several else hint
        parser.add_argument(
            field.name, metavar=field.name.upper(), type=parse, nargs="+" if several else None, help=help_text
        )
        return
    flag = _flag(field.name)
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    default = field.default_factory() if callable(field.default_factory) else field.default
    shown = "" if required or default in (None, (), {}) else f" (default: {_show(default)})"
    options: dict[str, Any] = {"help": (help_text + shown).replace("%", "%%"), "required": required, "dest": field.name}
    kind = _without_none(hint)
    if kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, **options)
    elif typing.get_origin(kind) is Literal:
        parser.add_argument(flag, choices=typing.get_args(kind), default=None, **options)
    elif typing.get_origin(kind) is tuple:
        one = typing.get_args(kind)[0]
        options["metavar"] = _metavar(one) if one is str else _metavar(one) + "[,…]"
        parser.add_argument(flag, action="append", type=_list_of(one), default=None, **options)
    elif _is_mapping(kind):
        one = typing.get_args(kind)[1]
        options["metavar"] = "KEY=" + _metavar(one)
        parser.add_argument(flag, action="append", type=pair_of(one), default=None, **options)
    else:
        parser.add_argument(flag, type=kind, metavar=_metavar(kind), default=None, **options)


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


def pair_of(kind: Any) -> Any:
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
