"""One page of runs, evaluations, ablations, episodes and alignments, for people: index.html, figures/ and data/."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from saffe_cache.core.atomic_io import hold_folder, remove_partial_files, write_whole
from saffe_cache.core.options import positional, require
from saffe_cache.report.photos import Album
from saffe_cache.report.reading import read_material

logger = logging.getLogger(__name__)

_EXTRA = ("jinja2", "markupsafe", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Make one self-contained page of what was run: results with controls and chance, plots, costs, and galleries.

    The page loads nothing and runs no script. What is wrong comes first.
    """

    runs: tuple[str, ...] = positional()
    """Folders to show: a finished run with its evaluations, a single evaluation, an ablation (ablation.json), few-shot
    episodes (binding.json), fusions that match pairs (match.json), an alignment (alignment.json),
    captions (caption.json)."""
    out: str
    """Folder for index.html, figures (SVG and PNG) and data (CSV)."""
    title: str = "What was found, and what it rests on"
    """Of the page."""
    data: tuple[str, ...] = ()
    """Where the photos are now; repeat it for several. Default: where each extraction found them."""
    queries: tuple[str, ...] = ()
    """Show also the queries that hold these words; repeat it for several. Of more than 2,000 queries, of those that the
    evaluation drew."""
    random_queries: int = 6
    """Queries drawn at random, of each evaluation."""
    extreme_queries: int = 4
    """The FAM's best queries, and as many of its worst."""

    def __post_init__(self) -> None:
        require(bool(self.runs), "runs", "none", "at least one folder")
        for option in ("random_queries", "extreme_queries"):
            require(getattr(self, option) >= 0, option, getattr(self, option), "0 or more")


def make_report(config: ReportConfig) -> str:
    """Make the page, and return its path.

    Raises:
        ValueError: a folder is nothing that a report shows, or a file in it is damaged.
        ImportError: what draws and renders is not installed.
        OSError: the disk is full or gone, or another process writes to the output folder.
    """
    material = read_material(config.runs)
    try:
        from saffe_cache.report.content import Choice, make_content
        from saffe_cache.report.page import render
    except ImportError as error:
        if error.name not in _EXTRA:
            raise
        raise ImportError(f"saffe-report needs the package {error.name}: pip install 'saffe-cache[report]'.") from None
    choice = Choice(asked=config.queries, num_random=config.random_queries, num_extreme=config.extreme_queries)
    content = make_content(material, Album(config.data), choice)
    page = render(content, config.title)
    out = Path(config.out)
    with hold_folder(out):
        for folder in (out, out / "figures", out / "data"):
            remove_partial_files(folder)
        for plot in content.plots:
            write_whole(out / "figures" / f"{plot.name}.svg", plot.svg)
            write_whole(out / "figures" / f"{plot.name}.png", plot.png)
        for sheet in content.sheets:
            write_whole(out / "data" / f"{sheet.name}.csv", sheet.csv())
        write_whole(out / "index.html", page)
    logger.info("%s: %.1f MB, %d photos.", out / "index.html", len(page) / 1e6, len(content.album.thumbnails))
    return str(out / "index.html")
