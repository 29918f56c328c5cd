"""The model card of a run, made from its result files: what was trained on what, and every number with its controls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from saffe_cache.core.features import nouns, printable
from saffe_cache.core.outputs import CONFIG, RESULT, read_json
from saffe_cache.core.tables import percent
from saffe_cache.evaluation.details import FAM
from saffe_cache.evaluation.results import EvaluationResult
from saffe_cache.inputs.media import named_layers
from saffe_cache.training.runs import BLOCKS, weights_hash

if TYPE_CHECKING:
    from saffe_cache.inference.model import TrainedFusion


def evaluations_of(folder: Path) -> dict[str, EvaluationResult]:
    """A run's evaluations by the names of their folders, without those that leak, of baselines alone and of other
    weights."""
    found: dict[str, EvaluationResult] = {}
    weights = weights_hash(folder)
    for path in sorted(folder.glob(f"*/{RESULT}")):
        content = read_json(path)
        if content.get("verb") == "evaluate" and not path.parent.name.endswith("-leak"):
            result = EvaluationResult.from_json(content, path)
            is_own = result.system == FAM and _weights_of(path.parent) in (None, weights)
            found |= {path.parent.name: result} if is_own else {}
    return found


def _weights_of(evaluation: Path) -> str | None:
    """Hash of the weights that were evaluated; None where only the result was kept."""
    path = evaluation / CONFIG
    return read_json(path).get("resolved", {}).get("weights") if path.exists() else None


def model_card(fam: TrainedFusion, described: Mapping[str, Any], options: Mapping[str, Any], name: str) -> str:
    """Markdown with the hub's metadata.

    Args:
        described: the run's encoders.json.
        options: of the training.
        name: what the run is loaded by.
    """
    places = {one["manifest"]["modality"]: _place(one) for one in described.values()}
    hub_ids = [place for place in places.values() if place.count("/") == 1]
    data = ModelCardData(
        library_name="saffe-cache",
        tags=["saffe-cache", "retrieval", "multimodal-fusion", fam.spec.shape.fusion],
        pipeline_tag="feature-extraction",
        **({"base_model": hub_ids} if hub_ids else {}),
    )
    evaluations = evaluations_of(fam.folder)
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_plain(name)}",
        f"A {fam.spec.shape.fusion} fusion of {_COUNTS[len(described)]} frozen encoders, trained from their cached "
        f"features with saffe_cache. It maps {nouns([fam.modality])} and texts into one space of {fam.size} "
        "dimensions, for search." + " Tables below call it FAM (FusionAlign Module)." * bool(evaluations),
        _use(fam, name),
        _training(fam, described, options),
        _encoders(described, has_blocks=(fam.folder / BLOCKS).exists()),
        *(_evaluation(result) for result in evaluations.values()),
        _limits(fam, described, evaluations),
    ]
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """A name of any origin in one line, which Markdown and HTML leave as it is."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", printable(" ".join(text.split())))


_COUNTS = {2: "two", 3: "three", 4: "four"}
_CALLS = {
    "image": ("embed_images", '["a.jpg", "b.jpg"]'),
    "audio": ("embed_audio", '["a.wav", "b.wav"]'),
    "video": ("embed_videos", '["a.mp4", "b.mp4"]'),
    "media": ("embed_media", "[]"),
}


def _use(fam: TrainedFusion, name: str) -> str:
    embed, files = _CALLS[fam.modality]
    if fam.spec.media:
        known = {"image": "a.jpg", "audio": "a.wav", "video": "a.mp4"}
        files = json.dumps([{name: known[name] for name in fam.media}])
    vectors = f"fam.{embed}({files})"
    if fam.why_not_alone:
        vectors = f'fam.embed_pairs({files}, ["a note on the first", "a note on the second"])'
    composed = 'changed = fam.similarities(fam.embed_queries(["c.jpg"], ["in grey"]), found)\n' if fam.composes else ""
    return (
        f"## Use\n\n```python\nimport saffe_cache as sc\n\nfam = sc.load_run({json.dumps(name)})\nfound = {vectors}\n"
        f'scores = fam.embed_texts(["a dog asleep"]) @ found.T\n{composed}```'
    )


