"""Train the FAM alone, straight from the cache.

Every random choice follows from the seed and the step: the order of an epoch from (seed, epoch), dropout
from (seed, step). So a resumed run needs the step, the weights and the optimiser, and then repeats an
uninterrupted one bit for bit on the same device.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import resource
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from saffe_cache.features import CacheError, Modality
from saffe_cache.fusion.fam import FamShape, FusionAlignModule, FusionName, HeadName
from saffe_cache.fusion.heads import AttentionHead, summarize
from saffe_cache.objectives import Temperature, info_nce
from saffe_cache.pairs import (
    VALIDATION_SPLITS,
    PairKind,
    Pairs,
    class_vectors,
    gallery_modality,
    hold_out,
    mean_text_vectors,
    pair_kind,
    select_pairs,
    token_tensors,
)
from saffe_cache.retrieval.baselines import fit_ridge
from saffe_cache.retrieval.protocols import caption_scores, class_scores
from saffe_cache.runs import (
    RunSpec,
    build_fam,
    choose_device,
    encode_gallery,
    encode_queries,
    provenance,
    read_json,
    write_json,
    write_tensors,
)
from saffe_cache.store.reader import Cache, EncoderCache, open_cache

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a FusionAlign Module from a cache.

    The same command resumes a killed run where it was, and does nothing for a finished one.
    """

    cache: str
    """The cache, as saffe-extract wrote it."""
    out: str
    """Folder of the run."""
    fusion: FusionName = "linear"
    """linear: pool the cached states. decoder: the encoder's next block with a gated cross-attention, then pool."""
    head: HeadName = "attention"
    """How tokens become a vector. attention: learned queries. mean. flatten: the paper's, for reproduction."""
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Layers to train on, as image=11,12. Default: all cached ones that the fusion can use."""
    encoder: Mapping[str, str] = field(default_factory=dict)
    """Which encoder, as image=PART-OF-KEY, where the cache has several of a modality."""
    pairs: Literal["auto", "captions", "classes"] = "auto"
    """What describes an item: its captions, or its classes' names. auto: captions where there are any."""
    train_split: str = "train"
    """Split to train on."""
    validation: str = "auto"
    """Where the best epoch is chosen: a split's name, or heldout for a part of the train split by photo.
    auto: dev, val, valid or validation where there is one, else heldout."""
    validation_fraction: float = 0.1
    """Part of the train split that heldout takes, 0 to 1."""
    epochs: int = 20
    """Passes over the photos."""
    batch_size: int = 512
    """Photos in a batch, each with all its texts."""
    learning_rate: float = 2e-3
    """Peak of AdamW's learning rate."""
    weight_decay: float = 0.05
    """AdamW's, on matrices."""
    warmup: float = 0.1
    """Part of the steps with a rising learning rate; a cosine to 2 % follows."""
    dropout: float = 0.5
    """In the head and the query map, 0 to 1."""
    ema: float = 0.98
    """Decay of the running mean of the weights, which is what is kept; 0 keeps the weights themselves."""
    clip: float = 5.0
    """Largest norm of the gradient."""
    patience: int = 8
    """Stop after so many epochs without a better validation score."""
    seed: int = 0
    """Of everything random."""
    device: str = "auto"
    """auto takes a GPU where there is one; or cpu, cuda."""
    checkpoint_seconds: float = 60.0
    """Time between states that a killed run resumes from."""
    tensorboard: bool = True
    """Also log to TensorBoard, where it is installed."""


@dataclass(kw_only=True)
class _State:
    """What a resumed run needs."""

    model: FusionAlignModule
    temperature: Temperature
    average: FusionAlignModule
    optimizer: torch.optim.AdamW
    step: int = 0
    best_score: float = -1.0
    best_epoch: int = -1
    seconds: float = 0.0


