"""Prepare clips as transformers' video processors do, bit for bit, without torchvision.

Those classes take three steps from torchvision, whose wheels fit only one build of torch. Here the class of a
checkpoint reads its settings and runs as it is, and torch computes these steps in the same way. Only classes whose
results were compared are used.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension
from transformers.video_processing_utils import VideoProcessorMixin

_MODES = {2: "bilinear", 3: "bicubic"}
"""torch's names of PIL's filters."""


class _TorchSteps:
    """The steps of a video processor that torchvision would compute, on uint8 or float32 [..., channels, height,
    width]."""

    def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
        """Clips are decoded as RGB."""
        return video

    def resize(self, image: torch.Tensor, size: Any, resample: Any = None, **_: Any) -> torch.Tensor:
        if size.shortest_edge and not size.longest_edge:
            options = {"default_to_square": False, "input_data_format": ChannelDimension.FIRST}
            wanted = tuple(get_resize_output_image_size(image, size=size.shortest_edge, **options))
        elif size.height and size.width:
            wanted = (size.height, size.width)
        else:
            raise ValueError(f"its processor resizes to {dict(size)}, expected shortest_edge, or height and width")
        mode = _MODES.get(2 if resample is None else int(resample))
        if mode is None:
            raise ValueError(
                f"its processor resizes with PIL's filter {resample}, expected 2 (bilinear) or 3 (bicubic)"
            )
        if wanted == tuple(image.shape[-2:]):
            return image
        flat = image.reshape(-1, *image.shape[-3:])
        is_cast = flat.dtype == torch.uint8 and not (mode == "bicubic" or _resizes_bytes())
        resized = functional.interpolate(
            flat.float() if is_cast else flat, size=wanted, mode=mode, align_corners=False, antialias=True
        )
        if is_cast:
            resized = resized.round_().to(torch.uint8)
        return resized.reshape(*image.shape[:-2], *wanted)

    def normalize(self, image: torch.Tensor, mean: Any, std: Any, **_: Any) -> torch.Tensor:
        mean, std = (torch.as_tensor(one, dtype=image.dtype).view(-1, 1, 1) for one in (mean, std))
        return image.sub(mean).div_(std)

    def center_crop(self, image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
        """Crop, after padding with black where the image is smaller."""
        height, width = image.shape[-2:]
        across, down = max(0, size.width - width), max(0, size.height - height)
        if across or down:
            image = functional.pad(image, [across // 2, (across + 1) // 2, down // 2, (down + 1) // 2])
            height, width = image.shape[-2:]
        top, left = (height - size.height) // 2, (width - size.width) // 2
        return image[..., top : top + size.height, left : left + size.width]


def _resizes_bytes() -> bool:
    """Whether torchvision lets torch resize bytes bilinearly on this processor, and not float32."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in ("aarch64", "arm64")


def load_video_processor(model_id: str, **options: Any) -> Any:
    """The video processor of a checkpoint, as `AutoVideoProcessor` would find it.

    Raises:
        ValueError: its class was not compared.
        OSError: its settings are missing.
    """
    classes = _classes()
    settings, _ = VideoProcessorMixin.get_video_processor_dict(model_id, **options)
    image_type = settings.pop("image_processor_type", None) or ""
    name = settings.get("video_processor_type") or image_type.replace("ImageProcessor", "VideoProcessor")
    if not name:  # saved before either was recorded
        model_type = transformers.AutoConfig.from_pretrained(model_id, **options).model_type
        name = classes[model_type].__name__ if model_type in classes else f"of a {model_type}"
    kind = next((one for one in classes.values() if one.__name__ == name), None)
    if kind is None:
        raise ValueError(f"found {name}, expected one of {', '.join(one.__name__ for one in classes.values())}")
    own: Any = type(name, (_TorchSteps, kind), {})
    return own.from_dict(settings)


def _classes() -> dict[str, type]:
    """Compared classes, by the type of the models that they are defined for."""
    from transformers.models.timesformer.video_processing_timesformer import TimesformerVideoProcessor
    from transformers.models.videomae.video_processing_videomae import VideoMAEVideoProcessor
    from transformers.models.vivit.video_processing_vivit import VivitVideoProcessor
    from transformers.models.vjepa2.video_processing_vjepa2 import VJEPA2VideoProcessor

    return {
        "vjepa2": VJEPA2VideoProcessor,
        "videomae": VideoMAEVideoProcessor,
        "timesformer": TimesformerVideoProcessor,
        "vivit": VivitVideoProcessor,
    }
