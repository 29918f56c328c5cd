"""`saffe serve`: a page that searches an index, for people, and the requests behind it, for programs.

    GET  /                                             the page
    GET  /api/index                                    what is served, and what it can do
    POST /api/search?text=&k=&systems=fusion,ridge     hits for a text, for files, or for both
    GET  /api/like?id=&k=&systems=                     hits for an item of the index
    GET  /api/thumbnail?id=&size=large                 a JPEG of an item's photo, or of its video's middle frame
    GET  /api/sound?id=                                a WAV file of the beginning of an item's sound
    GET  /api/heatmap?id=&text=                        where the model looked in an item's photo

Answers are JSON; an error is {"error": message} with status 4xx. A hit's `key` is its id as a part of an address, and
its `medium` what can be shown of it. The files of a query are a form, each under the name of its medium (image, audio,
video); where the index takes one medium, a file may be the body itself.

Nothing outside the index is served: a request names an item by its id, which is looked up among the index's ids and
never becomes a path, and a file in a request is decoded in memory. Other sites cannot use a visitor's browser to ask:
the header Host must be an IP address, localhost or an allowed name, which defeats DNS rebinding, and no answer permits
another origin. The page loads nothing from elsewhere and runs only its own script, known by its hash.

The encoders serve one request at a time, and few uploads are in memory at once; others wait for their turn. What needs
no encoder (more like this, thumbnails) does not wait for one.

Built on Starlette, which FastAPI is built on too: these seven routes have no use for FastAPI's schemas, and errors have
this project's form.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import logging
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache, partial
from importlib.resources import files
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, unquote_to_bytes

import anyio
import uvicorn
from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saffe_cache.core.features import NOUNS, CacheError, Modality
from saffe_cache.inference.uploads import read_files
from saffe_cache.sources.decoding import sound_excerpt, thumbnail

logger = logging.getLogger(__name__)

SYSTEMS = ("fusion", "ridge")
MOST_HITS = 240
MOST_TEXT = 2000
"""Characters of a query."""
SIDES = {"small": 320, "large": 1024}
"""Pixels of a thumbnail's longer side."""
_THUMBNAILS = {"small": 2048, "large": 32}
"""How many of each size are kept in memory; about 20 kB and 150 kB each."""
_SOUND_SECONDS, _SOUND_RATE = 30, 24_000
"""Of a sound that is played: at most so long, and at most at so many Hz."""
_UPLOADS = 8
"""Bodies in memory at once."""
_CONNECTIONS = 512
_KEPT = {"Cache-Control": "private, max-age=3600"}
_Value = TypeVar("_Value")


class Found(Protocol):
    """A hit."""

    @property
    def id(self) -> str: ...
    @property
    def score(self) -> float: ...
    @property
    def text(self) -> str: ...


class Served(Protocol):
    """What the page needs of an index."""

    @property
    def about(self) -> Mapping[str, Any]:
        """name, about, fusion, noun (of an item), version, takes (the media of which a query may have files),
        takes_both (whether a text may be fused with one), composes (whether a text with a photo says what to change in
        it), and why there are no ridge regression and no heat maps (no_ridge, no_heat_map; empty where there are)."""

    def __contains__(self, name: object) -> bool:
        """Whether an item has this id."""

    def search(
        self, text: str | None, media: Mapping[Modality, bytes], k: int, systems: Sequence[str]
    ) -> Mapping[str, Sequence[Found]]: ...

    def like(self, name: str, k: int, systems: Sequence[str]) -> Mapping[str, Sequence[Found]]: ...

    def medium_of(self, name: str) -> Modality:
        """Of an item's file."""

    def file(self, name: str) -> bytes:
        """An item's file; OSError or ValueError says why there is none."""

    def heat_map(self, name: str, text: str | None) -> Mapping[str, Any]:
        """weights [rows][columns], box (left, top, right, bottom, as fractions of the photo) and about."""


