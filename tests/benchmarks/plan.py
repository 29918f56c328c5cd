"""Time and peak memory of a plan over many files, the first time and again, and of an extraction with nothing to do.

    python tests/benchmarks/plan.py [--files 100000] [--captions 1] [--extract] [--work FOLDER]

Photos are small JPEGs of noise, with captions in SPLIT/metadata.jsonl, and the encoders are tiny, so that what is
measured is listing, hashing and planning. Each run is a process of its own, started as a user would; its processor time
is given besides, because other jobs may be running. The files stay in FOLDER for a later call.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny_models.py

from tiny_models import WORDS, save_tiny

ENCODERS = {"image": "dinov2", "text": "bert"}
SIDE = 48
"""Pixels; a photo has about 1.5 kB."""


def draw(folder: Path, files: int, captions: int) -> Path:
    """Photos with captions. A comment makes each file unlike the others."""
    data = folder / f"data-{files}-{captions}"
    if (data / "train" / "metadata.jsonl").exists():
        return data
    generator = np.random.default_rng(0)
    data.joinpath("train").mkdir(parents=True, exist_ok=True)
    pixels = generator.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    lines = []
    for number in range(files):
        pixels[number % SIDE] = generator.integers(0, 256, (SIDE, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=50, comment=f"photo {number}".encode())
        name = f"{number:06d}.jpg"
        data.joinpath("train", name).write_bytes(file.getvalue())
        texts = [" ".join(generator.choice(WORDS, 10)) + f" {number} {caption}" for caption in range(captions)]
        lines.append(json.dumps({"file_name": name, "captions": texts}))
    data.joinpath("train", "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return data


def run(name: str, folder: Path, *arguments: str) -> None:
    """Run `saffe extract` in a process, and print what it took."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-c",
        "import sys; from saffe_cache.cli import main; sys.exit(main())",
        "extract",
        *arguments,
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name}: status {process.returncode}")
    used = usage.ru_utime + usage.ru_stime
    print(f"{name}: {seconds:.1f} s, processor {used:.1f} s, peak {usage.ru_maxrss / 1024:.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--captions", type=int, default=1)
    parser.add_argument("--extract", action="store_true", help="also extract, and again with nothing to do")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        data = draw(work, options.files, options.captions)
        arguments = ["--data", str(data), "--cache", str(work / "cache.zarr")]
        for kind, name in ENCODERS.items():
            arguments += ["--layers", f"{kind}=1", "--encoder", f"{kind}={save_tiny(name, work / name)}"]
        for stale in ("home", "cache.zarr"):
            shutil.rmtree(work / stale, ignore_errors=True)
        run("plan, first", work, *arguments, "--plan")
        run("plan, again", work, *arguments, "--plan")
        if options.extract:
            run("extract", work, *arguments)
            run("extract, nothing to do", work, *arguments)


if __name__ == "__main__":
    main()