def train(config: TrainConfig) -> str:
    """Train, and return the run's folder.

    Raises:
        CacheError: the cache lacks what the fusion needs.
        ValueError: the options do not fit the cache, or the folder holds another run.
    """
    out = Path(config.out)
    cache = open_cache(config.cache)
    spec = resolve_run(config, cache)
    _check_folder(out, config, spec)
    if (out / "result.json").exists():
        logger.info("%s is finished already, nothing to do.", out)
        return config.out
    train_pairs, validation_pairs, num_shared = training_pairs(spec, cache)
    state = _start(config, spec, cache, train_pairs)
    logger.info(
        "%s on %s: %d photos to train on, %d to validate on (%s); left out %d unusable ones and %d that are in other "
        "splits too; %.2f M trainable parameters.",
        spec.shape.fusion,
        choose_device(config.device),
        len(train_pairs),
        len(validation_pairs),
        spec.validation,
        train_pairs.num_unusable,
        num_shared,
        _num_trainable(state.model) / 1e6,
    )
    write_json(out / "config.json", {"stage": "train", "run": asdict(spec), **provenance(config)})
    _resume(out, state)
    _train_epochs(config, state, _Data(spec, cache, train_pairs, validation_pairs, config), out)
    write_json(
        out / "result.json",
        {
            "best_epoch": state.best_epoch,
            "best_validation_score": state.best_score,
            "validation_score": "mrr" if spec.pairs == "captions" else "map",
            "trainable_parameters": _num_trainable(state.model),
            "train_photos": len(train_pairs),
            "validation_photos": len(validation_pairs),
            "unusable_items": train_pairs.num_unusable,
            "photos_shared_with_other_splits": num_shared,
            "steps": state.step,
            "seconds": round(state.seconds, 1),
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        },
    )
    (out / "state.safetensors").unlink(missing_ok=True)
    logger.info("best validation score %.4f in epoch %d", state.best_score, state.best_epoch)
    return config.out


def resolve_run(config: TrainConfig, cache: Cache) -> RunSpec:
    """Fill in what the config leaves to the cache: encoders, layers, kind of pairs, validation.

    Raises:
        CacheError, ValueError: the cache lacks what is asked for.
    """
    modality = gallery_modality(cache)
    gallery = cache.encoder(modality, config.encoder.get(modality))
    text = cache.encoder("text", config.encoder.get("text"))
    layers = _choose_layers(config, gallery, modality)
    text_layers: tuple[int, ...] = ()
    if config.fusion == "decoder":
        text_layers = _choose_layers(config, text, "text")[-len(layers) :]
        layers = layers[-len(text_layers) :]
    validation = config.validation
    if validation == "auto":
        present = set(cache.table.splits)
        validation = next((name for name in VALIDATION_SPLITS if name in present), "heldout")
    kind: PairKind = pair_kind(cache.table) if config.pairs == "auto" else config.pairs
    widths = gallery.array(f"hidden_states/{layers[0]}").row_shape
    return RunSpec(
        gallery_key=gallery.key,
        text_key=text.key,
        gallery_layers=layers,
        text_layers=text_layers,
        pairs=kind,
        train_split=config.train_split,
        validation=validation,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        shape=FamShape(
            fusion=config.fusion,
            head=config.head,
            num_layers=len(layers),
            hidden_size=widths[-1],
            num_tokens=widths[0],
            text_size=text.array(text.manifest.vector).row_shape[0],
            dropout=config.dropout,
        ),
    )


def _choose_layers(config: TrainConfig, encoder: EncoderCache, modality: Modality) -> tuple[int, ...]:
    usable = encoder.block_layers if config.fusion == "decoder" else encoder.manifest.layers
    chosen = config.layers.get(modality, tuple(usable))
    wrong = [layer for layer in chosen if layer not in usable]
    if wrong or not chosen:
        raise CacheError(
            f"{encoder.key}: --fusion {config.fusion} can use layers {usable}, asked for {list(chosen)}. "
            f"{'A decoder needs the block behind a layer, which the last output has not. ' if encoder.manifest.layers != usable else ''}"
            f"Add layers with saffe-extract --layers {modality}=…."
        )
    return tuple(chosen)


def training_pairs(spec: RunSpec, cache: Cache) -> tuple[Pairs, Pairs, int]:
    """The pairs that a run trains on, those that it is validated on, and the number of photos shared by splits.

    A photo that stands in another split too, by content, is not trained on.
    """
    gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
    pairs = select_pairs(cache.table, gallery, text, spec.train_split, spec.pairs)
    rows = cache.table.rows[gallery.manifest.modality]
    elsewhere = rows[np.array(cache.table.splits) != spec.train_split]
    shared = np.isin(pairs.rows, elsewhere)
    pairs = pairs.take(np.flatnonzero(~shared))
    if spec.validation == "heldout":
        hashes = cache.table.inputs[gallery.manifest.modality].content_hash
        return *hold_out(pairs, spec.validation_fraction, spec.seed, hashes), int(shared.sum())
    return pairs, select_pairs(cache.table, gallery, text, spec.validation, spec.pairs), int(shared.sum())


