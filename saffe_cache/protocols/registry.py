"""All protocols by name. Strings alone, so that options and help import nothing.

A new protocol is one module with a subclass of `saffe_cache.protocols.base.Protocol`, and one line here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from saffe_cache.inputs.spec import RunSpec
    from saffe_cache.protocols.base import Protocol


class Entry(NamedTuple):
    """A protocol that is imported when it is needed."""

    location: str
    """MODULE:CLASS below saffe_cache.protocols."""
    summary: str
    """One line of help."""


PROTOCOLS: dict[str, Entry] = {
    "caption": Entry("searches:CaptionProtocol", "captions search photos, and photos search captions"),
    "class": Entry("searches:ClassProtocol", "class names search photos"),
    "metadata": Entry("searches:MetadataProtocol", "captions search photos that are fused with their first caption"),
    "candidate": Entry("fused_pairs:CandidateProtocol", "every photo is fused with every class and scored"),
    "rerank": Entry("fused_pairs:RerankProtocol", "the first results of caption or class are fused with the query"),
    "composed": Entry("composed:ComposedProtocol", "a photo and a text search photos"),
    "image": Entry("searches:ImageProtocol", "photos search photos of their class"),
}


def protocol_choices() -> dict[str, str]:
    """Names and what they are, for help."""
    return {name: entry.summary for name, entry in PROTOCOLS.items()}


def load_protocol(name: str) -> type[Protocol]:
    """A protocol's class."""
    module, _, attribute = PROTOCOLS[name].location.partition(":")
    return getattr(importlib.import_module(f"saffe_cache.protocols.{module}"), attribute)  # type: ignore[no-any-return]


def own_protocol(spec: RunSpec) -> str:
    """The protocol that a run is trained for and validated with."""
    return next(name for name in PROTOCOLS if load_protocol(name).is_trained_for(spec))
