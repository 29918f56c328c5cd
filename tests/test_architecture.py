"""The layer order of saffe_cache/__init__.py, read from the imports, those inside functions included."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "saffe_cache"

LAYERS = [
    {"core"},
    {"store", "sources", "encoders", "fusion"},
    {"retrieval"},
    {"extraction", "inputs"},
    {"protocols"},
    {"training"},
    {"evaluation"},
    {"studies", "inference"},
    {"verbs"},
    {"report"},
    {"cli"},
    {"__main__"},
]
OWNERS = {
    "zarr": {"store"},
    "h5py": {"store"},
    "numcodecs": {"store"},
    "fsspec": {"store"},
    "obstore": {"store"},
    "datasets": {"sources"},
    "PIL": {"sources"},
    "soundfile": {"sources"},
    "transformers": {"encoders", "fusion"},
    "huggingface_hub": {"encoders", "inference"},
    "tokenizers": {"encoders"},
    "accelerate": {"encoders"},
    "ray": {"extraction"},
    "av": {"sources"},
    "faiss": {"retrieval"},
    "mteb": {"inference"},
    "clip_benchmark": {"inference"},
    "onnxscript": {"inference"},
    "onnxruntime": {"inference"},
    "safetensors": {"core", "encoders", "store", "training"},
    "starlette": {"inference"},
    "uvicorn": {"inference"},
    "jinja2": {"report"},
    "markupsafe": {"report"},
    "matplotlib": {"report"},
    "scipy": {"studies"},
    "sklearn": {"studies"},
}
FORBIDDEN = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The layer's name of a module: its file, or its folder below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layers"
            yield node.module or ""


def level_of(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":  # tests/test_public_names.py
        return
    for name in imports(path):
        if name.startswith("saffe_cache."):
            other = name.split(".")[1]
            assert other == part or level_of(other) < level_of(part), f"{part} imports {other}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_imports_have_one_owner(path: Path) -> None:
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in FORBIDDEN, f"{path}: {top} unpickles"
        assert part_of(path) in OWNERS.get(top, {part_of(path)}), f"{path} imports {top}"


def test_fusions_and_metrics_do_no_io() -> None:
    for path in [
        *(PACKAGE / "fusion").glob("*.py"),
        PACKAGE / "retrieval" / "metrics.py",
    ]:
        names = {name.split(".")[0] for name in imports(path)}
        assert not names & {"pathlib", "os", "io", "json", "zarr", "faiss"}, path


def test_pipelines_use_the_library_and_never_the_reverse() -> None:
    for path in modules():
        assert not {name.split(".")[0] for name in imports(path)} & {"pipelines", "data", "tests"}


def test_no_drawer_for_odds_and_ends() -> None:
    assert not [path for path in modules() if path.stem in {"utils", "helpers", "misc", "common"}]


def test_pages_are_finished() -> None:
    """No place that was to be filled is left open."""
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "pipelines").glob("*.md")]:
        text = path.read_text()
        assert not re.search(r"<!--|\b[A-Z]+_TABLE\b|\bTODO\b", text), path


def test_extraction_configs_import_nothing_heavy() -> None:
    """The help of a command needs its config, and must be printed at once."""
    heavy = {"torch", "transformers", "datasets", "PIL", "zarr", "fsspec", "h5py"}
    code = f"import sys, saffe_cache.extraction.config; print(sorted({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