class SearchPage:
    """The answers to requests."""

    def __init__(self, served: Served, most_bytes: int) -> None:
        self._served, self._most_bytes = served, most_bytes
        self._page = (files("saffe_cache.inference") / "page.html").read_text()
        self._policy = content_policy(self._page)
        self._encoding = anyio.CapacityLimiter(1)
        self._decoding, self._searching = anyio.CapacityLimiter(2), anyio.CapacityLimiter(2)
        self._uploading = anyio.Semaphore(_UPLOADS)
        self._thumbnails = {
            size: lru_cache(most)(partial(self._make_thumbnail, SIDES[size])) for size, most in _THUMBNAILS.items()
        }

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/", self.page),
            Route("/api/index", self.index),
            Route("/api/search", self.search, methods=["POST"]),
            Route("/api/like", self.like),
            Route("/api/thumbnail", self.thumbnail),
            Route("/api/sound", self.sound),
            Route("/api/heatmap", self.heat_map),
            Route("/favicon.ico", lambda _: Response(status_code=204)),  # which browsers ask for, whatever a page says
        ]

    async def page(self, request: Request) -> Response:
        return Response(self._page, media_type="text/html", headers={"Content-Security-Policy": self._policy})

    async def index(self, request: Request) -> Response:
        limits = {"most_bytes": self._most_bytes, "most_hits": MOST_HITS, "most_text": MOST_TEXT}
        return as_json({**self._served.about, **limits})

    async def search(self, request: Request) -> Response:
        options = Query.of(request)
        text = query_text(options)
        k, systems = options.number("k", 24, MOST_HITS), options.names("systems", SYSTEMS)
        started = time.perf_counter()
        has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
        async with self._uploading if has_body else nullcontext():
            media = await read_files(request, self._most_bytes, self._served.about["takes"])
            if not text and not media:
                raise ValueError("Found neither a text nor a file, expected one of them. Type a text, or send a file.")
            found = await self._encode(self._served.search, text, media, k, systems)
        return self._hits(found, started)

    async def like(self, request: Request) -> Response:
        options = Query.of(request)
        name = self._known(options)
        k, systems = options.number("k", 24, MOST_HITS), options.names("systems", SYSTEMS)
        started = time.perf_counter()
        found = await to_thread.run_sync(self._served.like, name, k, systems, limiter=self._searching)
        return self._hits(found, started)

    async def thumbnail(self, request: Request) -> Response:
        options = Query.of(request)
        name, (size,) = self._known(options), options.names("size", tuple(SIDES))[:1]
        try:
            picture = await to_thread.run_sync(self._thumbnails[size], name, limiter=self._decoding)
        except (OSError, ValueError, ImportError) as error:
            noun = NOUNS[self._served.medium_of(name)]
            raise HTTPException(404, f"The {noun} cannot be shown: {_reason(error)}") from None
        return Response(picture, media_type="image/jpeg", headers=_KEPT)

    async def sound(self, request: Request) -> Response:
        name = self._known(Query.of(request))
        try:
            sound = await to_thread.run_sync(self._make_excerpt, name, limiter=self._decoding)
        except (OSError, ValueError, ImportError) as error:
            raise HTTPException(404, f"The sound cannot be played: {_reason(error)}") from None
        return _playable(request, sound)

    async def heat_map(self, request: Request) -> Response:
        options = Query.of(request)
        name, text = self._known(options), query_text(options)
        try:
            return as_json(await self._encode(self._served.heat_map, name, text))
        except OSError as error:
            raise HTTPException(404, f"The photo cannot be read: {_reason(error)}") from None

    def _hits(self, found: Mapping[str, Sequence[Found]], started: float) -> Response:
        systems = {system: [self._hit(one) for one in hits] for system, hits in found.items()}
        return as_json({"systems": systems, "seconds": round(time.perf_counter() - started, 4)})

    def _hit(self, hit: Found) -> dict[str, Any]:
        of_item = {"id": hit.id, "key": key_of(hit.id), "medium": self._served.medium_of(hit.id)}
        return {**of_item, "score": float(hit.score), "text": hit.text}

    def _make_thumbnail(self, side: int, name: str) -> bytes:
        return thumbnail(self._served.file(name), side, self._served.medium_of(name))

    def _make_excerpt(self, name: str) -> bytes:
        return sound_excerpt(self._served.file(name), _SOUND_SECONDS, _SOUND_RATE)

    def _known(self, options: Query) -> str:
        name = options.text("id")
        if name not in self._served:
            raise HTTPException(404, f"id: found {name!r:.100}, which the index does not hold. Reload the page.")
        return name

    async def _encode(self, action: Callable[..., _Value], *arguments: Any) -> _Value:
        """On a thread, one at a time."""
        return await to_thread.run_sync(partial(action, *arguments), limiter=self._encoding)


