"""Extraction: how near it comes to what the machine can do, and what others need for the same. See bench.py.

    python tests/benchmarks/extraction.py --work runs/bench          (this section alone)

*The limit* is the slowest of three things measured alone in the same rounds: the bare forward pass of the same model on
the same batches, ready in memory; reading and preparing with the same workers; writing the same bytes. *The loop* is
what a user would write: DataLoader, output_hidden_states=True, .cpu(), torch.save of the same layers in the same type.

Extraction is timed from the planned job to the last durable byte; loading a model is nobody's part. Photos are drawn
and saved as JPEG. The states of extraction and loop are compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import Figure, Rounds, not_installed, take_turns
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # data/

from data.encoders import fetch_encoders
from data.scenes import draw_scenes
from saffe_cache.encoders.encoder import load_encoder
from saffe_cache.encoders.loading import EncoderRequest, load_processor
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.encoding import run_job
from saffe_cache.extraction.extract import _grow_table, _plan_jobs
from saffe_cache.extraction.loading import load_batches
from saffe_cache.extraction.planning import Job
from saffe_cache.sources.items import Columns, Media
from saffe_cache.sources.registry import read_items
from saffe_cache.store.dtypes import to_storage
from saffe_cache.store.storage import Storage
from saffe_cache.store.writer import EncoderWriter, Portion

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
PHOTOS, TEXTS = (4096, 16384) if ON_GPU else (128, 3200)
PIXELS = 320
LAYERS = {"image": (11, 12), "text": (5, 6)}
MODELS = {"image": "dinov2-small", "text": "all-MiniLM-L6-v2"}
ROUNDS, LOADINGS = 3, 7
TARGET = 0.95
DECODING_TURNS = 4
"""Times that a round of decoding alone goes through all photos, so that what begins workers counts less."""

_LOADING = "files in the page cache; ours also hashes all weights (SHA-256) and tests the picture processor"

MediaByHash = Mapping[bytes, Media]


def measure(work: Path) -> list[Figure]:
    encoders = fetch_encoders(work.parent / "encoders")
    models = {modality: str(encoders[name]) for modality, name in MODELS.items()}
    data = draw_photos(work)
    jobs = {job.manifest.modality: job for job in plan(data, models)}
    return [
        *measure_photos(work, first_inputs(jobs["image"], PHOTOS), media_of(data), models["image"]),
        *measure_texts(work, first_inputs(jobs["text"], TEXTS), models["text"]),
        *measure_memory(data, models["image"]),
        *measure_loading(models),
    ]


def measure_loading(models: Mapping[str, str]) -> list[Figure]:
    """Seconds until an encoder is ready, with all its checks, and until transformers has model and processor alone."""
    figures = []
    for modality, path in models.items():
        processor = AutoImageProcessor if modality == "image" else AutoTokenizer
        request = EncoderRequest(modality=modality, model_id=path)  # type: ignore[arg-type]

        def ours(request: EncoderRequest = request) -> int:
            return load_encoder(request).num_layers and 1

        def bare(path: str = path, processor: Any = processor) -> int:
            AutoModel.from_pretrained(path).eval()
            return 1 if processor.from_pretrained(path) else 0

        rounds = take_turns({"ours": ours, "transformers alone": bare}, LOADINGS)
        for name, rates in rounds.rates.items():
            seconds = float(np.median(1 / rates))
            figures.append(Figure(name=f"loading {MODELS[modality]}: {name}", unit="s", value=seconds, note=_LOADING))
    return figures


def draw_photos(work: Path) -> Path:
    """Scenes as JPEGs, with their captions."""
    scenes, data = (
        draw_scenes(work / "scenes", {"train": max(PHOTOS, TEXTS // 4)}, seed=0, size=PIXELS) / "train",
        work / "data",
    )
    (data / "train").mkdir(parents=True)
    for path in scenes.glob("*.png"):
        Image.open(path).convert("RGB").save(data / "train" / f"{path.stem}.jpg", quality=90)
    metadata = (scenes / "metadata.jsonl").read_text().replace(".png", ".jpg")
    (data / "train" / "metadata.jsonl").write_text(metadata)
    return data


def media_of(data: Path) -> dict[bytes, Media]:
    return {item.hashes["image"]: item.media["image"] for item in read_items(str(data), Columns(), ())}


def plan(data: Path, models: Mapping[str, str], **options: Any) -> list[Job]:
    """The jobs of a cache that does not exist yet; `options` are fields of ExtractConfig."""
    usual = {
        "layers": {modality: LAYERS[modality] for modality in models},
        "storage": "float16",
    }  # what the loop stores
    named = {"data": str(data), "cache": str(data.parent / "planned")}
    config = ExtractConfig(**named, encoder=models, **(usual | options))
    items = read_items(str(data), Columns(), ())
    table, _ = _grow_table(Storage(config.cache), items, config)
    return list(_plan_jobs(Storage(config.cache), table, config, items, {}, media_of(data)))


def first_inputs(job: Job, most: int) -> Job:
    """The same job for fewer inputs."""
    texts, offsets, most = job.inputs.texts, job.offsets, min(most, job.num_inputs)
    return replace(
        job,
        inputs=replace(job.inputs, content_hash=job.inputs.content_hash[:most], texts=texts and texts[:most]),
        offsets=None if offsets is None else offsets[: most + 1],
        arrays={
            name: (spec, job.first_row(name, most) + (name == "offsets")) for name, (spec, _) in job.arrays.items()
        },
    )


def measure_photos(work: Path, job: Job, media: MediaByHash, model_path: str) -> list[Figure]:
    loop = PhotoLoop(model_path, media, work / "loop")
    batches = [on_device(batch.tensors) for batch in load_all(job, media)]
    compare(job, batches[0], loop)
    rounds = take_turns(
        {
            "extraction": extraction(work, job, media),
            "forward": lambda: forward(loop.model, batches, PHOTOS),
            "threads": decoding(job, media, "threads"),
            "processes": decoding(job, media, "processes"),
            "writing": writing(work, job),
            "loop": loop.run,
        },
        ROUNDS,
        before=os.sync,
    )
    in_processes = f"decoding in {job.options.workers} processes over as many threads"
    return [
        *against_limit(rounds, "photos", ("forward", "processes" if ON_GPU else "threads", "writing")),
        rounds.ratio("extraction", "loop", "photos: rate over the loop's"),
        rounds.ratio("processes", "threads", in_processes),
        not_installed("photos: rate over clip-retrieval's"),  # it asks for transformers 4, this project for 5
    ]


def measure_texts(work: Path, job: Job, model_path: str) -> list[Figure]:
    texts, model = list(job.inputs.texts or ()), load_model(model_path)
    tokenizer = load_processor(EncoderRequest(modality="text", model_id=model_path))
    batches = [on_device(batch.tensors) for batch in load_all(job, {})]
    extract_texts = extraction(work, job, {})
    candidates: dict[str, Callable[[], int]] = {
        "extraction": extract_texts,
        "from text": lambda: len(job.encoder.tokenize(texts)) and extract_texts(),
        "forward": lambda: forward(model, batches, TEXTS),
        "padding": lambda: sum(len(batch.inputs) for batch in load_all(job, {})),
        "writing": writing(work, job),
        "loop": lambda: text_loop(model, tokenizer, texts, work / "text_loop"),
    }
    peer = "texts: rate over sentence-transformers' encode"
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        sentences = SentenceTransformer(model_path, device=DEVICE, model_kwargs={"dtype": DTYPE})
        candidates["peer"] = lambda: len(sentences.encode(texts, show_progress_bar=False))
    rounds = take_turns(candidates, ROUNDS, before=os.sync)
    note = "it gives one vector a text, the extraction stores two hidden states a token as well; both tokenize"
    return [
        *against_limit(rounds, "texts", ("forward", "padding", "writing")),
        rounds.ratio("from text", "loop", "texts: rate over the loop's"),
        rounds.ratio("from text", "peer", peer, note=note) if "peer" in candidates else not_installed(peer),
    ]


def against_limit(rounds: Rounds, what: str, alone: Sequence[str]) -> list[Figure]:
    """The extraction against the slowest part alone in each round, and what each part does."""
    limited = Rounds({**rounds.rates, "limit": np.minimum.reduce([rounds.rates[name] for name in alone])})
    slowest = min(alone, key=lambda name: float(np.median(rounds.rates[name])))
    name = f"{what}: rate over the limit's, which is {slowest}"
    return [
        limited.ratio("extraction", "limit", name, at_least=TARGET),
        *(rounds.rate(name, f"{what}: {name}", f"{what}/s") for name in ("extraction", *alone)),
    ]


def measure_memory(data: Path, model_path: str) -> list[Figure]:
    """Peak of a process that does nothing else, model and libraries included."""
    peaks = {}
    for what in ("extraction", "loop"):
        arguments = [sys.executable, __file__, "--peak-of", what, str(data), model_path]
        done = subprocess.run(arguments, check=True, capture_output=True, text=True)
        peaks[what] = float(done.stdout.splitlines()[-1])
    return [Figure(name=f"photos: peak memory of the {what}", unit="MB", value=peak) for what, peak in peaks.items()]


def peak_of(what: str, data: Path, model_path: str) -> float:
    """MB, of this process alone: not of its parent, nor of its workers."""
    with tempfile.TemporaryDirectory() as folder:
        if what == "loop":
            PhotoLoop(model_path, media_of(data), Path(folder)).run()
        else:
            job = first_inputs(plan(data, {"image": model_path})[0], PHOTOS)
            extraction(Path(folder), job, media_of(data))()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def load_all(job: Job, media: MediaByHash) -> Iterator[Any]:
    with load_batches(job, media) as batches:
        yield from batches


def on_device(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies there; the loader's own tensors are filled again."""
    return {name: value.clone().to(DEVICE) for name, value in tensors.items()}