def _check_folder(out: Path, config: TrainConfig, spec: RunSpec) -> None:
    """Refuse to mix two runs in one folder."""
    if not (out / "config.json").exists():
        return
    old = read_json(out / "config.json")
    new = json.loads(json.dumps({"run": asdict(spec), "config": asdict(config)}))
    ignored = {"device", "checkpoint_seconds", "tensorboard", "cache", "out"}
    different = [
        f"{name}: {old.get(part, {}).get(name)!r} there, {value!r} now"
        for part in ("run", "config")
        for name, value in new[part].items()
        if name not in ignored and old.get(part, {}).get(name) != value
    ]
    if different:
        raise ValueError(f"--out {out} holds another run ({'; '.join(different)}). Choose another --out, or delete it.")


def _start(config: TrainConfig, spec: RunSpec, cache: Cache, pairs: Pairs) -> _State:
    """The model before the first step; the attention head's linear path starts as the ridge regression."""
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    model = build_fam(spec, cache).to(device)
    if isinstance(model.head, AttentionHead):
        gallery, text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
        features = _decoded_summaries(model, gallery, pairs.rows, spec.gallery_layers, device)
        fit = fit_ridge(features, mean_text_vectors(pairs, text), judge=lambda fit: 0.0, strengths=(0.1,))
        model.head.start_linear(torch.from_numpy(fit.weight), torch.from_numpy(fit.bias))
    temperature = Temperature().to(device)
    groups = model.parameter_groups(config.learning_rate, config.weight_decay)
    groups.append({"params": list(temperature.parameters()), "lr": 1.5 * config.learning_rate, "weight_decay": 0.0})
    for group in groups:
        group["peak"] = group["lr"]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    return _State(model=model, temperature=temperature, average=copy.deepcopy(model).eval(), optimizer=optimizer)


@torch.inference_mode()
def _decoded_summaries(
    model: FusionAlignModule, encoder: EncoderCache, rows: np.ndarray, layers: tuple[int, ...], device: str
) -> np.ndarray:
    """What the head's linear path will see before any training."""
    parts = []
    for start in range(0, len(rows), 256):
        states, mask = token_tensors(encoder, rows[start : start + 256], layers, device)
        parts.append(summarize(model.decode(states, mask), mask).cpu().numpy())
    return np.concatenate(parts)


