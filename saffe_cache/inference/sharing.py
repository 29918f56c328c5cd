"""Exchange runs by the Hugging Face hub. Nothing is unpickled, and no code of a repository runs."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from saffe_cache.core.outputs import CONFIG, RESULT
from saffe_cache.training.runs import BLOCKS, ENCODERS

FILES = (CONFIG, "model.safetensors", ENCODERS, BLOCKS, RESULT)
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
        return Path(snapshot_download(str(run), revision=revision, allow_patterns=list(FILES)))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        line = " ".join(str(error).split())
        raise ValueError(
            f"--run {run}: found no such folder, and no such repository on the hub ({line:.200}). Give the folder that "
            "saffe train wrote, or OWNER/NAME."
        ) from None
