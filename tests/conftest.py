"""Shared by the tests: offline, one thread, and tiny models built once a session."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: threads would only wait for one another
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from s3_server import S3Proxy


@pytest.fixture(scope="session", autouse=True)
def user_folder_of_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is remembered of files stays out of the user's cache folder."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the tiny model of a family; see tiny_models.CASES. Not to be written to."""
    from tiny_models import save_tiny

    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp("models") / f"tiny-{name}")
        return made[name]

    return folder_of


@pytest.fixture(scope="module")
def no_fsync() -> Iterator[None]:
    """For modules that write thousands of files."""
    from store_cases import without_fsync

    with without_fsync():
        yield


@pytest.fixture
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the datasets library, which copies what it reads."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def s3_of_session() -> Iterator[S3Proxy]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    from s3_server import s3_server

    with s3_server() as proxy:
        yield proxy


@pytest.fixture
def s3(s3_of_session: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    """Without faults, and known to the client by its environment."""
    for name, value in s3_of_session.environment.items():
        monkeypatch.setenv(name, value)
    yield s3_of_session
    s3_of_session.latency_seconds, s3_of_session.share_failing, s3_of_session.refuses = 0.0, 0.0, False
    if not s3_of_session.is_up:
        s3_of_session.start()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first, so that no worker is left alone with them at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Workers send reports as UTF-8, which lone surrogates in captured names of files are not."""
    report = yield
    report.sections = [(name, _sendable(text)) for name, text in report.sections]
    if report.longrepr is not None and _sendable(str(report.longrepr)) != str(report.longrepr):
        report.longrepr = _sendable(str(report.longrepr))
    report.user_properties = [(name, _sendable(str(value))) for name, value in report.user_properties]
    return report


def _sendable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
