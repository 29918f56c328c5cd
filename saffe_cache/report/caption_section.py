"""The part of a page on language models that photos join."""

from __future__ import annotations

from collections.abc import Sequence

from saffe_cache.report.captions import NEEDED_LOSSES, Captions, Interval, Loss
from saffe_cache.report.sections import Section
from saffe_cache.report.tables import Cell, Sheet, Table, TableRow, percent

_HEADS = {
    "photo": "its photo",
    "photos_shuffled": "another's photo",
    "no_photo": "no photo",
    "plain_model": "plain language model",
}


def caption_section(found: Sequence[Captions], names: Sequence[str], anchor: str, sheets: list[Sheet]) -> Section:
    """All of them in one table, by layer; a few captions of each folded."""
    ordered = sorted(zip(found, names, strict=True), key=lambda one: one[0].layer)
    sheets.append(_sheet(ordered, anchor))
    rows = [
        TableRow("plain", Cell(f"layer {one.layer} of {one.num_layers}", name), _cells(one)) for one, name in ordered
    ]
    chance = [Cell(""), *(Cell("") for _ in NEEDED_LOSSES), Cell(percent(found[0].chance)), Cell(""), Cell("")]
    measured = [metric for metric in found[0].own_caption if metric.startswith("photo, ")]
    words = [(metric, "share of photos whose own caption is the likeliest among others'") for metric in measured]
    return Section(
        anchor=anchor,
        title="A frozen language model that sees photos",
        lead="Loss of people's captions, nats a token: the lower, the better. Beneath, 95 % intervals over photos.",
        table=Table(
            "Photo tokens join at a layer; below it the text runs alone, from the cache.",
            (
                "joined at",
                "photos",
                *(_HEADS[name] for name in NEEDED_LOSSES),
                "own caption found, percent",
                "trained parameters",
                "FLOPs a step",
            ),
            (*rows, TableRow("chance", Cell("chance"), tuple(chance))),
        ),
        words=words,
        folded=[_examples(one, name) for one, name in ordered],
    )


def _cells(one: Captions) -> tuple[Cell, ...]:
    return (
        Cell(str(one.photos)),
        *(_loss_cell(one.losses[name]) for name in NEEDED_LOSSES),
        _found_cell(one.own_caption.get("photo, by gain")),
        Cell(f"{one.cost.trainable_parameters:,}"),
        Cell(f"{one.cost.training_step_flops / 1e9:.1f} G"),
    )


def _loss_cell(loss: Loss) -> Cell:
    return Cell(f"{loss.loss:.3f}", f"{loss.low:.3f} – {loss.high:.3f}")


def _found_cell(found: Interval | None) -> Cell:
    return Cell("–") if found is None else Cell(percent(found.value), f"{percent(found.low)} – {percent(found.high)}")


def _examples(one: Captions, name: str) -> Table:
    rows = [
        TableRow("plain", Cell(said.caption, said.id), (Cell(said.own[0] if said.own else ""),))
        for said in one.examples
    ]
    return Table(f"What it says, and what people say: {name}", ("greedy caption", "one of people's"), tuple(rows))


def _sheet(ordered: Sequence[tuple[Captions, str]], anchor: str) -> Sheet:
    rows = [
        (
            name,
            one.layer,
            *(one.losses[loss].loss for loss in NEEDED_LOSSES),
            *(_value(one, metric) for metric in ("photo, by gain", "photos_shuffled, by gain")),
            one.chance,
            one.cost.training_step_flops,
        )
        for one, name in ordered
    ]
    header = ("run", "layer", *NEEDED_LOSSES, "own_caption", "own_caption_shuffled", "chance", "training_step_flops")
    return Sheet(anchor, header, tuple(rows))


def _value(one: Captions, metric: str) -> float | None:
    return one.own_caption[metric].value if metric in one.own_caption else None
