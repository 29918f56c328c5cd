"""Each checkpoint of the zoo through extraction, training and evaluation, against what the library computes.

`run` returns one row for each of a checkpoint's modalities: what is found, and how far blocks are from the model. These
rows are the table of docs/encoder_table.md, which is written by

    python tests/zoo_runs.py [NAME ...]

for all checkpoints or for these.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
import zoo
from PIL import Image

import saffe_cache as sc
from saffe_cache.core.features import BlockSpec
from saffe_cache.core.tensors import relative_difference
from saffe_cache.encoders.discovery import clip_frames
from saffe_cache.encoders.encoder import load_encoder
from saffe_cache.encoders.loading import EncoderRequest
from saffe_cache.encoders.videos import load_video_processor
from saffe_cache.fusion.decoders import OpaqueDecoder, ReuseDecoder
from saffe_cache.fusion.library_block import TOLERANCE
from saffe_cache.sources.decoding import decode
from saffe_cache.store.reader import EncoderCache

PAGE = Path(__file__).parents[1] / "docs" / "encoder_table.md"
CLOSE = 2e-4
"""Largest relative difference of a token's state or of a vector from the library's."""
CHECKED = 3
"""Inputs of each checkpoint that the library computes, each alone."""
SENTENCE = "a dog and two birds rest on the grass near an old train station while rain falls on a roof"

POOLED = [
    "aimv2_vision_model",
    "ast",
    "beit",
    "bit",
    "convnext",
    "convnextv2",
    "dinov2_with_registers",
    "dinov3_convnext",
    "dinov3_vit",
    "efficientnet",
    "focalnet",
    "hiera",
    "levit",
    "mobilevit",
    "pixio",
    "regnet",
    "resnet",
    "siglip_vision_model",
    "swin",
    "swinv2",
]
"""Families whose own vector is what the library calls the pooled output."""
CLASS_TOKEN = ["data2vec_vision", "deit", "dinov2", "dpt", "pvt", "timesformer", "vit", "vit_mae", "vit_msn", "vivit"]
"""Families whose own vector is their class token; that of others is the mean, of two towers their features."""
PADDED = {"siglip": 64, "siglip2": 64, "siglip2_naflex": 64}
"""Families whose processors pad every text to this length."""
OPTIONS: dict[str, dict[str, Any]] = {
    "vit_mae": {"mask_ratio": 0.0},
    "aimv2": {"attn_implementation": "eager"},  # sdpa forgets the causal mask where no text is padded
}
"""Of `from_pretrained`."""
ENCODER_HALF = ["bart", "moonshine", "mt5", "t5", "t5_gated", "umt5", "whisper"]
"""Families of encoders with decoders."""
OTHER_STATES = {
    "pvt": "the library lists states before the patches of the next stage are embedded",
    "mamba": "the library lists no embeddings, but the last state twice",
}
"""Families whose `output_hidden_states` are others than the inputs of layers."""
TOWERS = {"image": ("vision_model", "image_model"), "text": ("text_model",), "audio": ("audio_model",), "video": ()}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the package finds out about one checkpoint and modality."""

    family: str
    modality: str
    states: str = "–"
    vector: str = "–"
    padding: str = "–"
    blocks: str = "–"
    error: float | None = None
    """Largest relative difference of a token between a rebuilt block's output and the model's."""
    decoders: str = "–"

    @property
    def key(self) -> tuple[str, str]:
        """Identifies a row."""
        return self.family, self.modality

    @property
    def cells(self) -> tuple[str, ...]:
        """As in the table; errors as the next higher power of ten, which does not change with the machine."""
        error = "–" if self.error is None else next(text for text in BOUNDS if self.error <= float(text))
        return (
            *(f"`{self.family}`", self.modality, self.states, self.vector, self.padding),
            *(self.blocks, error, self.decoders),
        )


BOUNDS = ("1e-5", "1e-4", f"{TOLERANCE:g}")
HEADER = ("checkpoint", "input", "states", "own vector", "padding", "blocks", "error below", "decoders")


def captions(index: int) -> list[str]:
    """Two texts of different lengths."""
    words = SENTENCE.split()
    return [" ".join(words[index : index + 2]), " ".join(words[: 3 + index]) + f" {index}"]


