"""DeepInsert for captions: at which layer of a frozen language model do photo tokens join it best, and what is saved?

    python pipelines/captions.py --data PATH/flickr8k --work runs/captions \\
        --image-encoder facebook/dinov2-small
    python pipelines/captions.py ... --language-model gpt2 --layers 0 2 4 6 8 10

Without --language-model, a small GPT-2 (6 layers, 256 wide, 8 heads; byte-level BPE of 4,000 tokens) is trained first,
on the text of the train split's captions; the best epoch is chosen on the captions of a twentieth of its photos. It
never sees a photo. In its training the captions of one photo follow one another, so that it learns to use preceding
text, as language models do; the first begins at any of 33 positions. Then, with DINOv2-small at 112 px, hidden states
12, class token and 4 x 4 fields (17 photo tokens), a projector is trained for every layer and three seeds: 5 epochs
with one caption per photo, the best epoch chosen on a tenth of train, by photo. Everything is measured on dev.

Time on two CPU cores: 3 min for the language model, 2 min to extract 2,200 photos and their captions, 14 min for 18
runs. Disk: 350 MB. The same command resumes a killed run and does not repeat finished ones. It writes WORK/captions.md
and WORK/captions.json. The photos of an existing cache, copied to WORK/captions.zarr, are not encoded again; all of
them are then trained on, whatever --train says.

What to expect, from a trial with 800 photos, one epoch of the language model, one seed and 120 reported photos: the
photo lowers the plain model's loss of 3.88 nats per token by 0.06 at layer 0, 0.04 at 2 and 0.03 at 4; shuffled photos
raise it at layers 0 and 2. By gain, 30, 27 and 30 % of the photos find their own caption among ten (shuffled: 8, 12 and
6 %), by loss none. A training step takes 1, 0.70 and 0.40 of layer 0's FLOPs, and of its time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.core.devices import num_cores
from saffe_cache.core.outputs import read_json, write_json
from saffe_cache.extraction.config import ExtractConfig
from saffe_cache.extraction.extract import extract
from saffe_cache.retrieval.fitting import adamw, update, warmed_cosine
from saffe_cache.retrieval.metrics import seed_interval
from saffe_cache.sources.items import Columns
from saffe_cache.sources.registry import read_items
from saffe_cache.studies.captioning.caption import caption
from saffe_cache.studies.captioning.captions import shuffled_batches
from saffe_cache.studies.captioning.config import CaptionConfig
from saffe_cache.studies.captioning.result import CaptionResult

END = "<|endoftext|>"
VOCABULARY, POSITIONS, BATCH, LEARNING_RATE = 4000, 128, 16, 1.5e-3
FIRST_POSITIONS = 33
"""Where the first text may begin in training: a text behind nothing has to be known behind a photo's places too."""
HELD_OUT = 20
"""One photo in this many, by content hash, is held out to choose the language model's epoch."""
GRID = 4