class Query:
    """The options of a request's address, of which each may be there once."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self._options = options

    @classmethod
    def of(cls, request: Request) -> Query:
        """
        Raises:
            ValueError: an option is no text, or there twice.
        """
        found: dict[str, str] = {}
        for part in filter(None, request.scope["query_string"].split(b"&")):
            name, _, value = (
                unquote_to_bytes(one).decode("utf-8", "surrogatepass")  # ids of files may have lone surrogates
                for one in part.replace(b"+", b" ").partition(b"=")
            )
            if name in found:
                raise ValueError(f"{name:.20}: found twice, expected once.")
            found[name] = value
        return cls(found)

    def text(self, name: str) -> str:
        return self._options.get(name, "")

    def number(self, name: str, default: int, most: int) -> int:
        value = self._options.get(name, str(default))
        if not re.fullmatch(r"[0-9]{1,6}", value) or not 1 <= int(value) <= most:
            raise ValueError(f"{name}: found {value!r:.20}, expected a number from 1 to {most}.")
        return int(value)

    def names(self, name: str, known: Sequence[str]) -> tuple[str, ...]:
        """Some of the known names, in their order; the first one where none is given."""
        given = self._options.get(name, known[0]).split(",")
        if not set(given) <= set(known):
            raise ValueError(f"{name}: found {','.join(given)!r:.40}, expected {' or '.join(known)}.")
        return tuple(one for one in known if one in given)


def query_text(options: Query) -> str | None:
    text = options.text("text").strip()
    if len(text) > MOST_TEXT:
        raise ValueError(f"text: found {len(text)} characters, expected at most {MOST_TEXT}. Shorten it.")
    return text or None


def _playable(request: Request, sound: bytes) -> Response:
    """A WAV file, or the range of its bytes that a player asks for: some play nothing, or find no later place, else."""
    headers = _KEPT | {"Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=([0-9]{1,12})-([0-9]{0,12})", request.headers.get("range", ""))
    first, last = (int(asked[1]), min(int(asked[2] or len(sound)), len(sound) - 1)) if asked else (0, -1)
    if first > last:
        return Response(sound, 200, headers, "audio/wav")
    headers["Content-Range"] = f"bytes {first}-{last}/{len(sound)}"
    return Response(sound[first : last + 1], 206, headers, "audio/wav")


def _reason(error: Exception) -> str:
    """Without the place of a file on this machine."""
    return str((isinstance(error, OSError) and error.strerror) or error)


def key_of(name: str) -> str:
    """An id as a part of an address."""
    return quote(name, safe="", errors="surrogatepass")


def as_json(content: Any, status: int = 200) -> Response:
    """In ASCII, which has a form for the lone surrogates that names of files may have."""
    return Response(json.dumps(content, allow_nan=False), status, media_type="application/json")


def content_policy(page: str) -> str:
    """A Content-Security-Policy under which the page runs its own style and script, and loads from its server alone."""
    hashes = {
        tag: base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        for tag in ("style", "script")
        if (found := re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
    }
    own = (f"{tag}-src 'sha256-{digest}'" for tag, digest in hashes.items())
    none = ("default-src", "base-uri", "form-action", "frame-ancestors")
    from_here = ("connect-src 'self'", "img-src 'self' blob:", "media-src 'self' blob:")
    return "; ".join([*(f"{one} 'none'" for one in none), *own, *from_here])


class Guarded:
    """Refuses requests that another site may have caused, and adds headers that keep answers from other sites."""

    headers = (
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"cross-origin-opener-policy", b"same-origin"),
    )

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        """`names`: of hosts that may be asked for, besides localhost and IP addresses."""
        self._app, self._names = app, {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in message["headers"]}
                usual = () if b"cache-control" in names else ((b"cache-control", b"no-store"),)
                message["headers"] = [*message["headers"], *self.headers, *usual]
            await send(message)

        problem = self._problem(scope["headers"])
        app = self._app if problem is None else as_json({"error": problem}, 403)
        return await app(scope, receive, send_guarded)

    def _problem(self, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return (
                f"Host: found {', '.join(hosts)!r:.100}, expected localhost, an IP address or a name of "
                "--allowed-host. Open the address that saffe serve printed."
            )
        for name, value in headers:
            if name == b"origin" and value.decode("latin-1").partition("://")[2] != hosts[0]:
                return "Origin: this request comes from another site, which is not served."
        return None

    def _is_own(self, host: str) -> bool:
        """An IP address cannot be rebound; a name can, so it must be known."""
        found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+))(?::[0-9]{1,5})?", host)
        if not found:
            return False
        try:
            return bool(ipaddress.ip_address(found[1] or found[2]))
        except ValueError:
            return found[2] is not None and found[2].lower() in self._names


def make_app(served: Served, *, most_bytes: int, names: Sequence[str] = ()) -> ASGIApp:
    """The page's server, without a network."""

    def refuse(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def answer(request: Request, error: Exception) -> Response:
            if isinstance(error, HTTPException):
                return as_json({"error": error.detail}, error.status_code)
            return as_json({"error": str(error)}, status)

        return answer

    async def fail(request: Request, error: Exception) -> Response:  # the log has its traceback
        return as_json({"error": "The server failed; its log says where. This is a bug."}, 500)

    handlers: dict[Any, Any] = {HTTPException: refuse(400), Exception: fail}
    handlers |= {UnicodeDecodeError: unreadable, ValueError: refuse(400), CacheError: refuse(400)}
    page = SearchPage(served, most_bytes)
    return Guarded(Starlette(routes=page.routes, exception_handlers=handlers), names)


async def unreadable(request: Request, error: Exception) -> Response:
    return as_json({"error": "The address holds bytes that are no UTF-8. Encode its options as UTF-8."}, 400)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """
    Raises:
        ValueError: the port is in use, or the host is no address of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        what = "an address of this machine and a free port. Choose another --port, or 0 for any free one"
        raise ValueError(f"--host {host} --port {port}: {reason}, expected {what}.") from None


def make_server(app: ASGIApp) -> uvicorn.Server:
    """It answers in `run(sockets=[...])` until `should_exit` is set, or on the main thread until Ctrl-C or SIGTERM."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "proxy_headers": False}
    limits: dict[str, Any] = {"limit_concurrency": _CONNECTIONS, "timeout_graceful_shutdown": 5}
    return uvicorn.Server(uvicorn.Config(app, lifespan="off", ws="none", **options, **limits))
