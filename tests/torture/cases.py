"""The commands that are tortured, on tiny encoders and drawn photos, and what each must leave behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from extraction_cases import files_of, make_captioned
from forked import Action, Child, Outcome, ask, preload
from safetensors import safe_open
from store_cases import verify
from tiny_models import save_tiny

import saffe_cache.training.train
from saffe_cache.cli import evaluate_command, extract_command, train_command
from saffe_cache.core.features import CacheError

SPLITS = {"train": 150, "dev": 12, "test": 20}
"""The smallest shard holds 64 photos."""
TIMES = {"seconds", "control_seconds", "peak_memory_mb", "cost"}

Contents = dict[str, Any]
Command = Callable[[Sequence[str]], int]


def nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Case:
    """One command, and the folder that it writes."""

    name: str
    command: Command
    arguments: Sequence[str]
    work: Path
    folder: Path
    """What it writes."""
    contents: Callable[[Path], Contents]
    """All that must be equal after an uninterrupted run, by name."""
    problems: Callable[[Path], list[str]]
    """What is wrong with what counts in the folder, asked of an interrupted run."""
    before: Path | None = None
    """What the folder holds at first."""
    expected: Contents = field(default_factory=dict)
    status: int = 0
    num_bytes: int = 0
    """Of what an uninterrupted run leaves, in whole pages."""
    seconds: float = 0.0
    """Of an uninterrupted run."""

    @property
    def prog(self) -> str:
        return {extract_command: "saffe-extract", train_command: "saffe-train-fam"}.get(
            self.command, "saffe-index-eval"
        )

    def reset(self) -> None:
        """The folder as it is before the command."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.before is not None:
            shutil.copytree(self.before, self.folder)

    def start(self, arrange: Action = nothing) -> Child:
        """The command in a child, with whatever is arranged there before."""

        def action() -> int:
            saffe_cache.training.train._remove_states = _keep_states
            arrange()
            return self.command(self.arguments)

        return Child(action, self.work)

    def run(self, arrange: Action = nothing) -> Outcome:
        return self.start(arrange).wait()

    def damage(self) -> list[str]:
        """What is wrong with what an interrupted run left."""
        found: list[str] = ask(lambda: self.problems(self.folder), self.work)
        return found

    def differences(self) -> list[str]:
        """In what the folder differs from an uninterrupted run's."""
        found = self.contents(self.folder)
        return [name for name in self.expected | found if self.expected.get(name) != found.get(name)]

    def with_reference(self) -> Case:
        """The case, with what an uninterrupted run makes of it."""
        self.reset()
        outcome = self.run()
        if outcome.status not in (0, 3):
            raise RuntimeError(f"{self.name} failed without any fault: {outcome.errors}")
        return replace(
            self,
            expected=self.contents(self.folder),
            status=outcome.status,
            num_bytes=bytes_of(self.folder),
            seconds=outcome.seconds,
        )


def _keep_states(out: Path) -> None:
    """In the place of their removal at a run's end, so that they can be compared too."""
    for path in out.rglob("state.safetensors"):
        path.rename(path.with_name("last-state.safetensors"))


def bytes_of(folder: Path) -> int:
    """Bytes of all files, in whole pages."""
    return sum((path.stat().st_size + 4095) // 4096 * 4096 for path in folder.rglob("*") if path.is_file())


def cache_contents(cache: Path) -> Contents:
    """All files, byte for byte; manifests without their history, which holds times."""
    found: Contents = dict(files_of(str(cache)))
    for path in cache.rglob("zarr.json"):
        name = path.relative_to(cache).as_posix()
        if name not in found:
            content = json.loads(path.read_text())
            content["attributes"].get("saffe_cache", {}).pop("history", None)
            found[name] = content
    return found | _left_over(cache)


def cache_problems(cache: Path) -> list[str]:
    try:
        return verify(cache)[1]
    except CacheError as error:
        return [] if "there is no feature cache" in str(error) else [str(error)]


def output_contents(out: Path) -> Contents:
    """Of a run or a report: all files, byte for byte, but for times."""
    found: Contents = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.name == "last-state.safetensors":
            with safe_open(path, "np") as file:
                numbers = json.loads(file.metadata()["state"])
                found[name] = {key: file.get_tensor(key).tobytes() for key in file.keys()}  # noqa: SIM118
            found[name]["numbers"] = _timeless(numbers)
        elif path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name != "report.txt":
            found[name] = path.read_bytes()
        else:
            found[name] = [line for line in path.read_text().splitlines() if " s," not in line and " MB" not in line]
    return found | _left_over(out)


def output_problems(out: Path) -> list[str]:
    """Files that are there but not whole."""
    found = []
    for path in [*out.rglob("*.safetensors"), *out.rglob("*.json")]:
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            else:
                with safe_open(path, "np") as file:
                    file.keys()
        except Exception as error:
            found.append(f"{path}: {error}")
    return found


def _timeless(content: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in TIMES}


def _left_over(folder: Path) -> Contents:
    """Locks and files under temporary names, of which an ended command leaves none."""
    return {path.relative_to(folder).as_posix(): "left over" for path in folder.rglob(".*")}


def make_cases(work: Path, *, grows: bool) -> dict[str, Case]:
    """Draw the data, make the encoders, and run every command once without a fault.

    `grows`: also an extraction that adds items and a layer, and a training that seldom saves its state.
    """
    models = {"image": work / "models" / "dinov2", "text": work / "models" / "bert"}

    def prepare() -> bool:
        make_captioned(work / "data", SPLITS)
        for folder in models.values():
            save_tiny(folder.name, folder)
        return True

    preload()
    ask(prepare, work)
    first = [
        *("--data", str(work / "data"), "--storage", "float32", "--device", "cpu", "--batch-size", "8"),
        *(part for modality, folder in models.items() for part in ("--encoder", f"{modality}={folder}")),
        *("--shard-mb", "0", "--workers", "2"),
    ]
    both = ["--layers", "image=2,3", "--layers", "text=2,3"]
    fewer = ["--layers", "image=3", "--layers", "text=3", "--max-items", "train=70"]

    def extraction(folder: Path, asked: Sequence[str]) -> Case:
        return Case(
            name="extraction",
            work=work,
            command=extract_command,
            arguments=[*first, *asked, "--cache", str(folder)],
            folder=folder,
            contents=cache_contents,
            problems=cache_problems,
        )

    def reading(name: str, command: Command, folder: Path, *arguments: str) -> Case:
        return Case(
            name=name,
            work=work,
            command=command,
            arguments=["--cache", str(work / "whole.zarr"), "--out", str(folder), "--device", "cpu", *arguments],
            folder=folder,
            contents=output_contents,
            problems=output_problems,
        )

    made = [extraction(work / "cache.zarr", both).with_reference()]
    shutil.copytree(work / "cache.zarr", work / "whole.zarr")
    if grows:
        base = extraction(work / "base.zarr", fewer).with_reference().folder
        growth = replace(extraction(work / "grown.zarr", both), name="growth", before=base)
        made.append(growth.with_reference())
    options = ["--epochs", "2", "--batch-size", "32", "--control-epochs", "1", "--log", "none"]
    run = work / "run"
    made.append(reading("training", train_command, run, *options, "--checkpoint-seconds", "0").with_reference())
    shutil.copytree(run, work / "whole-run")
    if grows:
        made.append(reading("training, seldom saved", train_command, run, *options).with_reference())
    whole = str(work / "whole-run")
    made.append(reading("evaluation", evaluate_command, work / "report", "--run", whole).with_reference())
    return {case.name: case for case in made}
