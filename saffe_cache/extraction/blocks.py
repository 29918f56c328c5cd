"""Check that an encoder's blocks, rebuilt from their weights, compute what the model computes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from saffe_cache.core.features import BlockSpec, BlockWeights, CacheError
from saffe_cache.core.tensors import ROUNDING, relative_difference
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.encoders.probing import Probe
from saffe_cache.encoders.windows import CutKinds
from saffe_cache.fusion.block import EncoderBlock
from saffe_cache.fusion.library_block import LibraryBlock, with_check, without_unused

logger = logging.getLogger(__name__)

_WHOLE = CutKinds()


def checked_blocks(
    encoder: FrozenEncoder, layers: Sequence[int], cut: CutKinds = _WHOLE
) -> tuple[dict[int, BlockWeights], dict[int, str]]:
    """The blocks of some layers that compute what the model does, and the reason for each that does not.

    Each block is rebuilt and run on the model's own states of a few inputs, padded and unpadded. Those of sounds are
    given to it as they are stored: without the padding of a window, which the model may have attended to, and one
    window after the other, which it saw alone.
    """
    if not layers:
        return {}, {}
    if encoder.family.is_own:
        reason = f"{encoder.family.model_class} is no class of transformers, which rebuilds blocks"
        return {}, dict.fromkeys(layers, reason)
    states, mask = _recorded(encoder, cut)
    usable: dict[int, BlockWeights] = {}
    unusable: dict[int, str] = {}
    for layer in layers:
        errors = []
        for candidate in _candidates(encoder, layer):
            error, reason = _error_of(candidate, states[layer], states[layer + 1], mask)
            if error <= ROUNDING[encoder.request.dtype]:
                is_known = isinstance(candidate.spec, BlockSpec)
                usable[layer] = candidate if is_known else _with_self_check(candidate, states[layer], mask)
                break
            errors.append((error, reason))
        else:
            error, reason = min(errors)
            unusable[layer] = reason or f"differs by {error:.2g} from the model's own next state{_seen(cut)}"
    for layer, reason in unusable.items():
        logger.warning("%s: its block %d cannot be used: %s.", encoder.fingerprint.key, layer, reason)
    return usable, unusable


def _seen(cut: CutKinds) -> str:
    """What the model saw that a block does not see."""
    kinds = {
        " shorter than its window, whose padding it attends to": cut.has_partial,
        " of several windows, each of which it saw alone": cut.has_several,
        " of several lengths, which are padded": cut.has_lengths and not cut.has_several,
    }
    named = [kind for kind, there_are in kinds.items() if there_are]
    return f" of sounds{' and'.join(named)}" if named else ""


def _recorded(encoder: FrozenEncoder, cut: CutKinds) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """`hidden_states[i]` of a few inputs as they are stored and padded in training, and the mask of padded ones."""
    probe, windows = Probe(encoder), encoder.windows
    if windows is None or not any(cut):
        return probe.states()
    if cut.num_tokens:
        longest = min(windows.size, (cut.num_tokens + 1) * windows.step - windows.margin - 1)
    else:
        longest = windows.size if windows.is_fixed else min(windows.size, encoder.sampling_rate or 16_000)
    differ = cut.has_partial or cut.has_lengths
    lengths = [max(windows.shortest, longest * part // 4) if differ else longest for part in (4, 3, 2)]
    alone = [
        [state[row, : windows.real_tokens(size)].float().cpu() for state in probe.record(probe.inputs(size)).states]
        for row, size in enumerate(lengths)  # different sounds
    ]
    if cut.has_several:
        alone[1:] = [[torch.cat(pair) for pair in zip(alone[0], one, strict=True)] for one in alone[1:]]
    counts = torch.tensor([len(one[0]) for one in alone])
    mask = torch.arange(int(counts.max())) < counts[:, None]
    states = [pad_sequence(list(of_layer), batch_first=True) for of_layer in zip(*alone, strict=True)]
    return states, None if bool(mask.all()) else mask


def _candidates(encoder: FrozenEncoder, layer: int) -> Iterator[BlockWeights]:
    """Ways to rebuild a block, the fastest first."""
    if encoder.family.block:
        yield encoder.block(layer)
    for with_first in (False, True):
        yield encoder.library_block(layer, with_first=with_first)


def _with_self_check(block: BlockWeights, entering: torch.Tensor, mask: torch.Tensor | None) -> BlockWeights:
    """A block that equals the model's, with what it computes in float32, and without weights that it does not need.

    The output is the rebuilt block's, not the model's: a model in half precision rounds more than another version of
    the library may differ by.
    """
    lengths = torch.full((len(entering),), -1) if mask is None else mask.sum(dim=1)
    with torch.no_grad():
        output = LibraryBlock(block)(entering, mask)
    return without_unused(with_check(block, entering, lengths, output))


def _error_of(
    block: BlockWeights, entering: torch.Tensor, leaving: torch.Tensor, mask: torch.Tensor | None
) -> tuple[float, str]:
    """How far a rebuilt block is from the model, or why it cannot be rebuilt."""
    try:
        module = EncoderBlock(block) if isinstance(block.spec, BlockSpec) else LibraryBlock(block)
        with torch.no_grad():
            error = relative_difference(module(entering, mask), leaving, mask)
            if mask is not None:  # alone, without padding
                row = int(mask.sum(dim=1).argmin())
                length = int(mask[row].sum())
                alone = module(entering[row : row + 1, :length], None)
                error = max(error, relative_difference(alone, leaving[row : row + 1, :length]))
        return error, ""
    except (CacheError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError) as problem:
        return float("inf"), f"it cannot be rebuilt ({next(iter(str(problem).splitlines()), '')[:200]})"
