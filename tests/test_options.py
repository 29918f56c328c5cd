"""Command-line options made from a dataclass with every kind of field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from saffe_cache.core.options import OptionGroup, attribute_docstrings, parse_config, positional, require


@dataclass(frozen=True, kw_only=True)
class Config:
    """Do something with 100 % care.

    A second paragraph.
    """

    data: str
    """Where the data lie."""
    models: Mapping[str, str]
    """Models, as image=ID."""
    batch_size: int = 32
    """Photos in a batch, of which 5 %
    may be broken."""
    learning_rate: float = 5e-4
    """Highest learning rate."""
    out: Path = Path("runs")
    """Folder to write."""
    device: str | None = None
    """Default: whatever is there."""
    max_length: int | None = None
    """Longest text."""
    storage: Literal["float32", "float16"] = "float16"
    """Type on disk."""
    choice: Literal["a", "b"] | None = None
    """One of two."""
    resume: bool = False
    """Go on."""
    pooled: bool = True
    """Keep vectors."""
    prompts: tuple[str, ...] = ("a photo of a {}.",)
    """Sentences."""
    splits: tuple[str, ...] = ()
    """Splits."""
    heads: tuple[int, ...] | None = None
    """Heads."""
    weights: tuple[float, ...] = (1.0, 0.5)
    """Weights."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers, as image=11,12."""
    max_items: Mapping[str, int] | None = None
    """Most items."""
    undocumented: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError("--batch-size: 0 photos make no batch. Use 1 or more.")


REQUIRED = ["--data", "d", "--models", "image=m"]


def parse(*arguments: str) -> Config:
    return parse_config(Config, [*REQUIRED, *arguments], "prog")


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_config(Config, arguments, "prog")
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert not output.out
    return output.err


def help_text(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_config(Config, ["--help"], "prog")
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_defaults_are_those_of_the_dataclass() -> None:
    assert parse() == Config(data="d", models={"image": "m"})


def test_every_kind_of_option() -> None:
    config = parse(
        *("--batch-size", "8", "--learning-rate", "1e-3", "--out", "a/b", "--device", "cpu", "--max-length", "77"),
        *("--storage", "float32", "--choice", "b", "--resume", "--no-pooled"),
        *("--prompts", "a {}, painted", "--prompts", "{}", "--splits", "train"),
        *("--heads", "1,2", "--heads", "3", "--weights", "0.25"),
        *("--layers", "image=11,12", "--layers", "text=-1", "--max-items", "train=5", "--models", "text=a=b,c"),
    )
    assert config == Config(
        data="d",
        models={"image": "m", "text": "a=b,c"},
        batch_size=8,
        learning_rate=1e-3,
        out=Path("a/b"),
        device="cpu",
        max_length=77,
        storage="float32",
        choice="b",
        resume=True,
        pooled=False,
        prompts=("a {}, painted", "{}"),
        splits=("train",),
        heads=(1, 2, 3),
        weights=(0.25,),
        layers={"image": (11, 12), "text": (-1,)},
        max_items={"train": 5},
    )


@pytest.mark.parametrize(("flag", "value"), [("--resume", True), ("--no-resume", False)])
def test_a_bool_is_a_pair_of_options(flag: str, value: bool) -> None:
    assert parse(flag).resume is value
    assert parse("--no-pooled", "--pooled").pooled is True


def test_help_holds_docstrings_and_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "9999")
    shown = help_text(capsys)
    assert "Do something with 100 % care. A second paragraph." in shown
    for expected in (
        "--data TEXT Where the data lie.",
        "--models KEY=TEXT Models, as image=ID.",
        "--batch-size N Photos in a batch, of which 5 % may be broken. (default: 32)",
        "--learning-rate X Highest learning rate. (default: 0.0005)",
        "--out PATH Folder to write. (default: runs)",
        "--device TEXT Default: whatever is there. --",  # a default of None is the docstring's to tell
        "--storage {float32,float16} Type on disk. (default: float16)",
        "--resume, --no-resume Go on. (default: no)",
        "--pooled, --no-pooled Keep vectors. (default: yes)",
        "--prompts TEXT Sentences. (default: a photo of a {}.)",
        "--splits TEXT Splits. --",
        "--heads N[,…] Heads. --",
        "--weights X[,…] Weights. (default: 1.0, 0.5)",
        "--layers KEY=N,… Layers, as image=11,12. --",
        "--max-items KEY=N Most items. --",
        "--undocumented N (default: 1)",
    ):
        assert expected in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "d"], "the following arguments are required: --models"),
        ([*REQUIRED, "--models", "image=n"], "--models: a key is given twice"),
        ([*REQUIRED, "--layers", "image=1", "--layers", "image=2"], "--layers: a key is given twice"),
        ([*REQUIRED, "--layers", "11,12"], "expected KEY=VALUE, found '11,12'"),
        ([*REQUIRED, "--layers", "=11"], "expected KEY=VALUE"),
        ([*REQUIRED, "--layers", "image="], "expected KEY=VALUE"),
        ([*REQUIRED, "--layers", "image=1,x"], "--layers: invalid int value: 'x'"),
        ([*REQUIRED, "--max-items", "train=1,2"], "--max-items: invalid int value: '1,2'"),
        ([*REQUIRED, "--weights", "1,,2"], "--weights: invalid float value: ''"),
        ([*REQUIRED, "--batch-size", "many"], "--batch-size: invalid int value: 'many'"),
        ([*REQUIRED, "--storage", "int8"], "invalid choice: 'int8'"),
        ([*REQUIRED, "--batch-size", "0"], "0 photos make no batch"),
        ([*REQUIRED, "--nonsense", "0"], "unrecognized arguments: --nonsense"),
    ],
)
def test_wrong_options_are_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(arguments, capsys)


