"""Tiny timm checkpoints, in the folders that timm itself writes for the hub.

timm imports torchvision, whose compiled part may not load beside the installed torch. Its Python part does once the
two operators that it registers fakes for are declared. `import_timm` does that; where torchvision lies in a folder of
its own, transformers, which looked for it before, goes on without it.

    python tests/zoo_timm.py OUT [--torchvision FOLDER] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

_VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "timm_vit_reg4": ("vit_small_patch14_reg4_dinov2", {**_VIT, "img_size": 28}),
    "timm_vit_siglip": ("vit_base_patch16_siglip_224", {**_VIT, "img_size": 32}),
    "timm_deit3": ("deit3_small_patch16_224", {**_VIT, "img_size": 32}),
    "timm_eva02": ("eva02_tiny_patch14_224", {**_VIT, "img_size": 28}),
    "timm_beit": ("beit_base_patch16_224", {**_VIT, "img_size": 32}),
    "timm_swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "embed_dim": 16, "depths": [2, 1, 1], "num_heads": [2, 2, 4], "window_size": 2},
    ),
    "timm_convnext": ("convnext_atto", {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}),
    "timm_resnet": ("resnet18", {"layers": [2, 1, 1, 1], "channels": [8, 16, 24, 32], "stem_width": 8}),
}
"""Architecture and arguments of each checkpoint."""


def declare_operators() -> None:
    """Declare the operators that torchvision's Python part registers fakes for, unless its compiled part has."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou) -> Tensor")


def import_timm(torchvision: Path | None = None) -> Any:
    """The timm module, with torchvision's Python part from this folder where none is installed."""
    if "timm" not in sys.modules:
        from transformers.utils import is_torchvision_available

        is_torchvision_available()  # remembered by transformers before the folder is added
        if torchvision is not None:
            sys.path.append(str(torchvision))
        declare_operators()
    return importlib.import_module("timm")


def save(name: str, folder: Path, torchvision: Path | None = None) -> None:
    """Write the checkpoint: config.json with the architecture and its preprocessing, and model.safetensors."""
    from zoo import randomize

    timm = import_timm(torchvision)
    architecture, arguments = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, **arguments)
    randomize(model, seed=sum(name.encode()))
    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] = arguments  # timm's own adds what transformers' wrapper then passes twice
    config["pretrained_cfg"]["input_size"] = [3, *2 * [arguments.get("img_size", 32)]]
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def main(arguments: list[str] | None = None) -> None:
    """Write the checkpoints, all or those named, each to a folder of its name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the checkpoints")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--torchvision", type=Path, help="folder with torchvision's Python part")
    options = parser.parse_args(arguments)
    for name in options.only:
        save(name, options.out / name, options.torchvision)


if __name__ == "__main__":
    main()
