"""An encoder of the user's own, in the form of a discovered one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.image_transforms import to_pil_image

from saffe_cache.core.features import Modality
from saffe_cache.encoders.families import Family


@dataclass(frozen=True, kw_only=True)
class OwnEncoder:
    """An encoder of photos or sounds of your own, for `extract(encoder={"image": OwnEncoder(...)}, ...)`.

    Its hidden states and its vector work with every fusion that needs no blocks. Blocks are refused, because nothing
    can rebuild your class from the cache.
    """

    model: nn.Module
    """Called with a batch of prepared inputs. It is put into evaluation mode, and its weights are frozen."""
    prepare: Callable[[Any], torch.Tensor]
    """A picture of PIL, or a sound as float32 [samples], to a tensor of one shape, without an axis for the batch."""
    layers: str
    """Path of the ModuleList or Sequential of the layers, such as "blocks". Each takes hidden states first."""
    pool: Callable[[Any], torch.Tensor] | None = None
    """Makes the vector of each input, [batch, d], of what the model returns. None: the mean over the tokens of what it
    returns, or of the first of its results."""
    sampling_rate: int | None = None
    """Rate in Hz of the sounds that it takes."""
    name: str = ""
    """Name in the cache. Default: the model's class."""

    def adapted(self, modality: Modality) -> tuple[OwnModel, Family]:
        """The model and its description, in the form of discovered ones.

        Raises:
            ValueError: it has no such layers, or takes texts.
        """
        where = f"{modality} encoder of class {type(self.model).__name__}"
        if modality == "text":
            raise ValueError(f"{where}: found an own encoder of texts, expected one of images or audio. Omit it.")
        if not isinstance(dict(self.model.named_modules()).get(self.layers), (nn.ModuleList, nn.Sequential)):
            lists = [path for path, part in self.model.named_modules() if path and isinstance(part, nn.ModuleList)]
            raise ValueError(
                f"{where}: found no list of modules {self.layers!r}, expected the path of its layers, such as one of "
                f"{lists}. Correct `layers`."
            )
        layers = f"module.{self.layers}"
        return OwnModel(self.model), Family(
            modality=modality,
            model_class=type(self.model).__name__,
            load_options={},
            layers=layers,
            layer_lists=(layers,),
            core="",
            block={},
            pool=self._vector,
            pooling=f"own: {getattr(self.pool, '__qualname__', 'pool')}" if self.pool else "mean of tokens",
            norm_first=True,
            is_discovered=True,
            is_own=True,
        )

    def _vector(self, output: Any, mask: torch.Tensor | None) -> torch.Tensor:
        if self.pool:
            return self.pool(output)
        tokens: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
        return tokens.flatten(1, -2).mean(dim=1) if tokens.ndim > 2 else tokens


class OwnModel(nn.Module):
    """A module with what is asked of a transformers model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.config = SimpleNamespace(model_type="own", _attn_implementation=None)

    @property
    def dtype(self) -> torch.dtype:
        return next((one.dtype for one in self.parameters()), torch.float32)

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.module(inputs)


class OwnProcessor:
    """A callable with what is asked of a transformers processor."""

    def __init__(self, own: OwnEncoder) -> None:
        self._prepare, self.sampling_rate = own.prepare, own.sampling_rate

    def __call__(self, sounds: Any = (), images: Any = (), **_: Any) -> Mapping[str, torch.Tensor]:
        pictures = [to_pil_image(one) if isinstance(one, np.ndarray) else one for one in images]
        return {"inputs": torch.stack([self._prepare(one) for one in (*sounds, *pictures)])}

    def to_dict(self) -> dict[str, Any]:
        """For the fingerprint; what the callable does cannot be seen, so its name stands for it."""
        return {"prepare": getattr(self._prepare, "__qualname__", type(self._prepare).__name__)}