def _training(fam: TrainedFusion, described: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    spec, result = fam.spec, fam.result
    past = next(iter(described.values()))["extraction"] or {}
    losses = ", ".join(f"{one} {weight:g}" for one, weight in spec.objective.items())
    paired = {"null": "none", "first_caption": "the first caption", "matched": "a caption that searches for it"}
    lines = [
        f"data: {_plain(past.get('data') or 'unknown')}, split {_plain(spec.train_split)}, described by {spec.pairs}",
        f"{result.train_photos:,} {nouns([fam.modality])} to train on, {result.validation_photos:,} to choose the "
        f"epoch on ({_plain(spec.validation)})",
        f"layers {named_layers(spec)} of the {' and '.join(fam.media)} encoder"
        + (f" and {_numbers(spec.text_layers)} of the text encoder" if spec.text_layers else ""),
        f"head {spec.shape.head}, objective {losses}, paired text: {paired[spec.gallery_text]}",
        f"{result.trainable_parameters:,} trainable parameters, {result.steps:,} steps, seed {spec.seed}",
        f"epoch {result.best_epoch} of {options.get('epochs', 'unknown')}, validation {result.validation_score} "
        f"{percent(result.best_validation_score)} %",
    ]
    return "## Training\n\n" + "\n".join(f"- {line}" for line in lines)


def _numbers(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


def _encoders(described: Mapping[str, Any], *, has_blocks: bool) -> str:
    rows = ["| input | encoder | revision | licence | key |", "|---|---|---|---|---|"]
    for key, one in described.items():
        fields, place = one["manifest"]["fingerprint"], _place(one)
        revision, is_on_hub = fields.get("revision"), place.count("/") == 1
        licence = licence_of(place, revision) if revision or is_on_hub else None  # a folder's name is no hub id
        shown = [_plain(one) for one in (place, revision or "–", licence or "not known here: see the encoder's page")]
        rows.append(f"| {fields['modality']} | {' | '.join(shown)} | `{key}` |")
    lead = "Their weights are not here; they are loaded by name and checked against a hash."
    if has_blocks:
        lead = (
            f"{BLOCKS} holds blocks of theirs, which the fusion runs or started from: their licences apply to these "
            "weights too. All others are loaded by name and checked against a hash."
        )
    return f"## Frozen encoders\n\n{lead}\n\n" + "\n".join(rows)


def _place(one: Mapping[str, Any]) -> str:
    """Where an encoder is loaded from."""
    fields = one["manifest"]["fingerprint"]
    return str(one["extraction"]["encoder"][fields["modality"]] if one["extraction"] else fields["model_id"])


def licence_of(place: str, revision: str | None = None) -> str | None:
    """What the card of an encoder, in its folder or on the hub, says of its licence; None if nothing can be read."""
    try:
        if Path(place).is_dir():
            card = Path(place) / "README.md"
            found = ModelCard(card.read_text(encoding="utf-8")).data if card.exists() else None
        else:
            found = HfApi().model_info(place, revision=revision, timeout=5).card_data
    except (HfHubHTTPError, OSError, ValueError):
        return None
    licence = getattr(found, "license", None)
    return None if licence is None else str(licence)


def _evaluation(result: EvaluationResult) -> str:
    [section] = result.sections()
    wrong = [f"**Control failed: {_plain(text)}. Do not use these numbers.**" for text in result.failures]
    parts = [
        f"## Results: {_plain(section.title)}",
        *wrong,
        *(f"Warning: {_plain(text)}" for text in result.warnings),
        section.lead,
        *(table.to_markdown() for table in section.tables),
        *section.texts,
        "\n".join(f"- {name}: {text}" for name, text in section.definitions),
    ]
    return "\n\n".join(filter(None, parts))


def _limits(fam: TrainedFusion, described: Mapping[str, Any], evaluations: Mapping[str, EvaluationResult]) -> str:
    longest = next(
        one["manifest"]["fingerprint"].get("max_length")
        for one in described.values()
        if one["manifest"]["modality"] == "text"
    )
    lines = [
        *([f"Texts are cut after {longest} tokens."] if longest else []),
        "The numbers above hold for the data above; how well it works on other data is unknown.",
        "Whatever the frozen encoders cannot tell apart, the fusion cannot either; their biases and licences apply.",
    ]
    if not evaluations:
        lines.insert(0, "It has not been evaluated: its quality is unknown.")
    for why, what in ((fam.why_not_alone, "alone"), (fam.why_not_paired, "fused with a text")):
        if why:
            lines.append(f"It has no vectors of {nouns([fam.modality])} {what}: {why.partition('. ')[0]}.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
