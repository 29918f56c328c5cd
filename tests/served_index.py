"""A search page over a few drawn photos that needs no encoder, and a client that sends it any request."""

from __future__ import annotations

import http.client
import io
import json
import threading
import time
import wave
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from saffe_cache.core.features import NOUNS, Modality
from saffe_cache.inference.server import listen, make_app, make_server
from saffe_cache.sources.decoding import decode

HOSTILE = {
    "test/<script>alert(1)</script>.png": "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>",
    "test/\"><svg onload=alert(1)>'.png": "&lt;b&gt; \"quotes\" 'and' `more` </textarea></style></script> ${1+1}",
    "test/\u202egnp.txt": "שלום עולם \u202eright to left\u202c مرحبا",
    "test/" + "long" * 200 + ".png": "endless" * 400,
    "test/a b+c&d=e?f#g%2F..%2F%00.png": "\x00\x07 control\x1b[31m characters",
    "../../../../etc/passwd": "climbs",
    "test/\udcff\udc80.png": "a name of bytes that are no UTF-8 \udcff",
    "": "no name",
}


BOUNDARY = "----a-boundary"


class Hit(NamedTuple):
    id: str
    score: float
    text: str


@dataclass
class FakeIndex:
    """Vectors that follow from the bytes of a text and of files."""

    texts: Mapping[str, str]
    no_ridge: str = ""
    no_heat_map: str = ""
    takes_both: bool = True
    composes: bool = False
    modality: Modality = "image"
    takes: tuple[Modality, ...] = ()
    """Media of which a query may have files; by default, the items' own."""
    delay_seconds: float = 0
    asked: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names = list(self.texts)
        self.vectors = np.random.default_rng(0).standard_normal((2, len(self.names), 64)).astype(np.float32)

    @property
    def about(self) -> dict[str, Any]:
        return {
            "name": "drawn photos",
            "about": f"{len(self.names)} photos of a test",
            "fusion": "linear",
            "noun": NOUNS[self.modality],
            "version": "1",
            "takes": self.takes or (self.modality,),
            "takes_both": self.takes_both,
            "composes": self.composes,
            "no_ridge": self.no_ridge,
            "no_heat_map": self.no_heat_map,
        }

    def __contains__(self, name: object) -> bool:
        return name in self.texts

    def search(
        self, text: str | None, media: Mapping[Modality, bytes], k: int, systems: Sequence[str]
    ) -> dict[str, list[Hit]]:
        time.sleep(self.delay_seconds)
        read = [np.asarray(readable(medium, media[medium])).tobytes() for medium in sorted(media)]
        self.asked.append((text, *media))
        seed = zlib.crc32((text or "").encode("utf-8", "surrogatepass") + b"".join(read))
        return self._nearest(np.random.default_rng(seed).standard_normal(64), k, systems)

    def like(self, name: str, k: int, systems: Sequence[str]) -> dict[str, list[Hit]]:
        self.asked.append(name)
        return self._nearest(self.vectors[0, self.names.index(name)], k, systems)

    def medium_of(self, name: str) -> Modality:
        return "audio" if name.endswith(".wav") else self.modality

    def file(self, name: str) -> bytes:
        if name == "missing.png":
            raise OSError("its file is gone")
        return tone(name) if name.endswith(".wav") else drawn(name) if self.modality == "image" else b"no sound"

    def heat_map(self, name: str, text: str | None) -> dict[str, Any]:
        if self.no_heat_map:
            raise ValueError(self.no_heat_map)
        weights = np.arange(12.0).reshape(3, 4) / 66
        return {"weights": weights.tolist(), "box": [0.25, 0.0, 0.75, 1.0], "about": f"attention with {text}"}

    def _nearest(self, query: np.ndarray, k: int, systems: Sequence[str]) -> dict[str, list[Hit]]:
        found = {}
        for number, system in enumerate(("fusion", "ridge")):
            scores = self.vectors[number] @ query / np.linalg.norm(self.vectors[number], axis=1) / np.linalg.norm(query)
            best = np.argsort(-scores)[:k]
            found[system] = [Hit(self.names[one], scores[one], self.texts[self.names[one]]) for one in best]
        return {system: found[system] for system in systems}


def readable(medium: Modality, data: bytes) -> Any:
    try:
        return decode(medium, data, 8000)
    except (OSError, ValueError) as error:
        raise ValueError(f"The {NOUNS[medium]}: {error}") from None


def drawn(name: str, side: int = 160) -> bytes:
    """A PNG of some discs, which follow from the name."""
    generator = np.random.default_rng(zlib.crc32(name.encode("utf-8", "surrogatepass")))
    image = Image.new("RGB", (side, side * 3 // 4), tuple(generator.integers(150, 255, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, radius = generator.integers(0, side, 3).tolist()
        colour = tuple(generator.integers(0, 255, 3).tolist())
        pen.ellipse((x, y, x + radius // 2 + 4, y + radius // 2 + 4), fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def tone(name: str) -> bytes:
    """A WAV file of half a second, at a pitch that follows from the name."""
    waveform = np.sin(np.arange(4000) * (0.1 + zlib.crc32(name.encode()) % 100 / 200))
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes((20_000 * waveform).astype("<i2").tobytes())
    return file.getvalue()


def usual_texts(count: int) -> dict[str, str]:
    words = ("a red disc left of a blue one", "three green discs", "a large yellow disc", "discs on a grey table")
    return {f"test/{number:04}.png": f"{words[number % 4]}, number {number}" for number in range(count)}


def form(files: Mapping[str, bytes]) -> bytes:
    """A form as browsers and curl send it."""
    head = 'Content-Disposition: form-data; name="{0}"; filename="a {0}"\r\nContent-Type: application/octet-stream'
    parts = [f"--{BOUNDARY}\r\n{head.format(name)}\r\n\r\n".encode() + data for name, data in files.items()]
    return b"\r\n".join([*parts, f"--{BOUNDARY}--\r\n".encode()])


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def content(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return str(self.content["error"])


@dataclass(frozen=True)
class Client:
    """Sends requests as they are given, also those that no browser would send."""

    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body=body, headers=dict(headers or {}))
            answer = connection.getresponse()
            names = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, names, answer.read())
        finally:
            connection.close()

    def search(
        self, text: str = "", body: bytes = b"", options: str = "", headers: Mapping[str, str] | None = None
    ) -> Answer:
        from saffe_cache.inference.server import key_of

        return self.ask(f"/api/search?text={key_of(text)}{options}", "POST", body, headers)

    def search_by(self, text: str = "", **files: bytes) -> Answer:
        """By files in a form."""
        return self.search(text, form(files), headers={"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"})


@contextmanager
def serving(served: Any, *, most_bytes: int = 1_000_000, names: Sequence[str] = ()) -> Iterator[Client]:
    """A server on a port of its own."""
    listening = listen("127.0.0.1", 0)
    server = make_server(make_app(served, most_bytes=most_bytes, names=names))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield Client(listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
    assert not thread.is_alive()
