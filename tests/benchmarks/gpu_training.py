"""Training on the card from a cache of Flickr8k's size: against ready tensors and the release's loop. See gpu.py.

The section extracts the cache, so that it knows the memory of each stage: 6,000 + 1,000 photos of 500 x 375 with five
captions each, DINOv2-S/14 at 224 px and MiniLM with random weights, three layers of each as float8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from gpu_setup import Setting, flickr_cache, flickr_config, memory_figures, no_gpu, peaks, timed
from timing import Candidate, Figure, take_turns
from training import config_of, released_loops

from saffe_cache.evaluation.evaluate import EvaluateConfig, evaluate
from saffe_cache.fusion.losses import Batch
from saffe_cache.inputs.feature_loader import FeatureLoader, window_shards
from saffe_cache.inputs.pairs import training_pairs
from saffe_cache.store.reader import open_cache
from saffe_cache.training.batches import TrainingData
from saffe_cache.training.config import TrainConfig
from saffe_cache.training.loop import _step, start
from saffe_cache.training.resolve import resolve_run
from saffe_cache.training.train import train, train_many

GOAL, EPOCH_GOAL = 0.97, 100.0
RESIDENCIES = ("device", "memory", "mapped", "streamed")


def parts(setting: Setting) -> Iterator[Callable[[], Iterator[Figure]]]:
    yield partial(stages, setting)
    for fusion in ("linear", "reuse"):
        for num_layers in (1, 2):
            yield partial(steps_a_second, setting, fusion, num_layers)
    yield partial(against_the_release, setting)
    yield partial(variants, setting)


def layers_of(setting: Setting, fusion: str, num_layers: int) -> dict[str, tuple[int, ...]]:
    """The deepest layers behind which a block follows; `linear` takes no tokens of texts."""
    image, text = (2, 2) if setting.is_tiny else (11, 5)
    chosen = {"image": tuple(range(image + 1 - num_layers, image + 1))}
    return chosen if fusion == "linear" else chosen | {"text": tuple(range(text + 1 - num_layers, text + 1))}


def stages(setting: Setting) -> Iterator[Figure]:
    """Seconds and peak memory of each stage, in one process, libraries included."""
    run = str(setting.work / "run")
    config = run_config(setting, str(setting.work / "flickr.zarr"), run, "linear", 2, epochs=1)
    commands = {
        "extract": lambda: flickr_cache(setting),
        "train linear, an epoch": lambda: train(config),
        "evaluate on dev": lambda: evaluate(
            EvaluateConfig(cache=config.cache, run=run, split="dev", baselines="none", device=setting.device)
        ),
    }
    flickr_config(setting)  # draws the photos
    for stage, command in commands.items():
        found, seconds = timed(partial(peaks, setting, command))
        yield Figure(name=f"Flickr8k's size: {stage}", unit="s", value=seconds)
        yield from memory_figures(f"Flickr8k's size: {stage}", found)


def run_config(setting: Setting, cache: str, out: str, fusion: str, num_layers: int, **options: Any) -> TrainConfig:
    layers = layers_of(setting, fusion, num_layers)
    return config_of(cache, out, fusion=fusion, layers=layers, device=setting.device, **options)


def steps_a_second(setting: Setting, fusion: str, num_layers: int) -> Iterator[Figure]:
    """From each place where hidden states may lie, over the same steps on batches that lie ready on the device."""
    name, num_steps = f"{fusion}, P = {num_layers}", setting.sizes.steps
    config = run_config(setting, flickr_cache(setting), "unused", fusion, num_layers)
    places = {place: training_data(config, place) for place in RESIDENCIES if place != "device" or setting.on_gpu}
    ready = list(places["memory"].batches(0, num_steps))
    step = stepper(config, places["memory"])
    starts = count(0, num_steps)
    candidates: dict[str, Candidate] = {
        place: lambda data=data: step(data.batches(first := next(starts), first + num_steps))
        for place, data in places.items()
    }
    rounds = take_turns({"ready": lambda: step(ready), **candidates}, setting.sizes.rounds)
    note = f"float32 batches of {len(ready[0].own)} that lie ready on the device"
    yield rounds.rate("ready", f"{name}: on ready batches", "steps/s", note=note)
    for place in RESIDENCIES:
        label, goal = f"{name}: from {place} / on ready batches", GOAL if place == "device" else None
        yield from [rounds.ratio(place, "ready", label, at_least=goal)] if place in places else no_gpu(label)


def training_data(config: TrainConfig, residency: Any) -> TrainingData:
    cache = open_cache(config.cache)
    spec = resolve_run(config, cache)
    if residency == "streamed":
        spec = replace(spec, shuffled_shards=window_shards(cache, spec))
    training, validation, _ = training_pairs(spec, cache)
    inputs = FeatureLoader(cache, spec, config.device, residency)
    return TrainingData(inputs, training, validation, config.recipe.batch_size, spec.seed)


def stepper(config: TrainConfig, data: TrainingData) -> Callable[[Iterable[Batch]], int]:
    """Takes a step on each batch, and returns their number. A step waits for its loss, and so for the device."""
    state = start(config, data.inputs.spec, data, resumes=True)

    def steps(batches: Iterable[Batch]) -> int:
        return len([_step(config, state, batch, 1000) for batch in batches])

    return steps


def against_the_release(setting: Setting) -> Iterator[Figure]:
    """Photos a second of the same epoch; an epoch has as many photos whatever its loop."""
    encoders: Mapping[str, str] = flickr_config(setting).encoder
    cache, sizes = flickr_cache(setting), setting.sizes
    layers = layers_of(setting, "reference", 1)
    loops = released_loops(
        *(cache, setting.work / "flickr", encoders),
        pixels=32 if setting.is_tiny else 224,
        batch_size=sizes.released_batch,
        num_steps=sizes.steps,
        layers=layers,
        device=setting.device,
    )
    config = run_config(setting, cache, "unused", "linear", 2)
    data = training_data(config, "device" if setting.on_gpu else "mapped")
    step, starts = stepper(config, data), count(0, sizes.steps)
    batch_size = data.seen(1)[0] - data.seen(0)[0]

    def linear() -> int:
        first = next(starts)
        return batch_size * step(data.batches(first, first + sizes.steps))

    rounds = take_turns({**loops, "linear": linear}, sizes.rounds)
    yield rounds.rate("released", "the release's loop, encoders in it", "photos/s")
    note = f"the release's FAM in float32, batches of {sizes.released_batch}; without the extraction"
    for loop, what in (("released", "the release's loop"), ("frozen", "its loop without autograd through encoders")):
        yield rounds.ratio("cache", loop, f"an epoch of its FAM from the cache / {what}", note=note)
    note = f"P = 2, batches of {batch_size}"
    label = "an epoch of linear from the cache / the release's loop"
    yield rounds.ratio("linear", "released", label, at_least=EPOCH_GOAL, note=note)


def variants(setting: Setting) -> Iterator[Figure]:
    """Runs that differ by their seeds, one after the other and side by side."""
    cache, epochs = flickr_cache(setting), 2

    def configs(folder: str) -> list[TrainConfig]:
        options = {"data_seed": 0, "epochs": epochs, "start": "random"}
        outs = [(seed, str(setting.work / folder / str(seed))) for seed in range(setting.sizes.variants)]
        return [run_config(setting, cache, out, "linear", 2, seed=seed, **options) for seed, out in outs]

    alone, seconds_alone = timed(lambda: [train(config) for config in configs("alone")])
    together, seconds = timed(lambda: train_many(configs("together")))
    name, note = f"{setting.sizes.variants} variants together", f"{epochs} epochs each; validation included"
    yield Figure(name=name, unit="s", value=seconds, note=note)
    yield Figure(name=f"{name} / one by one", unit="ratio", value=seconds_alone / seconds, note=note)
    differing = sum(weights(a) != weights(b) for a, b in zip(alone, together, strict=True))
    yield Figure(name="variants with other weights than alone", unit="runs", value=differing, at_most=0)


def weights(run: str) -> bytes:
    return (Path(run) / "model.safetensors").read_bytes()
