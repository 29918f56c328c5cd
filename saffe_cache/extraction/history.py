"""Which inputs earlier extractions encoded together, told by the history in an encoder's manifest.

The last bits of a row can depend on what else was in its batch: a product of matrices of another height may add in
another order. So who encodes rows again, to the same bytes, has to cut the inputs into the same blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

from saffe_cache.extraction.config import ExtractConfig, config_from_json, encode_options
from saffe_cache.extraction.planning import begin_blocks, block_rows, cut_blocks
from saffe_cache.store.manifest import EncoderManifest, layers_among


@dataclass(frozen=True, kw_only=True)
class PastExtraction:
    """An extraction that came to its end; those that were killed before encoded the same blocks."""

    config: ExtractConfig
    first_new: Mapping[str, int]
    """Of the arrays that it added rows to: the first input whose rows they are. Rows before were left alone."""
    start: int
    stop: int
    """It encoded the inputs from `start` to before `stop`."""
    block_rows: int

    def inputs_of(self, name: str, inputs: range) -> range:
        """Those of the inputs whose rows of an array are of this extraction."""
        first = max(inputs.start, self.first_new.get(name, self.stop))
        return range(first, max(first, min(inputs.stop, self.stop)))

    def blocks_of(self, name: str, inputs: range) -> Iterator[range]:
        """The blocks in which their rows of an array were made."""
        mine = self.inputs_of(name, inputs)
        begin = max(self.start, mine.start // self.block_rows * self.block_rows)
        blocks = cut_blocks(begin, self.stop, self.block_rows) if mine else iter(())
        return takewhile(lambda block: block.start < mine.stop, blocks)


def past_extractions(manifest: EncoderManifest, device: str | None = None) -> list[PastExtraction]:
    """Oldest first. Each found the rows of those before it, and encoded what its arrays lacked.

    `device` takes the place of the one in their configs.

    Raises:
        ValueError, TypeError: a config in the history is none that this release knows, or its device is not here.
    """
    inputs_in: dict[str, int] = {}
    finished = 0
    found = []
    for entry in manifest.extractions:
        config, stop = config_from_json(entry["config"]), int(entry["inputs"][1])
        config = replace(config, device=device or config.device)
        names = (inputs_in.keys() | _asked(config, manifest)) & manifest.arrays.keys()
        first_new = {name: inputs_in.get(name, 0) for name in names if inputs_in.get(name, 0) < stop}
        rows = block_rows(
            encode_options(config), [manifest.arrays[name].spec for name in names if layers_among([name])]
        )
        encoded = [first for name, first in first_new.items() if name != "offsets"]
        start = begin_blocks(min(encoded, default=stop), finished, rows)
        found.append(PastExtraction(config=config, first_new=first_new, start=start, stop=stop, block_rows=rows))
        inputs_in |= dict.fromkeys(first_new, stop)
        finished = stop
    return found


def _asked(config: ExtractConfig, manifest: EncoderManifest) -> set[str]:
    """The arrays that a config asks for."""
    layers = config.layers.get(manifest.modality, (manifest.num_layers - 1, manifest.num_layers))
    vectors = {"pooled", "projected"} if config.pooled else set()
    return {f"hidden_states/{layer}" for layer in layers} | vectors | {"offsets"}
