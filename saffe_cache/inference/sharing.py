"""Exchange runs as folders or by the Hugging Face hub. Nothing is unpickled, and no code of a repository runs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from saffe_cache.core.atomic_io import write_whole
from saffe_cache.core.outputs import CONFIG, RESULT, read_json, write_json
from saffe_cache.inference.card import evaluations_of, model_card
from saffe_cache.training.runs import BLOCKS, ENCODERS, MODEL, RIDGE, name_of_place

if TYPE_CHECKING:
    from saffe_cache.inference.model import TrainedFusion

CARD = "README.md"
_FILES = (CONFIG, MODEL, ENCODERS, BLOCKS, RIDGE, RESULT)
"""What embedding needs of a run."""


def fetched_run(run: str | Path, revision: str | None = None) -> Path:
    """The folder of a run: a local one, or a copy of its repository on the hub.

    Raises:
        ValueError: there is neither.
    """
    folder = Path(run).expanduser()
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(run)):
        return folder
    try:
        wanted = [*_FILES, f"*/{RESULT}"]
        return Path(snapshot_download(str(run), revision=revision, allow_patterns=wanted))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        line = " ".join(str(error).split())
        raise ValueError(
            f"--run {run}: found no such folder, and no such repository on the hub ({line:.200}). Give the folder that "
            "saffe train wrote, or OWNER/NAME."
        ) from None


def save_run(fam: TrainedFusion, folder: Path, encoders: Mapping[str, str], name: str) -> None:
    """Write a run's files, without paths of this machine, and its model card.

    Args:
        encoders: the hub id of an encoder that was a local folder, by modality.
        name: what the card loads the run by.

    Raises:
        ValueError: the folder is not empty, or a modality is none of the run's.
        OSError: the disk is full or gone.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"save_pretrained: {folder} is not empty. Choose a new folder.")
    described = _with_public_places(read_json(fam.folder / ENCODERS), encoders)
    folder.mkdir(parents=True, exist_ok=True)
    for file in (MODEL, BLOCKS, RIDGE):
        if (fam.folder / file).exists():
            shutil.copyfile(fam.folder / file, folder / file)
    write_json(folder / ENCODERS, described)
    config = read_json(fam.folder / CONFIG)
    options = {key: value for key, value in config.get("config", {}).items() if key not in ("cache", "out")}
    options["encoder"] = {key: name_of_place(place) for key, place in options.get("encoder", {}).items()}
    write_json(folder / CONFIG, {**config, "config": options})
    for place, result in evaluations_of(fam.folder).items():
        result.save(folder / place)
    write_whole(folder / CARD, model_card(fam, described, options, name).encode())
    shutil.copyfile(fam.folder / RESULT, folder / RESULT)  # last: it marks the run as complete


def push_run(fam: TrainedFusion, repository: str, work: Path, **options: Any) -> str:
    """Upload a run to a repository on the hub, which is made if it does not exist; returns its address.

    Args:
        repository: OWNER/NAME.
        work: an empty folder to write to.
        options: `encoders` as of `save_run`; `private`, `token` and `commit_message` as of huggingface_hub.

    Raises:
        HfHubHTTPError: the hub refuses it.
    """
    save_run(fam, work, options.get("encoders") or {}, repository)
    api = HfApi(token=options.get("token"))
    address = api.create_repo(repository, private=options.get("private"), exist_ok=True)
    message = options.get("commit_message") or "Upload a fusion of frozen encoders"
    api.upload_folder(repo_id=repository, folder_path=work, commit_message=message, delete_patterns=[f"*/{RESULT}"])
    return str(address)


def _with_public_places(described: Mapping[str, Any], encoders: Mapping[str, str]) -> dict[str, Any]:
    """The description of a run's encoders without paths of this machine."""
    modalities = [one["manifest"]["modality"] for one in described.values()]
    unknown = sorted(set(encoders) - set(modalities))
    if unknown:
        raise ValueError(f"encoders: found {unknown[0]}, expected {' or '.join(modalities)}.")
    found = {}
    for (key, one), modality in zip(described.items(), modalities, strict=True):
        past = one["extraction"]
        if past is not None:
            place = encoders.get(modality) or name_of_place(past["encoder"][modality])
            past = {**past, "encoder": {modality: place}}
        found[key] = {**one, "extraction": past}
    return found