class Bench:
    """Photos, sounds and films, and caches of them with the encoders that serve as partners, made once."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.media: dict[bytes, Any] = {}
        """Photos, frames of films, and the bytes of sounds, by the hash of their file."""
        self._caches: dict[str, Path] = {}
        self._make("photos", "png")
        self._make("sounds", "wav")

    def _make(self, kind: str, ending: str) -> None:
        rng = np.random.default_rng(0)
        for split, rows in (("train", range(12)), ("test", range(12, 16))):
            folder = self.work / kind / split
            folder.mkdir(parents=True)
            lines = [{"file_name": f"{row}.{ending}", "text": captions(row)} for row in rows]
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
            for row in rows:
                self._write(folder / f"{row}.{ending}", rng)

    def _write(self, path: Path, rng: np.random.Generator) -> None:
        raw: np.ndarray
        if path.suffix == ".png":
            raw = rng.integers(0, 256, (40 + 2 * int(path.stem), 56, 3), dtype=np.uint8)
            Image.fromarray(raw).save(path)
        elif path.suffix == ".mkv":
            from films import film, noise

            raw = noise(3 + int(path.stem), seed=int(path.stem))
            path.write_bytes(film(raw))
        else:
            raw = rng.normal(0, 0.1, 16_000).astype(np.float32)
            soundfile.write(path, raw, 16_000, subtype="FLOAT")
        content = path.read_bytes()
        self.media[hashlib.sha256(content).digest()] = content if path.suffix == ".wav" else raw

    def checkpoint(self, name: str) -> Path:
        """Folder of a checkpoint."""
        folder = self.work / "models" / name
        if not folder.exists():
            with quiet():
                (zoo.ENTRIES | zoo.MORE_ENTRIES)[name].save(folder)
        return folder

    def extract(self, kind: str, encoders: Mapping[str, str], cache: Path) -> None:
        """Extract photos, sounds or films with these checkpoints."""
        sc.extract(
            sc.ExtractConfig(
                data=str(self.work / kind),
                cache=str(cache),
                encoder={modality: str(self.checkpoint(name)) for modality, name in encoders.items()},
                storage="float32",
                dtype="float32",
                workers=1,
            )
        )

    @contextlib.contextmanager
    def cache(self, name: str, modalities: tuple[str, ...]) -> Iterator[sc.Cache]:
        """A cache with a checkpoint's encoders and, for the other modality, a partner; removed behind it."""
        kind = "sounds" if "audio" in modalities else "films" if "video" in modalities else "photos"
        if kind not in self._caches:
            partners = {"image": "vit", "text": "bert"} if kind == "photos" else {"text": "bert"}
            if kind == "films":
                self._make("films", "mkv")
            self._caches[kind] = self.work / f"{kind}.zarr"
            self.extract(kind, partners, self._caches[kind])
        path = self.work / "one.zarr"
        shutil.copytree(self._caches[kind], path)
        try:
            self.extract(kind, dict.fromkeys(modalities, name), path)
            yield sc.open_cache(path)
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def run(bench: Bench, name: str) -> list[Row]:
    """Run a checkpoint through everything, and compare it with the library.

    Raises:
        AssertionError: a number differs from the library's.
        ValueError: the checkpoint is refused.
    """
    entry = (zoo.ENTRIES | zoo.MORE_ENTRIES)[name]
    modalities = tuple(one for one in entry.modalities if (name, one) not in REFUSED)
    with quiet(), bench.cache(name, modalities) as cache:
        encoders = {one: encoder_of(cache, name, one) for one in modalities}
        for modality, encoder in encoders.items():
            assert_is_librarys(bench, cache, encoder, name, modality)
        errors = {modality: block_error(encoder) for modality, encoder in encoders.items()}
        decoders = decoders_of(bench, cache, encoders)
        return [row_of(name, one, encoders[one], errors[one], decoders) for one in modalities]


def encoder_of(cache: sc.Cache, name: str, modality: str) -> EncoderCache:
    """The encoder that was made from a checkpoint."""
    found = [
        one
        for one in cache.encoders.values()
        if (one.manifest.modality, one.manifest.fingerprint.fields["model_id"]) == (modality, name)
    ]
    assert len(found) == 1
    return found[0]


