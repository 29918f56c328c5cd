"""What a sentence-transformers repository adds to its model: prompts, settings of its tokenizer, and its own vector.

`modules.json` lists a chain of modules: the model, a pooling of its tokens, and modules that change the pooled vector
(Dense, LayerNorm, Normalize). The chain is rebuilt here from config files and safetensors, and gives the vector of
sentence-transformers' own `encode`. Modules that are not known are refused by name. Nothing is unpickled, and no code
of a repository is run.

A plain mean or first token, also with Normalize behind it, is not normalized: only directions matter here, and caches
made before other chains were supported stay valid.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import normalizers
from torch import nn
from torch.nn import functional

from saffe_cache.encoders.families import Family, first_token, masked_mean
from saffe_cache.encoders.loading import EncoderRequest, longest_text, repository_file, repository_text

logger = logging.getLogger(__name__)

_SETTINGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Files with the settings of the Transformer module; later names are of early releases."""
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Flags of releases before 5.4, in the order in which several are concatenated."""
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid", "LeakyReLU", "ELU", "SELU", "Mish", "Softplus")
"""Of torch.nn, made without arguments, as the repository's config has none."""
_HARMLESS = {"add_pooling_layer", "attn_implementation", "dtype", "torch_dtype"}
"""Arguments of the model's class that leave its numbers as they are, or that options of the extraction set."""
_WITHOUT_PROMPT = ("hkunlp/instructor-base", "hkunlp/instructor-large", "hkunlp/instructor-xl")
"""Models whose config lacks `include_prompt: false`."""


