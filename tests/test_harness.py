"""A study is one module and one line in VERBS: a tiny one is added here and run as any other."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import tiny_study
from tiny_study import CountConfig, CountResult, Share, count

from saffe_cache.cli import main
from saffe_cache.core.atomic_io import FolderInUseError, hold_folder
from saffe_cache.core.results import exit_status, read_report
from saffe_cache.report.report import ReportConfig, make_report
from saffe_cache.verbs import VERBS, Verb


def counted(monkeypatch: pytest.MonkeyPatch, killed_at: int | None = None) -> list[int]:
    """The limits that are measured from now on; the study is killed at one of them."""
    measured: list[int] = []
    original = tiny_study.share

    def share(limit: int) -> Share:
        if limit == killed_at:
            raise KeyboardInterrupt
        measured.append(limit)
        return original(limit)

    monkeypatch.setattr(tiny_study, "share", share)
    return measured


def test_result_reads_back_as_the_same_class(tmp_path: Path) -> None:
    out = count(CountConfig(out=str(tmp_path / "evens")))
    result = CountResult.load(out)
    assert [one.share for one in result.shares] == [1 / 2, 2 / 3, 3 / 5]
    assert list(result.seconds) == ["below-2", "below-3", "below-5"]
    assert result.to_frame()["value"].tolist() == [1 / 2, 2 / 3, 3 / 5]
    config = json.loads((tmp_path / "evens" / "config.json").read_text())
    assert (config["verb"], config["resolved"], config["config"]["limits"]) == ("count", {"data": "numbers"}, [2, 3, 5])


def test_killed_study_resumes_with_the_next_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CountConfig(out=str(tmp_path / "killed"))
    with monkeypatch.context() as patch:
        first = counted(patch, killed_at=3)
        with pytest.raises(KeyboardInterrupt):
            count(config)
    assert first == [2]
    assert not (tmp_path / "killed" / "result.json").exists()
    (tmp_path / "killed" / "cells" / ".below-3.json.0.partial").write_text("{")
    second = counted(monkeypatch)
    count(config)
    assert second == [3, 5]
    assert not list((tmp_path / "killed").rglob("*.partial"))
    whole = CountResult.load(count(CountConfig(out=str(tmp_path / "whole"))))
    assert CountResult.load(config.out).shares == whole.shares


def test_finished_study_measures_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = CountConfig(out=str(tmp_path))
    count(config)
    measured = counted(monkeypatch)
    with caplog.at_level(logging.INFO):
        count(CountConfig(out=str(tmp_path), device="cuda"))
    assert not measured
    assert "finished already, nothing to do" in caplog.text


def test_other_options_are_refused_in_one_folder(tmp_path: Path) -> None:
    count(CountConfig(out=str(tmp_path)))
    with pytest.raises(ValueError, match=r"holds another result \(limits: \[2, 3, 5\] there, \[7\] now\)"):
        count(CountConfig(out=str(tmp_path), limits=(7,)))


@pytest.mark.locks
def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    with hold_folder(tmp_path), pytest.raises(FolderInUseError):
        count(CountConfig(out=str(tmp_path)))


def test_damaged_cell_is_named_with_its_remedy(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    cells.mkdir()
    (cells / "below-2.json").write_text('{"seconds": 1, "cell": {"limit": 2}}')
    with pytest.raises(ValueError, match=r"below-2\.json: it is damaged .* Delete it and run the same command again"):
        count(CountConfig(out=str(tmp_path)))


def test_failed_control_is_exit_status_3_and_comes_first(tmp_path: Path) -> None:
    out = count(CountConfig(out=str(tmp_path)))
    assert exit_status(out) == 3
    assert read_report(out).startswith("CONTROL FAILED: below 3: 0.67, expected 0.5. Do not use these numbers.")
    passing = count(CountConfig(out=str(tmp_path / "passing"), limits=(2, 4)))
    assert exit_status(passing) == 0


def test_added_study_is_a_command_and_part_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = Verb(
        summary="Count even numbers.",
        config="studies.counting:CountConfig",
        run="studies.counting:count",
        result="studies.counting:CountResult",
    )
    monkeypatch.setitem(sys.modules, "saffe_cache.studies.counting", tiny_study)
    monkeypatch.setitem(VERBS, "count", verb)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        counted(patch, killed_at=5)
        assert main(["count", "--out", str(tmp_path / "out"), "--limits", "2,3,5"]) == 130
    measured = counted(monkeypatch)
    assert main(["count", "--out", str(tmp_path / "out"), "--limits", "2,3,5"]) == 3
    assert measured == [5]
    assert read_report(tmp_path / "out") in capsys.readouterr().out
    page = Path(make_report(ReportConfig(runs=(str(tmp_path / "out"),), out=str(tmp_path / "page")))).read_text()
    assert "Even numbers." in page
    assert "below 3: 0.67, expected 0.5" in page