def test_attribute_docstrings() -> None:
    found = attribute_docstrings(Config)
    assert found["batch_size"] == "Photos in a batch, of which 5 % may be broken."
    assert "undocumented" not in found
    assert len(found) == 17


@dataclass(frozen=True, kw_only=True)
class WithFiles:
    """Take files."""

    files: tuple[str, ...] = positional()
    """Files to take."""
    out: str
    """Where to."""


def test_positional_fields_take_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    parsed = parse_config(WithFiles, ["a b", "c,d", "--out", "x"], "prog")
    assert parsed == WithFiles(files=("a b", "c,d"), out="x")
    with pytest.raises(SystemExit):
        parse_config(WithFiles, ["--out", "x"], "prog")
    assert "FILES" in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class Speed(OptionGroup):
    """How fast it goes."""

    speed: float = 1.0
    """Metres per second."""

    def check(self) -> None:
        require(self.speed > 0, "speed", self.speed, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class Route(OptionGroup):
    """Where it goes."""

    stops: tuple[int, ...] = ()
    """Stops."""


@dataclass(frozen=True, kw_only=True)
class Journey(Speed, Route):
    """Go somewhere."""

    files: tuple[str, ...] = positional()
    """Files to take."""
    goal: str
    """Where to."""
    speed: float = 2.0
    names: Mapping[str, str] = field(default_factory=dict)
    """Names."""
    folder: Path | None = None
    """Folder."""

    def check(self) -> None:
        require(self.goal != "nowhere", "goal", self.goal, "a place")


def test_inherited_options_are_grouped_in_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "9999")
    with pytest.raises(SystemExit):
        parse_config(Journey, ["--help"], "prog")
    shown = capsys.readouterr().out
    assert shown.startswith("usage: prog FILES … --goal TEXT [options]\n")
    own, route, speed = (shown.index(title) for title in ("\noptions:", "\nWhere it goes:", "\nHow fast it goes:"))
    assert own < shown.index("Where to.") < route < shown.index("--stops N[,…]") < speed < shown.index("--speed X")
    assert "Metres per second. (default: 2.0)" in shown, "the help of a group, the default of the config"


@pytest.mark.parametrize(("option", "value"), [("speed", "0"), ("goal", "nowhere")])
def test_each_group_checks_its_own_options(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(Journey, ["a", "--goal", "b", f"--{option}", value], "prog")
    assert f"--{option}: found {value}" in capsys.readouterr().err


ARGUMENTS = ["a b", "c,d", "--goal", 'ü "q" \\ \x7f\n😀', "--stops", "1,2", "--names", "a key=v=1", "--folder", "x/y"]


def test_printed_config_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(Journey, [*ARGUMENTS, "--print-config"], "prog")
    assert caught.value.code == 0
    file = tmp_path / "file.toml"
    file.write_text(capsys.readouterr().out)
    expected = parse_config(Journey, ARGUMENTS, "prog")
    assert parse_config(Journey, ["--config", str(file)], "prog") == expected
    changed = parse_config(Journey, ["--config", str(file), "--stops", "3", "--speed", "5"], "prog")
    assert changed == replace(expected, stops=(3,), speed=5.0), "the command line replaces the file's option"


def test_printed_config_names_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(Journey, ["--stops", "1", "--print-config"], "prog")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.splitlines() == [
        "stops = [1]", "speed = 2.0", "# files =  # required", "# goal =  # required", "names = {}",
        "# folder =  # not set",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("speeed = 1", "speeed is not an option, expected some of stops, speed, files, goal, names, folder."),
        ("speed = 'fast'", "speed: 'fast', expected float."),
        ("stops = 1", "stops: 1, expected a list."),
        ("stops = [1.5]", "stops: 1.5, expected int."),
        ("names = 'a'", "names: 'a', expected an object."),
        ("goal = ", "Invalid value"),
        ("stops = [1]", "the following arguments are required: FILES, --goal"),
        ("files = ['f']\ngoal = 'nowhere'", "--goal: found nowhere, expected a place."),
    ],
)
def test_wrong_config_file_is_a_usage_error(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.toml"
    file.write_text(content)
    with pytest.raises(SystemExit) as caught:
        parse_config(Journey, ["--config", str(file)], "prog")
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_absent_config_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(Journey, ["--config", str(tmp_path / "none.toml")], "prog")
    assert "none.toml" in capsys.readouterr().err
