"""Tables and sections for terminals and Markdown: aligned, within 100 columns, what is wrong first."""

from __future__ import annotations

from saffe_cache.core.results import Section, to_text
from saffe_cache.core.tables import Cell, Row, Table, duration, interval_cell, plain_row, size


def wide(num_columns: int, caption: str = "Percent.") -> Table:
    names = tuple(f"recall_at_{k}" for k in range(num_columns))
    fam = tuple(interval_cell(k / 10, k / 10 - 0.05, k / 10 + 0.05) for k in range(num_columns))
    chance = tuple(Cell(f"{k}.0") for k in range(num_columns))
    long = "holds: recall is 1.00, expected at most 2.00 (chance)"
    rows = [Row(Cell("FAM", "this run"), fam, "fam"), Row(Cell("control: shuffled", long), fam, "control")]
    return Table(caption, ("", *names), (*rows, Row(Cell("chance"), chance, "chance")))


def test_values_stand_below_values_and_notes_below_notes() -> None:
    lines = wide(3).to_text().splitlines()
    fam, control, chance = (line for line in lines if line.startswith(("FAM", "control: shuffled  ", "chance")))
    assert fam.split()[:3] == ["FAM", "(this", "run)"]
    for value, other, level in (("10.0", "10.0", "1.0"), ("20.0", "20.0", "2.0")):
        ends = {line.index(f" {text}") + len(text) for line, text in ((fam, value), (control, other), (chance, level))}
        assert len(ends) == 1
    assert fam.index("[5.0, 15.0]") == control.index("[5.0, 15.0]")
    assert lines[-1] == "  control: shuffled: holds: recall is 1.00, expected at most 2.00 (chance)"


def test_wide_tables_are_cut_into_blocks_of_100_columns() -> None:
    text = wide(12, caption="A caption that is long. " * 9).to_text()
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("\nchance") == text.count("\nFAM") > 1
    assert text.count("60.0 [55.0, 65.0]") == 2


def test_texts_are_aligned_on_the_left_and_numbers_on_the_right() -> None:
    table = Table("", ("", "pairs", "verdict"), (plain_row("a", "1,000", "holds"), plain_row("b", "–", "it fails")))
    assert table.text_columns == [False, True]
    assert table.to_text().splitlines() == ["   pairs  verdict", "a  1,000  holds", "b      –  it fails"]


def test_markdown_escapes_bars_and_names_every_column() -> None:
    table = Table("A caption.", ("x", "y"), (Row(Cell("a|b", "note"), (Cell("1", "[0, 2]"),)),))
    assert table.to_markdown() == "A caption.\n\n| x | y |\n|---|---|\n| a\\|b (note) | 1 [0, 2] |\n"


def test_durations_and_sizes_have_the_usual_units() -> None:
    words = {0.0123: "12.3 ms", 9.94: "9.9 s", 75: "75 s", 600: "10 min", 9000: "2.5 h"}
    assert {seconds: duration(seconds) for seconds in words} == words
    assert duration(None) == "unknown"
    assert [size(2e6), size(2.5e9)] == ["2 MB", "2.5 GB"]


def test_failures_come_first_and_folded_tables_are_left_out() -> None:
    folded = Table("Folded.", ("", "x"), (plain_row("a", "1"),), folded=True)
    shown = Table("Shown.", ("", "x"), (plain_row("a", "1"),))
    section = Section(title="Title", tables=[shown, folded], texts=["A remark."], facts=[("cache", "c.zarr")])
    lines = to_text(["shuffled: 50.0"], ["the epoch was chosen here"], [section]).splitlines()
    assert lines[:2] == [
        "CONTROL FAILED: shuffled: 50.0. Do not use these numbers.",
        "WARNING: the epoch was chosen here",
    ]
    assert "Folded." not in lines
    assert lines.index("Title") < lines.index("Shown.") < lines.index("- A remark.") < lines.index("  cache: c.zarr")
    alone = Section(title="Title", tables=[folded])
    assert "Folded." in alone.to_text()
