"""Extraction on the card: against the bare forward pass of the same model, and where the time goes. See gpu.py.

The bare pass runs the layers that the extraction runs, on a batch that lies on the card; the batch size is the smallest
that is within 3 % of the best. "From arrays" takes prepared photos from pinned memory in the place of decoded ones, so
that what is left is copying, converting and writing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from extraction import load_all, media_of, plan
from gpu_setup import MODELS, Model, Setting, amount_for, draw_photos, no_gpu, repeat_inputs, save_model
from timing import Candidate, Figure, Rounds, not_installed, take_turns
from torch import nn

from saffe_cache.core.devices import is_out_of_memory
from saffe_cache.encoders.encoder import FrozenEncoder
from saffe_cache.extraction import encoding
from saffe_cache.extraction.encoding import run_job
from saffe_cache.extraction.loading import Batch
from saffe_cache.extraction.planning import Job, converters_of
from saffe_cache.sources import Media
from saffe_cache.store.dtypes import to_storage
from saffe_cache.store.layout import choose_rows, layers_among
from saffe_cache.store.storage import Storage
from saffe_cache.store.writer import EncoderWriter, Portion

GOAL = 0.95
STORAGES = ("float8", "float16", "bfloat16")
_STOPS_IMPROVING = 1.03
"""Least gain for which a batch is doubled."""

Tensors = Mapping[str, torch.Tensor]


def parts(setting: Setting) -> Iterator[Callable[[], Iterator[Figure]]]:
    prepared: dict[str, Bench] = {}

    def bench_of(model: Model) -> Bench:
        if model.name not in prepared:
            prepared[model.name] = prepare(setting, model)
        return prepared[model.name]

    for model in MODELS:
        yield lambda model=model: measure_model(bench_of(model), model)
    for model in MODELS:
        yield lambda model=model: measure_compiled(bench_of(model), model)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One encoder, ready to be measured."""

    setting: Setting
    job: Job
    media: Mapping[bytes, Media]
    batches: Sequence[Tensors]
    """A few prepared batches, in pinned memory on a GPU machine."""
    on_device: Tensors

    @property
    def encoder(self) -> FrozenEncoder:
        return self.job.encoder

    @property
    def batch(self) -> int:
        return len(self.on_device["pixel_values"])

    def bare(self, count: int, deepest: int | None = None) -> int:
        """The forward pass alone, of the first `deepest` layers or all of them."""
        return _forward(self.setting, self.encoder, self.on_device, count, deepest)

    def extraction(self, job: Job, *, ready: bool = True) -> Candidate:
        """A run into a new cache, from ready batches or from the files."""
        folder = self.setting.work / "turn.zarr"

        def run() -> int:
            layers = layers_among(job.arrays)
            self.encoder.select(layers, vectors="pooled" in job.arrays, converters=converters_of(job.arrays))
            remove_arrays(folder)
            again = replace(job, manifest=deepcopy(job.manifest))
            with patch.object(encoding, "load_batches", self._ready_batches if ready else encoding.load_batches):
                run_job(Storage(str(folder)), again, self.media, {})
            return job.num_inputs

        return run

    @contextmanager
    def _ready_batches(self, job: Job, media: Mapping[bytes, Media]) -> Iterator[Iterator[Batch]]:
        def batches() -> Iterator[Batch]:
            for number, block in enumerate(job.blocks()):
                tensors = self.batches[number % len(self.batches)]
                here = {name: value[: len(block)] for name, value in tensors.items()}
                yield Batch(block=block, inputs=block, tensors=here)

        yield batches()


def prepare(setting: Setting, model: Model) -> Bench:
    """The planned job of a model, with the batch size that is best for it."""
    data = setting.work / "photos"
    if not data.exists():
        sizes = setting.sizes
        draw_photos(data / "train", sizes.distinct_photos, sizes.size, distinct=sizes.distinct_photos)
    media = media_of(data)
    options = {"device": setting.device, "storage": "float8", "layers": {}}
    [job] = plan(data, {"image": str(save_model(setting, model))}, **options)
    [example] = [batch.tensors for batch in load_all(repeat_inputs(job, 1), media)]
    one = {name: value.clone() for name, value in example.items()}
    batch = _best_batch(setting, job.encoder, one)
    generator = torch.Generator().manual_seed(0)
    shape = (batch, *one["pixel_values"].shape[1:])
    drawn = [torch.randn(shape, generator=generator).to(setting.dtype) for _ in range(2 if setting.is_tiny else 3)]
    batches = [{"pixel_values": pixels.pin_memory() if setting.on_gpu else pixels} for pixels in drawn]
    job = replace(job, options=replace(job.options, batch_size=batch))
    on_device = {"pixel_values": drawn[0].to(setting.device)}
    return Bench(setting=setting, job=job, media=media, batches=batches, on_device=on_device)