def extraction(work: Path, job: Job, media: MediaByHash) -> Callable[[], int]:
    """Into a new cache each time."""
    folder, numbers = Path(tempfile.mkdtemp(dir=work)), count()

    def run() -> int:
        again = replace(job, manifest=deepcopy(job.manifest))
        run_job(Storage(str(folder / f"{next(numbers)}.zarr")), again, media, {})
        return job.num_inputs

    return run


def forward(model: Any, batches: Sequence[Mapping[str, torch.Tensor]], amount: int) -> int:
    """The model as it is, on tensors that are where it wants them."""
    with torch.inference_mode():
        for batch in batches:
            model(**batch)
    if ON_GPU:
        torch.cuda.synchronize()
    return amount


def decoding(job: Job, media: MediaByHash, kind: str) -> Callable[[], int]:
    hashes = np.tile(job.inputs.content_hash, (DECODING_TURNS, 1))
    options = replace(job.options, decode_in=kind)
    longer = replace(job, inputs=replace(job.inputs, content_hash=hashes), options=options)
    return lambda: sum(len(batch.inputs) for batch in load_all(longer, media))


def writing(work: Path, job: Job) -> Callable[[], int]:
    """Drawn numbers of the same shapes and types, handed to the writer in blocks as the extraction does."""
    folder, numbers, generator = Path(tempfile.mkdtemp(dir=work)), count(), np.random.default_rng(0)
    arrays = {name: array for name, array in job.arrays.items() if name != "offsets"}

    def draw(name: str, block: range) -> tuple[int, np.ndarray]:
        first, spec = job.first_row(name, block.start), arrays[name][0]
        shape = (job.first_row(name, block.stop) - first, *spec.row_shape)
        return first, to_storage(generator.standard_normal(shape, np.float32), spec.dtype)

    portions = [Portion({name: draw(name, block) for name in arrays}) for block in job.blocks()]

    def run() -> int:
        cache = Storage(str(folder / f"{next(numbers)}.zarr"))
        with EncoderWriter(cache, deepcopy(job.manifest), arrays) as writer:
            for portion in portions:
                writer.put(portion)
            writer.finish(job.num_inputs)
        return job.num_inputs

    return run


