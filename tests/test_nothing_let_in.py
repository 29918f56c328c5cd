"""Nothing runs that came with data: no pickles, no code of repositories, no sequences for the terminal."""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from store_cases import describe, image_contents, without_fsync, write_contents
from test_architecture import modules

from saffe_cache import cli
from saffe_cache.core.features import printable
from saffe_cache.core.items import Item
from saffe_cache.core.results import Measurement, Result, Section
from saffe_cache.core.tables import Cell, Row, Table
from saffe_cache.encoders.encoder import load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.fusion.library_block import blank_model
from saffe_cache.store.manifest import read_encoder, write_encoder
from saffe_cache.store.parts import write_table
from saffe_cache.store.root import existing_root, write_root
from saffe_cache.store.storage import Storage
from saffe_cache.store.table import TableBuilder

FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    *("getoutput", "system", "popen", "Popen", "check_output"),
    *("unpack_archive", "extractall", "ZipFile", "TarFile", "urlopen", "urlretrieve"),
    *("full_load", "unsafe_load", "read_pickle", "to_pickle"),
}
UNPICKLING = {"torch.load", "np.load", "numpy.load", "yaml.load", "joblib.load", "torch.jit.load"}
FORBIDDEN_IMPORTS = {
    *("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "subprocess", "tarfile"),
    *("urllib", "requests", "http", "httpx", "ftplib", "telnetlib", "runpy"),
}


def nodes() -> Iterator[tuple[Path, ast.AST]]:
    for path in modules():
        yield from ((path, node) for node in ast.walk(ast.parse(path.read_text())))


def test_package_runs_and_fetches_nothing_that_data_name() -> None:
    """ruff's bandit rules see the same for the whole repository; this holds also what they have no rule for."""
    for path, node in nodes():
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in UNPICKLING or "allow_pickle=False" in map(ast.unparse, node.keywords), (
                f"{path}:{node.lineno}: {name} may unpickle"
            )
            assert name not in FORBIDDEN_BUILTINS, f"{path}:{node.lineno}: {name}"
            assert name.split(".")[-1] not in FORBIDDEN_CALLS, f"{path}:{node.lineno}: {name}"
            assert not name.endswith("import_module") or path.stem in {
                *("verbs", "registry"),  # tables within this package
                *("discovery", "library_block"),  # modules of transformers; refused below with any other name
            }, f"{path}:{node.lineno}: {name} outside the tables of verbs, protocols and fusions"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if path.parts[-2:] == ("sources", "files.py"):  # reads members in place and extracts none
                names = [name for name in names if name != "tarfile"]
            names = [name for name in names if name != "urllib.parse"]  # it reads addresses and fetches none
            assert not {name.split(".")[0] for name in names} & FORBIDDEN_IMPORTS, f"{path}:{node.lineno}: {names}"


def test_models_load_without_their_code_from_safetensors() -> None:
    """transformers would ask on the terminal whether to run a repository's code, and else unpickle its weights."""
    said: dict[str, int] = {"trust_remote_code": 0, "use_safetensors": 0}
    for path, node in nodes():
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            said["trust_remote_code"] += 1
        if isinstance(node, ast.keyword) and node.arg in said:
            assert isinstance(node.value, ast.Constant), path
            assert node.value.value is (node.arg == "use_safetensors"), f"{path}: {node.arg}={node.value.value}"
            said[node.arg] += 1
    assert said == {"trust_remote_code": 2, "use_safetensors": 1}


@pytest.mark.parametrize("modality", ["image", "text"])
def test_code_that_comes_with_a_model_is_refused_and_not_run(
    modality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user is asked whether to run it"))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"found no model \(.*contains custom code"):
        load_encoder(EncoderRequest(modality=modality, model_id=str(tmp_path)))  # type: ignore[arg-type]
    assert not (tmp_path / "ran").exists()


ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\r\u202e"


def assert_plain(text: str) -> None:
    assert "2J" in text, "it is shown, as an escape"
    assert all(char.isprintable() or char == "\n" for char in text), ascii(text)


def test_what_a_terminal_would_obey_is_written_as_an_escape() -> None:
    assert printable("a é 日本 👩") == "a é 日本 👩"
    assert printable(ESCAPES + "\n\ud800") == r"\x1b]0;title\x07\x1b[2J\x9b31m\r\u202e\n\ud800"


def test_inspect_sends_nothing_to_the_terminal(tmp_path: Path) -> None:
    contents = image_contents(3)
    with without_fsync():
        write_contents(tmp_path, contents)
        builder = TableBuilder(None, ("a {}",))
        fields = {"split": f"train{ESCAPES}", "captions": (f"caption{ESCAPES}",), "labels": (f"class{ESCAPES}",)}
        builder.add(Item(id=f"id{ESCAPES}", hashes={"image": bytes(32)}, **fields))  # type: ignore[arg-type]
        builder.add(Item(id="broken", split="train", problem=f"unreadable{ESCAPES}"))
        root = existing_root(Storage(tmp_path))
        tables = write_table(Storage(tmp_path), builder.build())
        write_root(Storage(tmp_path), replace(root, tables=tables), root)
        manifest = read_encoder(Storage(tmp_path), contents.key)
        manifest.invalid[0] = f"broken{ESCAPES}"
        manifest.arrays[f"more{ESCAPES}"] = manifest.arrays["pooled"]
        write_encoder(Storage(tmp_path), manifest)
    shown = describe(tmp_path)
    assert_plain(shown)
    assert shown.count("2J") == 10
    assert "\n  unreadable input id\\x1b]0;title" in shown


@dataclass(frozen=True, kw_only=True)
class Hostile(Result):
    """Escape sequences wherever a result shows text."""

    verb: ClassVar[str] = "hostile"

    def measurements(self) -> Iterator[Measurement]:
        yield Measurement("", ESCAPES, "map", 0.5)

    def sections(self) -> list[Section]:
        row = Row(Cell(f"a{ESCAPES}", ESCAPES), (Cell(ESCAPES, ESCAPES),))
        return [
            Section(
                title=ESCAPES,
                lead=ESCAPES,
                tables=[Table(ESCAPES, (ESCAPES, ESCAPES), (row,))],
                facts=[(ESCAPES, ESCAPES)],
                definitions=[(ESCAPES, ESCAPES)],
                texts=[ESCAPES],
            )
        ]


def test_reports_send_nothing_to_the_terminal() -> None:
    assert_plain(Hostile(failures=(ESCAPES,), warnings=(ESCAPES,)).to_text())


def test_messages_of_commands_send_nothing_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])

    def fail() -> int:
        logging.getLogger("saffe_cache").warning("left out %s", ESCAPES)
        raise ValueError(f"item {ESCAPES}\nsecond line")

    assert cli._guarded("prog", fail) == 1
    told = capsys.readouterr().err
    assert_plain(told)
    assert told.startswith("left out \\x1b]0;title")
    assert told.endswith("\\u202e\nsecond line\n")


@pytest.mark.parametrize("name", ["os:system", "saffe_cache.cli:main", "transformers.models.bert.modeling_bert:logger"])
def test_a_block_names_only_models_of_transformers(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no module of transformers|is no model"):
        blank_model(name, {})