def row_of(name: str, modality: str, encoder: EncoderCache, error: float | None, decoders: str) -> Row:
    """One row of the table."""
    manifest = encoder.manifest
    widths = {layer: manifest.arrays[f"hidden_states/{layer}"].spec.row_shape[-1] for layer in manifest.layers}
    tokens = {layer: "n" if modality == "text" else encoder.num_tokens(layer) for layer in manifest.layers}
    sizes = list(dict.fromkeys(f"{tokens[layer]} × {width}" for layer, width in widths.items()))
    unusable = next(iter(manifest.unusable_blocks.values()), "")
    if manifest.has_feature_maps:
        blocks = "none: feature maps"
    elif unusable:
        blocks = "refused: " + ("cannot be rebuilt" if "rebuilt" in unusable else "differs")
    else:
        own = isinstance(encoder.block(encoder.block_layers[-1]).spec, BlockSpec)
        blocks = "by role" if own else "by the library's class"
    padding = str(manifest.fingerprint.fields.get("padding", "longest")).replace("_", " ")
    return Row(
        family=name,
        modality=modality,
        states=f"{manifest.num_layers} layers, {' and '.join(sizes)}",
        vector=str(manifest.fingerprint.fields["pooling"]),
        padding=padding if modality == "text" else "–",
        blocks=blocks,
        error=error,
        decoders=decoders,
    )


def block_error(encoder: EncoderCache) -> float | None:
    """Largest relative difference of a token of `reuse` with its gate closed from the cached next state."""
    manifest = encoder.manifest
    layers = [layer for layer in encoder.block_layers if f"hidden_states/{layer + 1}" in manifest.arrays]
    if not layers:
        return None
    weights = encoder.block(layers[-1])
    tokens = encoder.tokens(np.arange(manifest.finished_rows), (layers[-1], layers[-1] + 1))
    hidden, expected = (torch.tensor(state) for state in tokens.states)
    mask = None if tokens.mask is None or tokens.mask.all() else torch.tensor(tokens.mask)
    kind: Any = ReuseDecoder if isinstance(weights.spec, BlockSpec) else OpaqueDecoder
    decoder, layer = kind(weights, weights), kind.layer_of(weights, weights)
    context = torch.randn(len(hidden), 3, hidden.shape[-1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        entered, keys_values = decoder.enter(layer, hidden, mask), decoder.keys_values(layer, context)
        error = relative_difference(decoder(layer, hidden, entered, keys_values, None, mask), expected, mask)
        decoder.gate.fill_(1.0)
        opened = relative_difference(decoder(layer, hidden, entered, keys_values, None, mask), expected, mask)
    assert error <= TOLERANCE < opened
    return error


def decoders_of(bench: Bench, cache: sc.Cache, encoders: Mapping[str, EncoderCache]) -> str:
    """The decoders that train and evaluate with these encoders."""
    done = []
    has_blocks = all(encoder.block_layers for encoder in encoders.values())
    for fusion in ("linear", "reuse"):
        out = bench.work / "run"
        config = sc.TrainConfig(
            cache=str(cache.storage.root),
            out=str(out),
            fusion=fusion,
            encoder={"text": "bert", **{modality: encoder.key for modality, encoder in encoders.items()}},
            gallery_text="first_caption" if fusion == "reuse" else None,
            epochs=1,
            batch_size=12,
            control_epochs=0,
            log=("none",),
            device="cpu",
        )
        try:
            sc.train(config)
        except (ValueError, sc.CacheError):
            assert fusion == "reuse"
            assert not has_blocks
            continue
        if fusion == "reuse" or not has_blocks:
            path = sc.evaluate(
                sc.EvaluateConfig(cache=str(cache.storage.root), run=str(out), baselines="none", device="cpu")
            )
            assert json.loads((Path(path) / "result.json").read_text())["verb"] == "evaluate"
        shutil.rmtree(out)
        done.append(fusion)
    return ", ".join(done)


def assert_is_librarys(bench: Bench, cache: sc.Cache, encoder: EncoderCache, name: str, modality: str) -> None:
    """The cached states and vector of some inputs, encoded in batches, are the library's of each input alone."""
    manifest, inputs = encoder.manifest, cache.table.inputs[modality]  # type: ignore[index]
    rows = range(len(inputs))
    if inputs.texts:
        rows = sorted(rows, key=lambda row: len(inputs.texts[row]))  # type: ignore[assignment]
    library = Library(name, modality, bench.checkpoint(name))
    for row in np.linspace(0, len(rows) - 1, CHECKED, dtype=int):
        index = np.array([rows[int(row)]])
        raw = inputs.texts[index[0]] if inputs.texts else bench.media[inputs.content_hash[index[0]].tobytes()]
        states, vector = library.encode(raw)
        assert_close(torch.tensor(encoder.vectors(index)), vector, f"{name}, {modality}: vector")
        if len(states) == manifest.num_layers + 1 and name not in OTHER_STATES:
            layer = manifest.num_layers - 1
            found = torch.tensor(encoder.tokens(index, (layer,)).states[0])
            assert_close(found, states[layer], f"{name}, {modality}: hidden_states[{layer}]")


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)}, expected {tuple(expected.shape)}"
    error = relative_difference(found, expected, None)
    assert error <= CLOSE, f"{what}: differs by {error:.2g}"


