"""Models that do not fit on one device. The only importer of accelerate.

accelerate places a model's layers on the GPUs, then in this machine's memory, then on its disk. Its hooks bring inputs
and weights to the device that computes a layer. A layer that is not on that device has `meta` tensors between its runs,
so code that reads weights, for blocks and fingerprints, reads them through this module.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers.integrations.accelerate import load_offloaded_parameter


def require_accelerate(where: str) -> None:
    """
    Raises:
        ValueError: it is not installed.
    """
    if find_spec("accelerate") is None:
        raise ValueError(
            f"{where}: --device-map needs the package accelerate. Install it: pip install 'saffe-cache[large]'."
        )


def load_spread(load: Callable[..., tuple[Any, Any]], device_map: str, max_memory: Mapping[str, str]) -> Any:
    """What `from_pretrained` returns for a model that accelerate places.

    Weights that transformers converts while it loads them, as those of experts, go to a temporary folder, which is
    removed with the model; all others are read from the checkpoint.
    """
    limits: dict[int | str, str] = {int(name) if name.isdecimal() else name: one for name, one in max_memory.items()}
    folder = TemporaryDirectory(prefix="saffe-offload-", ignore_cleanup_errors=True)
    try:
        model, info = load(device_map=device_map, max_memory=limits or None, offload_folder=folder.name)
    except BaseException:
        folder.cleanup()
        raise
    weakref.finalize(model, folder.cleanup)
    for part in model.modules():
        if isinstance(part, nn.MultiheadAttention) and hasattr(part.out_proj, "_hf_hook"):
            _bring_output_weights(part)
    return model, info


def _bring_output_weights(attention: nn.MultiheadAttention) -> None:
    """Bring weights of torch's attention that it uses without calling the layer that owns them (SigLIP's pooler)."""
    output: Any = attention.out_proj

    def bring(*_: Any) -> None:
        output._hf_hook.pre_forward(output)

    def take_back(*_: Any) -> None:
        output._hf_hook.post_forward(output, None)

    attention.register_forward_pre_hook(bring)
    attention.register_forward_hook(take_back)


def is_spread(model: nn.Module) -> bool:
    """Whether accelerate's hooks move the model's weights and inputs."""
    places = set(getattr(model, "hf_device_map", {}).values())
    return len(places) > 1 or "disk" in places


def gathered(output: Any, device: str) -> Any:
    """A model's output, or any nest of tensors, on one device."""
    from accelerate.utils import send_to_device

    return send_to_device(output, torch.device(device))


def weights_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the state dict by name, sorted, those on the disk one after the other."""
    for name, value in sorted(model.state_dict().items()):
        yield name, load_offloaded_parameter(model, name) if value.is_meta else value


@contextmanager
def present(model: nn.Module, without: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Keep a model's weights in this machine's memory, except those of some of its parts."""
    if not is_spread(model):
        yield
        return
    from accelerate.utils import align_module_device, has_offloaded_params

    left_out = {id(part) for one in without for part in one.modules()}
    with ExitStack() as stack:
        for part in model.modules():
            if id(part) not in left_out and has_offloaded_params(part):
                stack.enter_context(align_module_device(part, torch.device("cpu")))
        yield
