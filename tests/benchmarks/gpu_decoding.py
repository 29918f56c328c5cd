"""Reading and preparing photos: what one core does, and all of them. See gpu.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from extraction import load_all, media_of, plan
from gpu_setup import DINOV2_SMALL, Setting, draw_photos, repeat_inputs, save_model
from timing import Figure, take_turns

from saffe_cache.core.devices import num_cores
from saffe_cache.extraction.planning import Job
from saffe_cache.sources import Media


def parts(setting: Setting) -> Iterator[Callable[[], Iterator[Figure]]]:
    sizes = setting.sizes
    yield partial(measure, setting, "640 px", sizes.size, sizes.distinct_photos, sizes.photos * 2 // 3)
    yield partial(measure, setting, "12 MP", sizes.large_size, 16, sizes.large_photos)


def measure(setting: Setting, name: str, size: tuple[int, int], distinct: int, count: int) -> Iterator[Figure]:
    """Photos a second with DINOv2's resize and crop; one process reads as many as all of them, a core's share."""
    data = setting.work / f"photos-{size[0]}"
    draw_photos(data / "train", min(distinct, count), size, distinct=distinct)
    [job] = plan(data, {"image": str(save_model(setting, DINOV2_SMALL))}, device=setting.device, layers={})
    media, cores = media_of(data), num_cores()
    share = -(-count // cores)
    rounds = take_turns(
        {
            "one": partial(decode, job, media, share, 1, "processes"),
            "all": partial(decode, job, media, count, cores, "processes"),
            "threads": partial(decode, job, media, count, cores, "threads"),
        },
        setting.sizes.rounds,
    )
    note = f"{size[0]} x {size[1]} JPEG, read, decoded, resized and normalised"
    yield rounds.rate("one", f"{name}: one core", "images/s", note=note)
    yield rounds.rate("all", f"{name}: {cores} cores", "images/s", note=note)
    yield rounds.ratio("all", "one", f"{name}: {cores} cores / one")
    yield rounds.ratio("threads", "all", f"{name}: threads / processes")


def decode(job: Job, media: Mapping[bytes, Media], count: int, workers: int, kind: str) -> int:
    options = replace(job.options, workers=workers, decode_in=kind)
    return sum(len(batch.inputs) for batch in load_all(replace(repeat_inputs(job, count), options=options), media))
