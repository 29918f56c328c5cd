"""50 clients at once on `saffe serve`: all must be answered, and its memory must stay flat.

    python tests/benchmarks/serve_load.py INDEX --seconds 60

Starts the server on a free port. Each client sends one request after another: texts, photos, both systems side by side,
more like this, thumbnails and heat maps, as a browser with many users does. Prints requests a second, latencies, and
the server's resident memory after a third of the time and at the end; exits with status 1 if a request fails or the
memory grows by more than a tenth in between.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_GROWTH = 0.1
_WORDS = ("a dog on grass", "two red circles", "a blue square left of a heart", "people at the sea", "a yellow moon")


@dataclass
class Load:
    """What the clients saw."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    memory_mb: list[float] = field(default_factory=list)

    @property
    def num_answers(self) -> int:
        return sum(map(len, self.seconds.values()))

    @property
    def growth(self) -> float:
        """Of the memory, from the second third of the time to the last; medians."""
        third = max(1, len(self.memory_mb) // 3)
        before, after = self.memory_mb[third : 2 * third], self.memory_mb[-third:]
        return statistics.median(after) / statistics.median(before) - 1

    def lines(self, wall: float) -> Iterator[str]:
        rate = self.num_answers / wall
        yield f"{self.num_answers} answers in {wall:.0f} s ({rate:.1f}/s), {self.failures.total()} failures"
        yield from (f"  failed: {what}, {count} times" for what, count in self.failures.items())
        for kind, seconds in sorted(self.seconds.items()):
            cuts = statistics.quantiles(seconds, n=100) if len(seconds) > 1 else seconds * 99
            times = f"median {cuts[49]:6.2f} s  95 % {cuts[94]:6.2f} s  99 % {cuts[98]:6.2f} s"
            yield f"  {kind:10} {len(seconds):6}  {times}"
        third = len(self.memory_mb) // 3
        yield f"  memory: {self.memory_mb[third]:.0f} MB after a third, {self.memory_mb[-1]:.0f} MB at the end"
        yield f"  growth between the last two thirds {100 * self.growth:+.1f} %"


@contextmanager
def started(index: str, *options: str) -> Iterator[tuple[int, int]]:
    """A server's process id and port."""
    code = "import sys; from saffe_cache.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", index, "--port", "0", *options]
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, env={**os.environ, "PYTHONPATH": paths})
        try:
            yield process.pid, _port(process, log)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def _port(process: subprocess.Popen[bytes], log: Any) -> int:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        text = os.pread(log.fileno(), 2**16, 0).decode()
        if found := re.search(r"Open http://[\d.]+:(\d+)/", text):
            return int(found[1])
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {text}")
        time.sleep(0.1)
    raise RuntimeError("the server does not start")


def run_load(pid: int, port: int, seconds: float, clients: int = 50) -> Load:
    """Send requests from many clients for some seconds; every request that was begun is waited for."""
    load, lock = Load(), threading.Lock()
    about = _ask(port, "GET", "/api/index")[1]
    systems = "fusion" if about["no_ridge"] else "fusion,ridge"
    hits = _ask(port, "POST", "/api/search?text=photos&k=100")[1]["systems"]["fusion"]
    keys = [hit["key"] for hit in hits]
    photo = _ask(port, "GET", f"/api/thumbnail?id={keys[0]}&size=large")[1]
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        draw = random.Random(number)
        requests: dict[str, Any] = {
            "text": lambda: ("POST", f"/api/search?systems={systems}&text={draw.choice(_WORDS).replace(' ', '+')}"),
            "photo": lambda: ("POST", f"/api/search?systems={systems}", photo),
            "like": lambda: ("GET", f"/api/like?id={draw.choice(keys)}"),
            "thumbnail": lambda: ("GET", f"/api/thumbnail?id={draw.choice(keys)}"),
            "page": lambda: ("GET", "/"),
        }
        if not about["no_heat_map"]:
            requests["heat map"] = lambda: ("GET", f"/api/heatmap?id={draw.choice(keys)}")
        while time.monotonic() < end:
            kind = draw.choice(list(requests))
            begun = time.perf_counter()
            try:
                status = _ask(port, *requests[kind]())[0]
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
            with lock:
                if status == 200:
                    load.seconds.setdefault(kind, []).append(time.perf_counter() - begun)
                else:
                    load.failures[str(status)] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        load.memory_mb.append(_memory_mb(pid))
        time.sleep(min(0.5, seconds / 30))
    for thread in threads:
        thread.join()
    return load


def _ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[Any, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        content = answer.read()
        is_json = answer.getheader("content-type") == "application/json"
        return answer.status, json.loads(content) if is_json else content
    finally:
        connection.close()


def _memory_mb(pid: int) -> float:
    """Resident memory, without pages of mapped files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", help="folder of an index")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=50)
    arguments = parser.parse_args()
    with started(arguments.index) as (pid, port):
        begun = time.monotonic()
        load = run_load(pid, port, arguments.seconds, arguments.clients)
        print(*load.lines(time.monotonic() - begun), sep="\n")
    return 1 if load.failures or load.growth > MOST_GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
