"""How the commands end: stopped by a signal, out of memory, or at an error of the system."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import saffe_cache
from saffe_cache import cli
from saffe_cache.cli import _guarded, evaluate_command, extract_command, main, train_command
from saffe_cache.core.options import attribute_docstrings
from saffe_cache.verbs import GROUPS, VERBS

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def plain_sigterm() -> Iterator[None]:
    """What another test left would end this process."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def ending(action: Callable[[], object]) -> int:
    def act() -> int:
        action()
        return 0

    return _guarded("saffe-test", act)


def fail(error: BaseException) -> Callable[[], object]:
    def action() -> None:
        raise error

    return action


def send(sent: int) -> Callable[[], object]:
    def action() -> None:
        os.kill(os.getpid(), sent)
        time.sleep(10)

    return action


def test_import_that_sigterm_cuts_off_ends_as_sigterm(capsys: pytest.CaptureFixture[str]) -> None:
    """Compiled modules make an ImportError of what is raised in their initialisation."""

    def action() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ImportError("cut off") from None
        return 0

    assert _guarded("saffe", action) == 143
    assert "interrupted. Run the same command again to resume." in capsys.readouterr().err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_a_command_in_one_line(sent: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    try:
        assert ending(send(sent)) == 128 + sent
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "saffe-test: interrupted. Run the same command again to resume.\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_sigterm_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert ending(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left\n on device", "a/file"),
            "a/file: No space left on device. Make room on the disk, and run the same command again.",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "photos/private"),  # to be read
            "photos/private: Permission denied. Give this user access to it, and run the same command again.",
        ),
        (OSError("words of our own"), "words of our own"),
        (
            MemoryError("Unable to allocate 8 GiB\nfor an array"),
            "out of memory: Unable to allocate 8 GiB. Free some, and run the same command again.",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "out of memory: [enforce fail] DefaultCPUAllocator: can't allocate memory. Free some, and run the same "
            "command again.",
        ),
    ],
)
def test_errors_become_one_line(error: BaseException, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(fail(error)) == 1
    assert capsys.readouterr().err == f"saffe-test: {line}\n"


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        ending(fail(RuntimeError("a mistake of ours")))


HEAVY = ["torch", "transformers", "zarr", "datasets", "faiss", "h5py", "numcodecs", "fsspec", "PIL", "pandas", "scipy",
         "sklearn", "matplotlib", "jinja2"]  # fmt: skip
COUNT_HEAVY = """
import sys
from saffe_cache.cli import main
try:
    main(sys.argv[2:])
finally:
    print("HEAVY", *sorted(set(sys.argv[1].split(",")) & sys.modules.keys()))
"""


def output_of(*arguments: str, code: str = COUNT_HEAVY) -> str:
    command = [sys.executable, "-c", code, ",".join(HEAVY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_imports_nothing_heavy(verb: str) -> None:
    shown = output_of(*verb.split(), "--help")
    assert "usage: saffe" in shown
    assert shown.splitlines()[-1] == "HEAVY"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_holds_every_docstring(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "9999")  # argparse breaks lines at hyphens too
    with pytest.raises(SystemExit) as caught:
        main([*verb.split(), "--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith(f"usage: saffe {verb} ")
    for text in attribute_docstrings(VERBS[verb].load_config()).values():
        assert text in shown


def test_help_lists_all_verbs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "9999")
    for arguments in ([], *([name] for name in GROUPS)):
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, verb in VERBS.items():
        assert f" {name.split()[-1]} {verb.summary}" in shown
    for name, summary in GROUPS.items():
        assert f" {name} {summary}" in shown


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"saffe {saffe_cache.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["cache"], ["cache", "nonsense"]])
def test_an_unknown_verb_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "VERB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "verb", "prog"),
    [
        (extract_command, "extract", "saffe-extract"),
        (train_command, "train", "saffe-train-fam"),
        (evaluate_command, "evaluate", "saffe-index-eval"),
    ],
)
def test_fixed_names_are_the_same_functions(
    command: Callable[[list[str]], int], verb: str, prog: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[object] = []
    monkeypatch.setattr(cli, "_run_verb", lambda *given: called.append(given) or 0)
    assert command(["--x"]) == main([verb, "--x"]) == 0
    assert called == [(verb, prog, ["--x"]), (verb, f"saffe {verb}", ["--x"])]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts[prog] == f"saffe_cache.cli:{command.__name__}"
    assert set(scripts) == {"saffe", "saffe-extract", "saffe-train-fam", "saffe-index-eval"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_verbs_and_options(tmp_path: Path) -> None:
    script = tmp_path / "saffe.bash"
    script.write_text(output_of("--print-completion", "bash").rpartition("HEAVY")[0])
    ask = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_saffe; printf "%s\\n" "${COMPREPLY[@]}"'
    )

    def completed(*words: str) -> list[str]:
        command = ["bash", "-c", ask, "bash", str(script), "saffe", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert completed("ex") == ["extract"]
    assert completed("cache", "conv") == ["convert"]
    assert completed("extract", "--enc") == ["--encoder"]
    assert completed("extract", "--storage", "fl") == ["float32", "float16", "float8"]