class PhotoLoop(torch.utils.data.Dataset[torch.Tensor]):
    """What a user would write for photos."""

    def __init__(self, model_path: str, media: MediaByHash, out: Path) -> None:
        self.model, self._out = load_model(model_path), out
        self._paths: Any = [one.path for one in media.values()][:PHOTOS]
        self._processor = load_processor(EncoderRequest(modality="image", model_id=model_path))
        out.mkdir(exist_ok=True)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self._paths[index]) as photo:
            pixels: torch.Tensor = self._processor(photo.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return pixels

    def run(self) -> int:
        loader = torch.utils.data.DataLoader(self, batch_size=32, num_workers=2, pin_memory=ON_GPU)
        for number, pixels in enumerate(loader):
            save_outputs(self.model, {"pixel_values": pixels}, LAYERS["image"], self._out / f"{number}.pt")
        return len(self)


def text_loop(model: Any, tokenizer: Any, texts: Sequence[str], out: Path) -> int:
    out.mkdir(exist_ok=True)
    for number, start in enumerate(range(0, len(texts), 32)):
        encoded = tokenizer(list(texts[start : start + 32]), padding=True, truncation=True, return_tensors="pt")
        save_outputs(model, encoded, LAYERS["text"], out / f"{number}.pt")
    return len(texts)


def save_outputs(model: Any, inputs: Mapping[str, torch.Tensor], layers: Sequence[int], path: Path) -> None:
    moved = {name: value.to(DEVICE, DTYPE if value.is_floating_point() else None) for name, value in inputs.items()}
    with torch.no_grad():
        output = model(**moved, output_hidden_states=True)
    states = {str(layer): output.hidden_states[layer].to(torch.float16).cpu() for layer in layers}
    torch.save({**states, "pooled": output.last_hidden_state[:, 0].float().cpu()}, path)


def load_model(path: str) -> Any:
    return AutoModel.from_pretrained(path, dtype=DTYPE).eval().to(DEVICE)


def compare(job: Job, first: Mapping[str, torch.Tensor], loop: PhotoLoop) -> None:
    """
    Raises:
        AssertionError: the first photos' states are not the loop's.
    """
    encoded, number = job.encoder.encode(first), len(first["pixel_values"])
    pixels = torch.stack([loop[index] for index in range(number)])
    with torch.inference_mode():
        output = loop.model(pixel_values=pixels.to(DEVICE, DTYPE), output_hidden_states=True)
    for layer, states in encoded.states.items():
        expected = output.hidden_states[layer].float().cpu().numpy()
        error = np.abs(states - expected).max() / np.abs(expected).max()
        assert error < (0.02 if ON_GPU else 1e-5), f"hidden_states[{layer}] differ by {error:.2g} of the largest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        what, data, model_path = options.peak_of
        print(peak_of(what, Path(data), model_path))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="extraction-") as folder:
        for figure in measure(Path(folder)):
            value = figure.note if figure.value is None else f"{figure.value:.3g} {figure.unit}"
            print(f"{figure.name}: {value}", *(f"{bound:.3g}" for bound in figure.interval or ()))


if __name__ == "__main__":
    main()
