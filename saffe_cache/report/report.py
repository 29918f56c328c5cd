"""One page of any results, for people: index.html, figures/ and data/."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from saffe_cache.core.atomic_io import hold_folder, remove_partial_files, write_whole
from saffe_cache.core.options import positional, require

logger = logging.getLogger(__name__)

_EXTRA = ("jinja2", "markupsafe", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Make one self-contained page of results: tables with controls and chance, plots, costs, and galleries.

    The page loads nothing and runs no script. Failed controls and warnings come first.
    """

    runs: tuple[str, ...] = positional()
    """Output folders of other commands. Results directly below a folder are shown too: a run's evaluations, or the
    recipes of a sweep."""
    out: str
    """Folder for index.html, figures (SVG and PNG) and data (CSV and JSON)."""
    title: str = "Results and how far to trust them"
    """Title of the page."""
    data: tuple[str, ...] = ()
    """Where photos, sounds and videos are now; repeat it for several places. Default: where extractions found them."""
    queries: tuple[str, ...] = ()
    """Also show queries that contain these words; repeat it for several. An evaluation keeps at most 2,000 queries."""
    random_queries: int = 6
    """Randomly drawn queries per evaluation."""
    extreme_queries: int = 4
    """The FAM's best queries per evaluation, and as many of its worst."""

    def __post_init__(self) -> None:
        require(bool(self.runs), "runs", "none", "at least one folder")
        for option in ("random_queries", "extreme_queries"):
            require(getattr(self, option) >= 0, option, getattr(self, option), "0 or more")


def make_report(config: ReportConfig) -> str:
    """Make the page, and return its path.

    Raises:
        ValueError: a folder holds no result, or a file in it is damaged.
        ImportError: a package that draws or renders is not installed.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    try:
        from saffe_cache.report.page import find_results, make_content, render
    except ImportError as error:
        if error.name not in _EXTRA:
            raise
        raise ImportError(f"saffe report needs the package {error.name}: pip install 'saffe-cache[report]'.") from None
    content = make_content(find_results(config.runs), config)
    page = render(content, config.title)
    out = Path(config.out)
    with hold_folder(out):
        for folder in (out, out / "figures", out / "data"):
            remove_partial_files(folder)
        for plot in content.plots:
            write_whole(out / "figures" / f"{plot.name}.svg", plot.svg)
            write_whole(out / "figures" / f"{plot.name}.png", plot.png)
        for name, data in content.files.items():
            write_whole(out / "data" / name, data)
        write_whole(out / "index.html", page)
    album = content.album
    shown = f"{len(album.thumbnails)} thumbnails" + (f", {len(album.sounds)} sounds" if album.sounds else "")
    logger.info("%s: %.1f MB, %s.", out / "index.html", len(page) / 1e6, shown)
    return str(out / "index.html")