def _first(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tokens[torch.arange(len(tokens), device=tokens.device), mask.int().argmax(dim=1)]


def _last(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return tokens[torch.arange(len(tokens), device=tokens.device), (mask * positions).argmax(dim=1)]


def _max(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tokens.masked_fill(mask[..., None] == 0, -torch.inf).amax(dim=1)


def _weighted(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (tokens * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)


def _by_position(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weights 1, 2, 3, ... from the first token of the prompt, also if that is left out."""
    return _weighted(tokens, mask * torch.arange(1.0, mask.shape[1] + 1, device=mask.device))


def _by_root(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (tokens * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1e-9).sqrt()


_POOLS: Mapping[str, tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "cls": ("first token", _first),
    "max": ("maximum of tokens", _max),
    "mean": ("mean of tokens", _weighted),
    "mean_sqrt_len_tokens": ("sum of tokens over the root of their number", _by_root),
    "weightedmean": ("mean of tokens weighted by position", _by_position),
    "lasttoken": ("last token", _last),
}
"""A name for people, and (tokens [batch, tokens, d], mask [batch, tokens] of 0 and 1) -> [batch, d]."""
_PLAIN = {"mean": masked_mean, "cls": first_token}


class _RefusedError(Exception):
    """(what was found, what was expected); becomes a ValueError that names the model."""


class Dense(nn.Module):
    """A linear layer with an activation, and with a residual connection if its config says so."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        sizes = int(config["in_features"]), int(config["out_features"])
        self.linear = nn.Linear(*sizes, bias=bool(config.get("bias", True)))
        self.activation = getattr(nn, _activation(config))()
        self.adds_input = bool(config.get("use_residual"))
        if self.adds_input and sizes[0] != sizes[1]:
            self.residual = nn.Linear(*sizes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, in_features] -> [batch, out_features]."""
        out: torch.Tensor = self.activation(self.linear(x))
        if self.adds_input:
            out = out + (self.residual(x) if hasattr(self, "residual") else x)
        return out

    @staticmethod
    def described(config: Mapping[str, Any]) -> str:
        """For the fingerprint, all that its weights do not say."""
        residual = ", added to its input" if config.get("use_residual") else ""
        return f"Dense {config['in_features']} to {config['out_features']} ({_activation(config)}{residual})"


def _activation(config: Mapping[str, Any]) -> str:
    """Name of a Dense's activation in torch.nn.

    Raises:
        _RefusedError: it is another one.
    """
    path = str(config.get("activation_function") or "torch.nn.Tanh")
    name = path.rsplit(".", 1)[-1]
    if not path.startswith("torch.nn.") or name not in _ACTIVATIONS:
        raise _RefusedError(f"a Dense with activation {path}", f"one of torch.nn: {', '.join(_ACTIVATIONS)}")
    return name


class _Normalize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.normalize(x, dim=-1)


def _layer_norm(config: Mapping[str, Any]) -> nn.Module:
    return nn.Sequential(OrderedDict(norm=nn.LayerNorm(int(config["dimension"]))))


_Config = Mapping[str, Any]
_STEPS: Mapping[str, tuple[Callable[[_Config], nn.Module], Callable[[_Config], str]]] = {
    "Dense": (Dense, Dense.described),
    "LayerNorm": (_layer_norm, lambda config: "LayerNorm"),
    "Normalize": (lambda config: _Normalize(), lambda config: "unit length"),
}
"""Modules behind the pooling, with the library's names of weights, and their descriptions for the fingerprint."""


class SentenceVector(nn.Module):
    """A family's `pool`: pooling of tokens, then the modules behind it, in float32."""

    def __init__(
        self,
        modes: Sequence[str],
        steps: Sequence[nn.Module],
        *,
        hidden_size: int,
        num_prompt_tokens: int = 0,
        truncate_dim: int | None = None,
    ) -> None:
        """
        Args:
            modes: names in `_POOLS`; their vectors are concatenated.
            steps: modules behind the pooling.
            hidden_size: width of the model's tokens.
            num_prompt_tokens: tokens at the start of every text that are not pooled.
            truncate_dim: only these first numbers of the result are kept; None for all.
        """
        super().__init__()
        self.modes, self.num_prompt_tokens, self.truncate_dim = tuple(modes), num_prompt_tokens, truncate_dim
        self.steps = nn.Sequential(*steps)
        with torch.no_grad():
            self.size = self.steps(torch.zeros(1, len(modes) * hidden_size))[:, :truncate_dim].shape[1]

    def forward(self, output: Any, mask: torch.Tensor | None) -> torch.Tensor:
        """[batch, size of the vector]."""
        tokens = output.last_hidden_state.float()
        kept = tokens.new_ones(tokens.shape[:2]) if mask is None else mask.float()
        kept[:, : self.num_prompt_tokens] = 0
        pooled = torch.cat([_POOLS[mode][1](tokens, kept) for mode in self.modes], dim=-1)
        vector: torch.Tensor = self.steps(pooled)[:, : self.truncate_dim]
        return vector


@dataclass(frozen=True, kw_only=True)
class Repository:
    """What a text encoder's repository says in the files of sentence-transformers. Made by `read_repository`."""

    request: EncoderRequest
    """With the prompt, and the folder of the model within the repository."""
    modules: tuple[tuple[str, str], ...]
    """Kinds and folders of all modules; empty without modules.json."""
    settings: Mapping[str, Any]
    """Of the Transformer module."""
    truncate_dim: int | None

    def apply(self, family: Family, model: Any, tokenizer: Any) -> Family:
        """Change the tokenizer as the settings say, and return the family with the repository's own vector.

        Raises:
            ValueError: the chain of modules is not supported, or its files are missing or damaged.
        """
        self._set_tokenizer(tokenizer)
        if not self.modules:
            return family
        try:
            if self.modules[0][0] == "CLIPModel" or _makes_vector(self.settings):
                return self._projected(family)
            return self._with_chain(family, model, tokenizer)
        except _RefusedError as error:
            raise ValueError(_refusal(self.request.where, error)) from None

    def _set_tokenizer(self, tokenizer: Any) -> None:
        limit = self.settings.get("max_seq_length")
        if limit:
            tokenizer.model_max_length = int(limit)
        if self.settings.get("do_lower_case"):
            backend = tokenizer.backend_tokenizer
            ours = [backend.normalizer] if backend.normalizer else []
            if not ours or ours[0].normalize_str("ABC") != "abc":
                backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *ours])

    def _projected(self, family: Family) -> Family:
        """The family as it is, whose projection is the repository's vector (CLIP)."""
        others = {kind for kind, _ in self.modules[1:]} - {"Normalize"}
        if others or not (family.projection or family.core == "get_text_features"):
            raise _RefusedError(
                f"a model that makes the vector itself, then {sorted(others) or 'nothing'}", "a projection (CLIP) alone"
            )
        return family

    def _with_chain(self, family: Family, model: Any, tokenizer: Any) -> Family:
        _check_settings(self.settings)
        if self.request.position_offset:
            raise _RefusedError(f"--position-offset {self.request.position_offset}", "0 with its own pooling")
        kinds = [kind for kind, _ in self.modules]
        if family.core == "get_text_features":
            raise _RefusedError(f"modules {', '.join(kinds)} of a model with its own text features", "no Pooling")
        if kinds[1:2] != ["Pooling"]:
            raise _RefusedError(f"modules {', '.join(kinds)}", "a Pooling behind the Transformer")
        inner, pooling = model.config.get_text_config(), self._config(self.modules[1][1])
        modes = _modes(pooling)
        excludes = not pooling.get("include_prompt", True) or self.request.model_id in _WITHOUT_PROMPT
        num_prompt_tokens = self._prompt_tokens(model, tokenizer) if excludes else 0
        # a language model's texts get begin and end tokens here, which sentence-transformers does not add
        family = replace(family, projection=None, language_model={}, is_language_model=False)
        is_plain = len(modes) == 1 and modes[0] in _PLAIN and not num_prompt_tokens and self.truncate_dim is None
        if is_plain and set(kinds[2:]) <= {"Normalize"}:
            return replace(family, pool=_PLAIN[modes[0]], pooling=_POOLS[modes[0]][0])
        steps, described = zip(*(self._step(*one) for one in self.modules[2:]), strict=True) if kinds[2:] else ((), ())
        with self.request.explained("its modules do not fit together", "Download it again."):
            vector = SentenceVector(
                modes,
                steps,
                hidden_size=int(getattr(inner, "hidden_size", 0) or inner.d_model),
                num_prompt_tokens=num_prompt_tokens,
                truncate_dim=self.truncate_dim,
            )
        pooled = " + ".join(_POOLS[mode][0] for mode in modes) + (", without the prompt's" if num_prompt_tokens else "")
        cut = [f"first {self.truncate_dim} numbers"] if self.truncate_dim else []
        return replace(family, pool=vector, pooling=", then ".join([pooled, *described, *cut]))

    def _step(self, kind: str, folder: str) -> tuple[nn.Module, str]:
        """A module behind the pooling, with its weights, and its description."""
        config = self._config(folder, required=kind != "Normalize")
        names = {config.get(name) or "sentence_embedding" for name in ("module_input_name", "module_output_name")}
        if names != {"sentence_embedding"}:
            raise _RefusedError(f"a {kind} of {', '.join(sorted(names))}", f"a {kind} of sentence_embedding")
        make, describe = _STEPS[kind]
        if kind == "Dense":
            _activation(config)
        damaged = f"its {folder} cannot be read"
        with self.request.explained(damaged, "Download it again."):
            step, description = make(config), describe(config)
            path = repository_file(self.request, _below(folder, "model.safetensors"))
        if list(step.parameters()) and path is None:
            raise ValueError(
                f"{self.request.where}: found no {folder}/model.safetensors. If the folder has a pytorch_model.bin, "
                "which can run code and is not read, and you trust it, convert it: "
                "sentence_transformers.SentenceTransformer(FOLDER).save(NEW_FOLDER)."
            )
        with self.request.explained(damaged, "Download it again."):
            weights = load_file(path) if path else {}
            step.load_state_dict({name: values.float() for name, values in weights.items()})
        return step, description

    def _config(self, folder: str, *, required: bool = True) -> dict[str, Any]:
        name = _below(folder, "config.json")
        with self.request.explained(f"its {name} cannot be read", "Download it again."):
            text = repository_text(self.request, name)
            config: dict[str, Any] = json.loads(text or "{}")
        if text is None and required:
            raise ValueError(f"{self.request.where}: found no {name}, which modules.json needs. Download it again.")
        return config

    def _prompt_tokens(self, model: Any, tokenizer: Any) -> int:
        """Tokens of the prompt before the text, with the tokenizer's own at the start.

        Raises:
            ValueError: no token remains for the text.
        """
        prompt, config = self.request.text_template.split("{}")[0], model.config.get_text_config()
        limit = longest_text(self.request, tokenizer, model, config)
        if not prompt or limit is None:
            return 0
        ids = tokenizer(prompt, truncation=True, max_length=limit)["input_ids"]
        count = len(ids) - (ids[-1] in tokenizer.all_special_ids)
        if count >= limit - 1:
            raise ValueError(
                f"{self.request.where}: its prompt {prompt!r} takes {count} tokens, --max-length {limit} leaves none "
                "for the text. Choose a larger one, or another --prompt."
            )
        return count


def read_repository(request: EncoderRequest) -> Repository:
    """Read what the repository of a text encoder says, and choose its prompt.

    Raises:
        ValueError: its files are damaged, it has no prompt of the name, or a module that is not supported.
    """
    where = request.where
    with request.explained("found no model", "Use a hub id or a folder with config.json."):
        text = repository_text(request, "modules.json")
    with request.explained("its modules.json cannot be read", "Download it again."):
        listed = json.loads(text or "[]")
        modules = tuple((_kind(str(one["type"])), str(one["path"])) for one in listed)
    try:
        _check_modules(modules)
    except _RefusedError as error:
        raise ValueError(_refusal(where, error)) from None
    modules = tuple(one for one in modules if one[0] != "Dropout")  # encoders are frozen
    folder = modules[0][1] if modules else ""
    name = "config_sentence_transformers.json"
    with request.explained(f"its {name} cannot be read", "Download it again."):
        config = json.loads(repository_text(request, name) or "{}")
        prompts = {str(key): str(text or "") for key, text in (config.get("prompts") or {}).items()}
        default = config.get("default_prompt_name")
        if default:
            prompts[default]
        texts = (repository_text(request, _below(folder, one)) for one in _SETTINGS[: 7 if modules else 1])
        settings = json.loads(next((text for text in texts if text), "{}"))
        truncate_dim = config.get("truncate_dim")
    return Repository(
        request=replace(request, prompt=_choose_prompt(where, request, prompts, default), subfolder=folder),
        modules=modules,
        settings=settings,
        truncate_dim=int(truncate_dim) if truncate_dim else None,
    )


def _choose_prompt(where: str, request: EncoderRequest, prompts: Mapping[str, str], default: str | None) -> str:
    """The prompt as a template with {} for the text: the request's, the one that it names, or the default."""
    if request.prompt is not None:
        return request.prompt
    name = request.prompt_name or default
    if name and name not in prompts:
        known = ", ".join(sorted(prompts)) or "none"
        raise ValueError(
            f"{where}: found --prompt-name {name}, expected one of its prompts ({known}). Choose one of them, or write "
            "the prompt itself with --prompt."
        )
    prompt = prompts[name] if name else ""
    if "{}" in prompt:
        raise ValueError(f"{where}: its prompt {name} is {prompt!r}, expected one without {{}}. Use --prompt.")
    if prompt:
        logger.warning("%s: its prompt %s, %r, is put before every text. --prompt sets another.", where, name, prompt)
    elif named := sorted(one for one, text in prompts.items() if text and not name):
        logger.warning("%s: no prompt is put before texts; --prompt-name chooses one of %s.", where, ", ".join(named))
    return prompt + "{}"


def _below(folder: str, name: str) -> str:
    return str(PurePosixPath(folder) / name)


def _kind(path: str) -> str:
    """The class of a module of sentence-transformers; the whole path of any other, which is not supported."""
    return path.rsplit(".", 1)[-1] if path.startswith("sentence_transformers.") else path


def _check_modules(modules: Sequence[tuple[str, str]]) -> None:
    """
    Raises:
        _RefusedError: a module is not supported there.
    """
    if not modules:
        return
    kinds = [kind for kind, _ in modules]
    expected = f"a Transformer, a Pooling, and behind them only {', '.join(_STEPS)} or Dropout"
    if kinds[0] not in ("Transformer", "CLIPModel"):
        raise _RefusedError(f"{kinds[0]} as first module", expected)
    others = [
        kind
        for kind in kinds[1:]
        if kind not in {*_STEPS, "Dropout"} and not (kind == "Pooling" and kinds.index(kind) == 1)
    ]
    if others or kinds.count("Pooling") > 1:
        raise _RefusedError(f"modules {', '.join(kinds)}", expected)
    for _, folder in modules:
        if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
            raise _RefusedError(f"a module in {folder!r}", "one in the repository")


def _makes_vector(settings: Mapping[str, Any]) -> bool:
    """Whether the Transformer itself makes the text's vector, by the projection of its model."""
    text = (settings.get("modality_config") or {}).get("text") or {}
    return settings.get("module_output_name") == "sentence_embedding" and text.get("method") == "get_text_features"


def _check_settings(settings: Mapping[str, Any]) -> None:
    """
    Raises:
        _RefusedError: the Transformer runs in a way that is not supported.
    """
    task = settings.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise _RefusedError(f"transformer_task {task}", "feature-extraction")
    usual = {"method": "forward", "method_output_name": "last_hidden_state"}
    text = (settings.get("modality_config") or {"text": usual}).get("text")
    if text is None or {name: text.get(name) for name in usual} != usual:
        raise _RefusedError(f"texts by {text}", f"by {usual}")
    for name in ("model", "config", "tokenizer", "processor"):
        found = {**(settings.get(f"{name}_args") or {}), **(settings.get(f"{name}_kwargs") or {})}
        if found.keys() - _HARMLESS:
            raise _RefusedError(f"{name} arguments {found}", "none")
    processing = settings.get("processing_kwargs") or {}
    if processing.get("text") or processing.get("common"):
        raise _RefusedError(f"processing_kwargs {processing}", "none for texts")


def _modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Modes of a Pooling's config, of any release.

    Raises:
        _RefusedError: a mode is not known.
    """
    found = config.get("pooling_mode")
    if found is None:
        found = [mode for flag, mode in _OLD_MODES.items() if config.get(flag)] or ["mean"]
    modes = tuple(found.split("+") if isinstance(found, str) else map(str, found))
    unknown = [mode for mode in modes if mode not in _POOLS]
    if unknown:
        raise _RefusedError(f"pooling by {', '.join(unknown)}", f"one of {', '.join(_POOLS)}")
    return modes


def _refusal(where: str, error: _RefusedError) -> str:
    found, expected = error.args
    return f"{where}: found {found}, expected {expected}. Choose another encoder."