class _Data:
    """Batches of the training pairs, and the validation score."""

    def __init__(self, spec: RunSpec, cache: Cache, pairs: Pairs, validation: Pairs, config: TrainConfig) -> None:
        self._spec, self._pairs, self._validation = spec, pairs, validation
        self._gallery, self._text = cache.encoders[spec.gallery_key], cache.encoders[spec.text_key]
        self._table = cache.table
        self._device = choose_device(config.device)
        self._batch_size = min(config.batch_size, len(pairs))
        self._seed = config.seed

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches; the photos of a short last one have their turn in another epoch."""
        return len(self._pairs) // self._batch_size

    def batches(self, step: int, stop: int) -> Iterator[tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor, torch.Tensor]]:
        """(states, mask, text vectors [texts, d], positives [photos, texts]) from a step on, read one ahead."""
        with ThreadPoolExecutor(1) as pool:
            ahead: Future[Any] | None = None
            for number in range(step, stop):
                batch = ahead.result() if ahead else self._read(number)
                ahead = pool.submit(self._read, number + 1) if number + 1 < stop else None
                yield batch

    def _read(self, step: int) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor, torch.Tensor]:
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._pairs))
        chosen = np.sort(order[within * self._batch_size : (within + 1) * self._batch_size])
        states, mask = token_tensors(self._gallery, self._pairs.rows[chosen], self._spec.gallery_layers, self._device)
        texts = [self._pairs.texts[int(i)] for i in chosen]
        distinct, columns = np.unique(np.concatenate(texts), return_inverse=True)
        positives = np.zeros((len(chosen), len(distinct)), bool)
        positives[np.repeat(np.arange(len(chosen)), [len(of_one) for of_one in texts]), columns] = True
        vectors = torch.from_numpy(self._text.vectors(distinct)).to(self._device)
        return states, mask, vectors, torch.from_numpy(positives).to(self._device)

    def validate(self, model: FusionAlignModule) -> float:
        """MRR of captions searching photos, or mAP of classes searching photos, with null text."""
        pairs = self._validation
        photos = encode_gallery(model, self._gallery, pairs.rows, self._spec.gallery_layers, self._device)
        if pairs.kind == "classes":
            queries = encode_queries(model, class_vectors(self._table, self._text), self._device)
            return class_scores(photos, queries, pairs.labels, intervals=False)["map"].value
        owners = np.repeat(np.arange(len(pairs)), np.diff(pairs.texts.offsets))
        queries = encode_queries(model, self._text.vectors(pairs.texts.values), self._device)
        return caption_scores(photos, queries, owners, intervals=False)["mrr"].value


def _train_epochs(config: TrainConfig, state: _State, data: _Data, out: Path) -> None:
    """Steps, validation at the end of each epoch, and states to resume from on the way."""
    total = config.epochs * data.steps_per_epoch
    log = _Log(out, state.step, config.tensorboard)
    progress = tqdm(total=total, initial=state.step, unit=" steps", desc=str(out))
    before, started = state.seconds, time.perf_counter()
    saved, losses = started, []
    for batch in data.batches(state.step, total):
        if _has_stopped(config, state, data):
            break
        losses.append(_step(config, state, batch, total))
        state.step += 1
        progress.update()
        state.seconds = before + time.perf_counter() - started
        if state.step % data.steps_per_epoch == 0:
            _finish_epoch(config, state, data, log, out, float(np.mean(losses)))
            losses = []
        if time.perf_counter() - saved > config.checkpoint_seconds:
            _save_state(out, state)
            saved = time.perf_counter()
    progress.close()
    log.close()


def _has_stopped(config: TrainConfig, state: _State, data: _Data) -> bool:
    """Early stopping: no better validation score for `patience` epochs."""
    return state.best_epoch >= 0 and state.step // data.steps_per_epoch - 1 - state.best_epoch >= config.patience


def _step(config: TrainConfig, state: _State, batch: Any, total: int) -> float:
    """One update of the weights and of their running mean; returns the loss."""
    states, mask, vectors, positives = batch
    torch.manual_seed(config.seed * 1_000_003 + state.step)
    rate = _schedule(state.step, total, config.warmup)
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    state.model.train()
    device = vectors.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        photos = state.model(states, mask)
        queries = state.model.encode_queries(vectors)
    loss = info_nce(photos.float(), queries.float(), positives, state.temperature())
    state.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
    state.optimizer.step()
    decay = min(config.ema, (1 + state.step) / (10 + state.step)) if config.ema else 0.0
    with torch.no_grad():
        for mean, value in zip(state.average.parameters(), state.model.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)
    return float(loss.detach())


def _schedule(step: int, total: int, warmup: float) -> float:
    """Linear warm-up, then a cosine down to 2 %."""
    rising = max(1, int(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return 0.02 + 0.98 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising))) / 2


def _finish_epoch(config: TrainConfig, state: _State, data: _Data, log: _Log, out: Path, loss: float) -> None:
    epoch = state.step // data.steps_per_epoch - 1
    score = data.validate(state.average)
    if score > state.best_score:
        state.best_score, state.best_epoch = score, epoch
        write_tensors(out / "model.safetensors", state.average.state_dict())
    values = {
        "loss": loss,
        "validation_score": score,
        "temperature": float(state.temperature().detach()),
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "seconds": round(state.seconds, 2),
    }
    log.write({"step": state.step, "epoch": epoch, **values})


class _Log:
    """log.jsonl, and TensorBoard where it is installed. Lines behind a resumed step are dropped."""

    def __init__(self, out: Path, step: int, tensorboard: bool) -> None:
        self._path = out / "log.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        self._path.write_text("".join(line + "\n" for line in kept))
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step)  # type: ignore[no-untyped-call]

    def write(self, values: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        if self._board is not None:
            for name in ("loss", "validation_score", "temperature", "learning_rate"):
                self._board.add_scalar(name, values[name], values["step"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _save_state(out: Path, state: _State) -> None:
    """All that `_resume` needs, in one file."""
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in state.average.state_dict().items()}
    tensors |= {f"temperature.{name}": value for name, value in state.temperature.state_dict().items()}
    for number, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    numbers = {name: getattr(state, name) for name in ("step", "best_score", "best_epoch", "seconds")}
    write_tensors(out / "state.safetensors", tensors, {"state": json.dumps(numbers)})


def _resume(out: Path, state: _State) -> None:
    """Continue from the last saved state, if there is one."""
    path = out / "state.safetensors"
    if not path.exists():
        return
    with safe_open(path, framework="pt") as file:
        numbers = json.loads(file.metadata()["state"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — not a dict

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    state.model.load_state_dict(part("model."))
    state.average.load_state_dict(part("average."))
    state.temperature.load_state_dict(part("temperature."))
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in part("optimizer.").items():
        number, moment = name.split(".", 1)
        moments.setdefault(int(number), {})[moment] = value
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    for name, value in numbers.items():
        setattr(state, name, value)
    logger.info("resuming from step %d", state.step)


def _num_trainable(model: FusionAlignModule) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
