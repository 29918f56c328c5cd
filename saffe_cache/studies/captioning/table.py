"""The result as a table for a terminal. 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from saffe_cache.core.features import printable

_NAME_WIDTH = 34


def format_captions(result: Mapping[str, Any]) -> str:
    """Losses in nats with their 95 % interval over photos. What is wrong comes first."""
    cost = result["cost"]
    lines = [f"CONTROL FAILED: {failure}. Do not use these numbers." for failure in result["failures"]]
    lines += textwrap.wrap(
        f"{result['title']}, split {result['split']}, {result['photos']} photos: {result['photo_tokens']} photo tokens "
        f"join layer {result['layer']} of {result['num_layers']} (0: in front of the text's embeddings); the best of "
        f"{result['epochs']} epochs was {result['best_epoch']}",
        100,
    )
    lines += ["", f"{'nats a token':{_NAME_WIDTH}}{'loss':>8}  {'95 %':^17}  perplexity"]
    for name, of in result["losses"].items():
        interval = f"[{of['low']:.3f}, {of['high']:.3f}]"
        lines.append(f"{name:{_NAME_WIDTH}}{of['loss']:8.3f}  {interval:^17}  {of['perplexity']:10.1f}")
    lines += ["", f"{'photo less':{_NAME_WIDTH}}{'':>8}  {'95 %':^17}"]
    for name, of in result["differences"].items():
        interval = f"[{of['low']:.3f}, {of['high']:.3f}]"
        lines.append(f"{name:{_NAME_WIDTH}}{of['value']:8.3f}  {interval:^17}")
    lines += ["", f"{'own caption found, percent':{_NAME_WIDTH}}{'':>8}  {'95 %':^17}"]
    for name, of in result["own_caption"].items():
        interval = f"[{100 * of['low']:.1f}, {100 * of['high']:.1f}]"
        lines.append(f"{name:{_NAME_WIDTH}}{100 * of['value']:8.1f}  {interval:^17}")
    lines.append(f"{'chance':{_NAME_WIDTH}}{100 * result['chance']:8.1f}")
    lines += [
        "",
        f"{cost['trainable_parameters']} trainable parameters, {1000 * cost['seconds_per_step']:.0f} ms a step, "
        f"{cost['training_step_flops'] / 1e9:.2f} GFLOP a step of {cost['flops_batch']} captions",
        *(f"{one['id']}: {one['caption']}" for one in result["examples"]),
    ]
    return "\n".join(map(printable, lines))