logger = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of splits with metadata.jsonl")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--image-encoder", default="facebook/dinov2-small")
    parser.add_argument("--language-model", help="a GPT-2; default: a small one is trained")
    parser.add_argument("--lm-epochs", type=int, default=2)
    parser.add_argument("--split", default="dev", help="split to report on")
    parser.add_argument("--train", type=int, default=2000, help="photos to train projectors on")
    parser.add_argument("--report", type=int, default=200, help="photos to report on")
    parser.add_argument("--layers", nargs="+", type=int, default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    language_model = options.language_model or small_gpt2(options.data, options.work / "gpt2", options.lm_epochs)
    cache = extract(
        ExtractConfig(
            data=options.data,
            cache=str(options.work / "captions.zarr"),
            encoder={"image": options.image_encoder, "text": language_model},
            layers={"image": (12,), "text": tuple(options.layers)},
            image_size=112,
            position_offset=1 + GRID**2,
            max_items={"train": options.train, options.split: options.report},
        )
    )
    configs = [
        CaptionConfig(
            cache=cache,
            out=str(options.work / f"layer-{layer}-seed{seed}"),
            layer=layer,
            grid=GRID,
            image_layer=12,
            split=options.split,
            report_photos=options.report,
            epochs=options.epochs,
            seed=seed,
        )
        for layer in options.layers
        for seed in options.seeds
    ]
    runs = run_all(configs)
    write_json(options.work / "captions.json", {"runs": [asdict(run) for run in runs]})
    page = markdown(runs)
    write_whole(options.work / "captions.md", page.encode())
    print(page)
    failures = [f"layer {run.layer}: {failure}" for run in runs for failure in run.failures]
    print(*failures, sep="\n")
    sys.exit(3 if failures else 0)


def small_gpt2(data: str, folder: Path, epochs: int) -> str:
    """Train it on the train split's captions, unless it is there, and return its folder.

    Raises:
        ValueError: one is there that was trained for another number of epochs.
    """
    if (folder / "training.json").exists():
        trained = len(read_json(folder / "training.json")["held_out_losses"])
        if trained != epochs:
            raise ValueError(f"{folder}: trained for {trained} epochs, expected {epochs}. Choose another --work.")
        return str(folder)
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    items = [item for item in read_items(data, Columns(), ("train",)) if not item.problem]
    photos = sorted({item.hashes["image"] for item in items})
    held_out = set(photos[: -(-len(photos) // HELD_OUT)])
    tokenizer = byte_pairs([text for item in items if item.hashes["image"] not in held_out for text in item.captions])
    end = tokenizer.token_to_id(END)
    assert end is not None
    ids: dict[bool, list[list[list[int]]]] = {False: [], True: []}
    for item in items:
        encoded = tokenizer.encode_batch(list(item.captions))
        ids[item.hashes["image"] in held_out].append([one.ids for one in encoded])
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=tokenizer.get_vocab_size(),
            n_positions=POSITIONS,
            n_embd=256,
            n_layer=6,
            n_head=8,
            bos_token_id=end,
            eos_token_id=end,
            **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
        )
    )
    lengths = np.array([len(joined(captions, end)) for captions in ids[False]])
    steps = epochs * -(-len(lengths) // BATCH)
    optimizer, step = adamw(model.parameters(), LEARNING_RATE, weight_decay=0.05), itertools.count()
    losses: list[float] = []
    for epoch in range(epochs):
        model.train()
        for number, chosen in enumerate(shuffled_batches(lengths, BATCH, generator)):
            shuffled = (
                [ids[False][photo][i] for i in generator.permutation(len(ids[False][photo]))] for photo in chosen
            )
            first = int(generator.integers(FIRST_POSITIONS))
            total, count = _loss(model, [joined(captions, end) for captions in shuffled], first)
            rate = warmed_cosine(next(step), steps, max(1, steps // 10))
            update(optimizer, total / count, rate, tuple(model.parameters()), 1.0)
            if number % 100 == 0:
                logger.info(
                    "Language model, epoch %d, step %d: %.3f nats a token.", epoch, number, total.item() / count
                )
        losses.append(_held_out_loss(model, [joined(captions, end) for captions in ids[True]]))
        logger.info("Language model, epoch %d: %.3f nats a token of held-out captions.", epoch, losses[-1])
        if losses[-1] == min(losses):
            model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END
    ).save_pretrained(folder)
    write_json(folder / "training.json", {"held_out_losses": losses, "photos": len(ids[False])})
    return str(folder)


def joined(captions: Sequence[list[int]], end: int) -> list[int]:
    """The captions of one photo in a row, each between end tokens, cut to the available positions."""
    return [end, *(token for caption in captions for token in (*caption, end))][: POSITIONS - FIRST_POSITIONS + 1]


def byte_pairs(texts: Sequence[str]) -> Tokenizer:
    """A byte-level BPE of lower-case text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _loss(model: Any, batch: Sequence[list[int]], first_position: int = 0) -> tuple[torch.Tensor, int]:
    """Nats, summed, and tokens; padding is behind the text, where no real token sees it."""
    rows = [torch.tensor(ids) for ids in batch]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    positions = torch.arange(first_position, first_position + padded.shape[1])[None]
    logits = model(padded.clamp(min=0), position_ids=positions).logits[:, :-1]
    targets = padded[:, 1:]
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    return total, int((targets >= 0).sum())


@torch.inference_mode()
def _held_out_loss(model: Any, ids: Sequence[list[int]]) -> float:
    model.eval()
    parts = [_loss(model, ids[start : start + BATCH]) for start in range(0, len(ids), BATCH)]
    return float(sum(total for total, _ in parts)) / sum(count for _, count in parts)


def run_all(configs: Sequence[CaptionConfig]) -> list[CaptionResult]:
    """A run on each core; their results, in order."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_cores(), len(configs)), mp_context=context) as pool:
        return list(pool.map(_run, configs))


def _run(config: CaptionConfig) -> CaptionResult:
    torch.set_num_threads(1)
    return CaptionResult.load(caption(config))


COLUMNS = {
    "loss": ("losses", "photo", "value"),
    "photos shuffled": ("losses", "photos_shuffled", "value"),
    "no photo": ("losses", "no_photo", "value"),
    "less the plain model": ("differences", "plain_model", "value"),
    "own caption by gain, %": ("own_caption", "photo, by gain", "value"),
    "by loss, %": ("own_caption", "photo, by loss", "value"),
    "shuffled, by gain, %": ("own_caption", "photos_shuffled, by gain", "value"),
    "shuffled, by loss, %": ("own_caption", "photos_shuffled, by loss", "value"),
}
COSTS: Mapping[str, Callable[[CaptionResult], float]] = {
    "FLOPs a training step": lambda run: run.cost.training_step_flops,
    "FLOPs of a whole pass": lambda run: run.cost.whole_pass_flops,
    "time a step": lambda run: run.training.seconds_per_step,
}


def markdown(runs: Sequence[CaptionResult]) -> str:
    """Mean over seeds with its 95 % interval; costs relative to the first layer of the table."""
    layers = list(dict.fromkeys(run.layer for run in runs))
    of = {layer: [run for run in runs if run.layer == layer] for layer in layers}
    first = runs[0]
    lines = [
        f"{first.num_layers} layers, {first.photo_tokens} photo tokens; {first.training.training_photos} photos to "
        f"train on, {first.photos} to report on ({first.captions} captions); {len(of[layers[0]])} seeds, mean ± "
        "half of the 95 % interval over seeds, all on the same photos. Losses in nats a token.",
        "",
        "| joins layer | " + " | ".join([*COLUMNS, *(f"{name}, of layer {layers[0]}'s" for name in COSTS)]) + " |",
        "|---" * (1 + len(COLUMNS) + len(COSTS)) + "|",
    ]
    for layer in layers:
        cells = []
        for name, (group, system, field) in COLUMNS.items():
            scale = 100 if name.endswith("%") else 1
            mean, low, high = seed_interval(
                [scale * getattr(getattr(run.measured, group)[system], field) for run in of[layer]]
            )
            cells.append(
                f"{mean:.1f} ± {(high - low) / 2:.1f}" if scale == 100 else f"{mean:.3f} ± {(high - low) / 2:.3f}"
            )
        for cost_of in COSTS.values():
            mine, theirs = (sum(cost_of(run) for run in of[one]) for one in (layer, layers[0]))
            cells.append(f"{mine / theirs:.2f}")
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    plain, unigram = (first.measured.losses[name].value for name in ("plain_model", "unigram"))
    lines += [
        "",
        f"Plain language model: {plain:.3f}; unigram: {unigram:.3f}. Own caption among {round(1 / first.chance)}: "
        f"chance {100 * first.chance:.1f} %. {first.cost.trainable_parameters} trainable parameters; layer "
        f"{layers[0]}: {first.cost.training_step_flops / 1e9:.1f} GFLOP and "
        f"{1000 * first.training.seconds_per_step:.0f} ms a step of {first.cost.flops_batch} captions.",
        "",
        "Greedy captions, first seed:",
        "",
    ]
    for number, example in enumerate(first.examples):
        lines.append(f"- {example.id}; a person wrote: {json.dumps(example.own[0])}")
        lines += [f"  - layer {layer}: {of[layer][0].examples[number].caption}" for layer in layers]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