def measure_model(bench: Bench, model: Model) -> Iterator[Figure]:
    setting = bench.setting
    name, count = model.name, amount_for(bench.bare, bench.batch, setting.sizes.seconds)
    jobs = {storage: stored_as(repeat_inputs(bench.job, count), storage) for storage in STORAGES}
    candidates: dict[str, Candidate] = {
        "bare": partial(bench.bare, count),
        **{storage: bench.extraction(job) for storage, job in jobs.items()},
        "files": bench.extraction(repeat_inputs(jobs["float8"], setting.sizes.photos), ready=False),
    }
    usual = min(
        bench.batch, max(1, bench.job.options.batch_tokens // bench.job.arrays[_deepest(bench)][0].row_shape[0])
    )
    if usual != bench.batch:
        short = {key: value[:usual] for key, value in bench.on_device.items()}
        candidates["usual"] = partial(_forward, setting, bench.encoder, short, count)
    with_timm = find_spec("timm") is not None
    if with_timm:
        candidates["timm"] = timm_forward(bench, model, count)
    rounds = take_turns(candidates, setting.sizes.rounds)
    note = f"batches of {bench.batch}"
    yield rounds.rate("bare", f"{name}: bare forward pass", "images/s", note=note)
    if "usual" in candidates:
        of_usual = f"{usual} photos are what --batch-tokens {bench.job.options.batch_tokens} gives"
        yield rounds.ratio("usual", "bare", f"{name}: bare pass with the usual batch / with the best", note=of_usual)
    for storage in STORAGES:
        label = f"{name}: extraction from arrays as {storage} / bare pass"
        yield rounds.ratio(storage, "bare", label, at_least=GOAL, note=note)
    yield rounds.rate("files", f"{name}: extraction from JPEGs, all cores", "images/s")
    yield rounds.ratio("files", "bare", f"{name}: extraction from JPEGs, all cores / bare pass")
    label = f"{name}: timm's forward pass / bare pass"
    yield rounds.ratio("timm", "bare", label, note=note) if with_timm else not_installed(label)
    if model.name == "ViT-B/16":
        yield truncated(bench, name, count)
    yield from breakdown(bench, name, rounds)


def measure_compiled(bench: Bench, model: Model) -> Iterator[Figure]:
    setting = bench.setting
    names = [f"{model.name}: {what}" for what in ("bare pass, compiled / as it is", "extraction / bare pass, compiled")]
    if not setting.on_gpu:
        yield from no_gpu(*names)
        return
    count = amount_for(bench.bare, bench.batch, setting.sizes.seconds)
    plain = take_turns({"bare": partial(bench.bare, count)}, setting.sizes.rounds)
    with compiled(bench.encoder):
        job = stored_as(repeat_inputs(bench.job, count), "float8")
        both = {"compiled": partial(bench.bare, count), "extraction": bench.extraction(job)}
        rounds = take_turns(both, setting.sizes.rounds)
    note = "torch.compile of each layer's forward, float8, from arrays"
    yield Rounds({**plain.rates, **rounds.rates}).ratio("compiled", "bare", names[0], note=note)
    yield rounds.ratio("extraction", "compiled", names[1], at_least=GOAL, note=note)


def stored_as(job: Job, storage: str) -> Job:
    """The same job, with hidden states in another type."""
    states = {name: spec for name, (spec, _) in job.arrays.items() if layers_among([name])}
    states = {name: replace(spec, dtype=storage) for name, spec in states.items()}
    row_bytes = max(spec.row_bytes for spec in states.values())
    chunk_rows, shard_rows = choose_rows(row_bytes, job.options.shard_mb * 2**20)
    states = {name: replace(spec, chunk_rows=chunk_rows, shard_rows=shard_rows) for name, spec in states.items()}
    return replace(job, arrays={name: (states.get(name, spec), rows) for name, (spec, rows) in job.arrays.items()})


def truncated(bench: Bench, name: str, count: int) -> Figure:
    """The two layers in the middle, without the encoder's own vector: what lies behind them does not run."""
    deepest, encoder = bench.encoder.num_layers // 2 + 1, bench.encoder
    spec, rows = stored_as(repeat_inputs(bench.job, count), "float8").arrays[_deepest(bench)]
    job = replace(bench.job, arrays={f"hidden_states/{i}": (spec, rows) for i in (deepest - 1, deepest)})
    pair = {"extraction": bench.extraction(repeat_inputs(job, count)), "bare": partial(bench.bare, count, deepest)}
    rounds = take_turns(pair, bench.setting.sizes.rounds)
    label = f"{name}: extraction of layers {deepest - 1}, {deepest} / bare pass of {deepest} layers"
    return rounds.ratio(
        "extraction", "bare", label, at_least=GOAL, note=f"of {encoder.num_layers}; float8, from arrays"
    )


def breakdown(bench: Bench, name: str, rounds: Rounds) -> Iterator[Figure]:
    """What each part takes of a photo when it runs alone. They run beside one another, so the largest is the limit."""
    setting, encoder = bench.setting, bench.encoder
    job = stored_as(repeat_inputs(bench.job, bench.batch), "float8")
    converters = converters_of(job.arrays)
    with torch.inference_mode():
        encoder.select(layers_among(job.arrays), vectors=False)
        launched = encoder.launch(bench.on_device)
        states = {i: values.to(setting.device) for i, values in launched._states.items()}
        converted = [part for i, convert in converters.items() for part in convert(states[i])]
    rows = {
        name: to_storage(np.ones((bench.batch, *spec.row_shape), np.float32), spec.dtype)
        for name, (spec, _) in job.arrays.items()
    }
    alone: dict[str, Callable[[int], Any]] = {
        "convert": partial(_repeated, setting, bench.batch, lambda: [converters[i](states[i]) for i in states]),
        "write": partial(write, bench, job, rows),
    }
    if setting.on_gpu:
        alone["transfer"] = partial(_repeated, setting, bench.batch, lambda: transfer(bench, converted))
    note = "alone, float8; decoding on all cores"
    yield _microseconds(f"{name}: encode", rounds.rates["bare"], note)
    photos = repeat_inputs(bench.job, setting.sizes.photos)
    turns = {"decode": lambda: sum(len(batch.inputs) for batch in load_all(photos, bench.media))}
    turns |= {
        part: partial(work, amount_for(work, bench.batch, setting.sizes.seconds / 4)) for part, work in alone.items()
    }
    for part, turn in turns.items():
        yield _microseconds(f"{name}: {part}", take_turns({part: turn}, 1).rates[part], note)
    if not setting.on_gpu:
        yield from no_gpu(f"{name}: transfer", unit="us a photo")


def _microseconds(name: str, rates: np.ndarray, note: str) -> Figure:
    return Figure(name=name, unit="us a photo", value=1e6 / float(np.median(rates)), note=note)


def write(bench: Bench, job: Job, rows: Mapping[str, np.ndarray], count: int) -> int:
    """One block of rows, over and over, into a new cache."""
    folder = bench.setting.work / "written.zarr"
    remove_arrays(folder)
    target = {name: (spec, count) for name, (spec, _) in job.arrays.items()}
    with EncoderWriter(Storage(str(folder)), deepcopy(job.manifest), target) as writer:
        for first in range(0, count, bench.batch):
            writer.put(Portion({name: (first, values) for name, values in rows.items()}))
        writer.finish(count)
    return count


def remove_arrays(cache: Path) -> None:
    """What a turn wrote. Blocks stay: they are written once for a cache, whatever its size."""
    for folder in cache.glob("encoders/*/*/"):
        if folder.name != "blocks":
            shutil.rmtree(folder)


def transfer(bench: Bench, converted: Sequence[torch.Tensor]) -> None:
    """A batch there, and what is stored of it back."""
    bench.encoder.transfers.to_device(bench.batches[0], bench.encoder.dtype)
    bench.encoder.transfers.to_host(converted)


def timm_forward(bench: Bench, model: Model, count: int) -> Candidate:
    """timm's implementation with the same weights' shapes, type and batch."""
    import timm

    pixels = bench.on_device["pixel_values"]
    options = {"num_classes": 0, "img_size": pixels.shape[-1]}
    name = "test_vit" if bench.setting.is_tiny else model.timm
    built = timm.create_model(name, **options).to(bench.setting.device, bench.setting.dtype).eval()
    return lambda: _repeated(bench.setting, bench.batch, lambda: built(pixels), count)


@contextmanager
def compiled(encoder: FrozenEncoder) -> Iterator[None]:
    """The layers' forward passes; the hooks of the extraction stay outside."""
    for layer in encoder.layer_list:
        layer.forward = torch.compile(layer.forward)
    try:
        yield
    finally:
        for layer in encoder.layer_list:
            del layer.forward


def _deepest(bench: Bench) -> str:
    return f"hidden_states/{layers_among(bench.job.arrays)[-1]}"


def _best_batch(setting: Setting, encoder: FrozenEncoder, one: Tensors) -> int:
    """Doubled until images a second no longer grow, or memory ends."""
    best, fastest = 1, 0.0
    size = min(16, setting.sizes.largest_batch)
    while size <= setting.sizes.largest_batch:
        try:
            inputs = {name: value.repeat(size, 1, 1, 1).to(setting.device) for name, value in one.items()}
            turn = {"bare": lambda inputs=inputs, size=size: _forward(setting, encoder, inputs, 4 * size)}
            rate = float(np.median(take_turns(turn, setting.sizes.rounds).rates["bare"]))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            encoder.transfers.free_memory()
            break
        if rate < fastest * _STOPS_IMPROVING:
            break
        best, fastest, size = size, rate, 2 * size
    return best


def _forward(setting: Setting, encoder: FrozenEncoder, inputs: Tensors, count: int, deepest: int | None = None) -> int:
    """The model on inputs that lie on the card, at least `count` of them; hidden states are not asked for."""
    path = encoder.family.layers
    layers = encoder._model.get_submodule(path)
    encoder._model.set_submodule(path, nn.ModuleList(layers[:deepest]))
    try:
        return _repeated(setting, len(inputs["pixel_values"]), lambda: encoder.run(inputs), count)
    finally:
        encoder._model.set_submodule(path, layers)


def _repeated(setting: Setting, amount: int, work: Callable[[], Any], count: int) -> int:
    """Often enough that `count` are done; waits for the device."""
    times = -(-count // amount)
    with torch.inference_mode():
        for _ in range(times):
            work()
    setting.synchronize()
    return times * amount