class Library:
    """A checkpoint by the library's own calls alone."""

    def __init__(self, name: str, modality: str, folder: Path) -> None:
        self.name, self.modality = name, modality
        options = OPTIONS.get(name, {})
        self.model: Any = transformers.AutoModel.from_pretrained(folder, **options).eval()
        self.tower: Any = self.model
        if name in ENCODER_HALF:
            self.tower = self.model.get_encoder()
        for part in TOWERS[modality]:
            self.tower = getattr(self.tower, part, self.tower)
        if modality == "text":
            self.processor = transformers.AutoTokenizer.from_pretrained(folder)
        elif modality == "audio":
            self.processor = transformers.AutoFeatureExtractor.from_pretrained(folder)
        elif modality == "video":
            self.processor = load_video_processor(str(folder))  # test_videos.py compares it with the library's
        else:
            self.processor = picture_processor(folder)

    @torch.no_grad()
    def encode(self, raw: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
        """All hidden states, each [1, tokens, d], and the own vector [1, d] of one input."""
        inputs = self._inputs(raw)
        output = self.tower(**inputs, output_hidden_states=True)
        states = [in_rows(state) for state in output.hidden_states or ()]
        features = getattr(self.model, f"get_{self.modality}_features", None)
        if features is not None and self.tower is not self.model:
            found = features(**inputs)
            vector = found if isinstance(found, torch.Tensor) else found.pooler_output
            vector = vector[:, 0] if vector.ndim == 3 else vector
        elif self.name in POOLED:
            vector = output.pooler_output
        elif self.name in CLASS_TOKEN:
            vector = output.last_hidden_state[:, 0]
        else:
            vector = in_rows(output.last_hidden_state).mean(dim=1)
        return states, vector.flatten(1)

    def _inputs(self, raw: Any) -> dict[str, torch.Tensor]:
        if self.modality == "image":
            inputs = dict(self.processor(images=[raw], return_tensors="pt"))
            if self.name == "vit_mae":
                inputs["noise"] = torch.arange(16.0)[None]
            return {name: inputs[name] for name in ("pixel_values", "noise") if name in inputs}
        if self.modality == "video":
            places = np.arange(0, len(raw), len(raw) / clip_frames(self.model.config)).astype(int)  # as the library's
            return dict(self.processor(videos=[raw[places]], do_sample_frames=False, return_tensors="pt"))
        if self.modality == "audio":
            rate = self.processor.sampling_rate
            sound = decode("audio", raw, rate)
            return dict(self.processor([sound], sampling_rate=rate, return_tensors="pt"))
        length = PADDED.get(self.name)
        if length:
            padded = self.processor([raw], padding="max_length", max_length=length, return_tensors="pt")
            return {"input_ids": padded["input_ids"]}
        if self.name == "gpt2":
            raw = f"{self.processor.bos_token}{raw}{self.processor.eos_token}"
        inputs = dict(self.processor([raw], return_tensors="pt"))
        inputs.pop("token_type_ids", None)
        return inputs


def picture_processor(folder: Path) -> Any:
    """The processor of a checkpoint; that of DINOv3, which needs torchvision, by its settings."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    except ImportError:
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        settings.pop("image_processor_type")
        return transformers.ViTImageProcessorPil(**settings)


def in_rows(state: torch.Tensor) -> torch.Tensor:
    """[batch, tokens, d] of tokens or of a map, whose channels are the first axis where these differ."""
    if state.ndim == 3:
        return state
    if state.shape[1] == state.shape[2] != state.shape[3]:
        return state.flatten(1, 2)
    return state.flatten(2).transpose(1, 2)


def refusal(name: str, modality: str, folder: Path) -> str:
    """What loading a checkpoint says.

    Raises:
        AssertionError: it is not refused.
    """
    try:
        load_encoder(EncoderRequest(modality=modality, model_id=str(folder)))  # type: ignore[arg-type]
    except ValueError as error:
        return str(error).partition(f"{folder}: ")[2].replace(str(folder), name)
    raise AssertionError(f"{name}, {modality}: is not refused")


def runnable() -> list[str]:
    """Checkpoints of which at least one modality runs."""
    return [name for name, entry in zoo.ENTRIES.items() if any((name, one) not in REFUSED for one in entry.modalities)]


def documented() -> dict[tuple[str, str], tuple[str, ...]]:
    """The cells of each row of the table in the docs."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {(row[0].strip("`"), row[1]): tuple(row) for row in rows if len(row) == len(HEADER)}


def page(rows: Mapping[tuple[str, str], tuple[str, ...]], refusals: Mapping[tuple[str, str], str]) -> str:
    """The page of the docs."""
    table = [HEADER, ("---",) * len(HEADER), *(rows[key] for key in sorted(rows, key=lambda key: key[::-1]))]
    reasons = [
        ("checkpoint", "input", "message"),
        ("---",) * 3,
        *(
            (f"`{name}`", modality, message.rpartition(". ")[0])
            for (name, modality), message in sorted(refusals.items())
        ),
    ]
    names = {name for name, _ in rows}
    lines = (f"| {' | '.join(cells)} |" for cells in table)
    told = (f"| {' | '.join(cells)} |" for cells in reasons)
    return PAGE_TEXT.format(count=len(names), table="\n".join(lines), refusals="\n".join(told))


PAGE_TEXT = """# Table of encoders

{count} tiny random checkpoints, one for each family, run through extraction, `linear`, `reuse` and evaluation in the
tests. For each, cached states and vectors are compared with those that transformers computes of single inputs, and
`reuse` with its gate closed with the encoder's own next state. [Encoders](encoders.md) explains the
columns; `python tests/zoo_runs.py` writes this page.

{table}

## Refused

{refusals}
"""


def main() -> None:
    """Run checkpoints and write the page."""
    rows = documented() if PAGE.exists() and sys.argv[1:] else {}
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work))
        refusals = {key: refusal(*key, bench.checkpoint(key[0])) for key in REFUSED}
        for name in sys.argv[1:] or runnable():
            rows |= {row.key: row.cells for row in run(bench, name)}
            PAGE.write_text(page(rows, refusals))
    sys.stdout.write(f"{PAGE.name}: {len(rows)} rows\n")


REFUSED: dict[tuple[str, str], str] = {
    ("siglip2_naflex", "image"): "pads pictures to one size",
    ("yolos", "image"): "of several shapes",
    ("funnel", "text"): "change the number or width of tokens",
    ("squeezebert", "text"): "not called in a forward pass",
    ("timesformer", "image"): "found a TimesformerModel, which takes videos",
    ("videomae", "image"): "found a VideoMAEModel, which takes videos",
    ("vit", "video"): "found a ViTModel, which takes images",
    ("vjepa2", "image"): "found a VJEPA2Model, which takes videos",
}
"""Checkpoints that cannot run, with a part of the message. Models of videos are no encoders of photos."""


if __name__ == "__main__":
    main()
