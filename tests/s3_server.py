"""An S3 server on this machine, behind a proxy that can be slow, fail, refuse, and go away.

The server keeps its objects while the proxy is away, as a store does whose front end restarts.
"""

from __future__ import annotations

import http.client
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BUCKET = "bucket"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "SAFFE_RETRY_SECONDS": "20",
}
_REFUSED = b"<Error><Code>InvalidAccessKeyId</Code><Message>The key does not exist.</Message></Error>"


def url(folder: Path) -> str:
    """Of a cache, another one for each test's folder."""
    return f"s3://{BUCKET}/{folder.name}/cache.zarr"


class S3Proxy:
    """What clients connect to. The faults are attributes that a test changes at any time."""

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self.port = free_port()
        self.latency_seconds = 0.0
        self.share_failing = 0.0
        """Of requests, half before the server has seen them, and half after: the answer is lost, or cut in two."""
        self.refuses = False
        self.requests: list[tuple[str, str]] = []
        """Method and path of each request that came."""
        self.sent_bytes = 0
        """Bodies of answers."""
        self.random = random.Random(0)
        self.writing = threading.Lock()
        """Held by each write: the server looks at a condition and writes in two steps, which no store does."""
        self._http: Any = None

    @property
    def environment(self) -> dict[str, str]:
        return ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}

    def start(self) -> None:
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), type("_Handler", (_Handler,), {"proxy": self}))
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Go away: nothing listens at the port, and open connections answer no more."""
        if self._http is not None:
            http, self._http = self._http, None
            http.shutdown()
            http.server_close()

    @property
    def is_up(self) -> bool:
        return self._http is not None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: S3Proxy

    def _forward(self) -> None:
        proxy = self.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy.requests.append((self.command, self.path))
        time.sleep(proxy.latency_seconds)
        if not proxy.is_up:
            self.close_connection = True
            return
        if proxy.refuses:
            self._answer(403, {}, _REFUSED)
            return
        fate = proxy.random.random()
        if fate < proxy.share_failing / 2:
            self._answer(503, {}, b"")
            return
        with proxy.writing if self.command == "PUT" else nullcontext():
            connection = http.client.HTTPConnection("127.0.0.1", proxy.server_port, timeout=30)
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = answer.read()
            connection.close()
        is_cut = fate < proxy.share_failing or not proxy.is_up
        if is_cut and self.command != "GET":
            self.close_connection = True  # the server has done it, and nobody hears
            return
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _OF_ONE_CONNECTION}
        self._answer(answer.status, headers, content, answer.getheader("Content-Length"), is_cut=is_cut)

    def _answer(
        self, status: int, headers: dict[str, str], content: bytes, length: str | None = None, *, is_cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", (length or "0") if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.close_connection |= is_cut
            sent = content[: len(content) // 2] if is_cut else content
            self.proxy.sent_bytes += len(sent)
            self.wfile.write(sent)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True  # the client has gone


_OF_ONE_CONNECTION = {"content-length", "connection", "transfer-encoding", "server", "date"}


@contextmanager
def s3_server() -> Iterator[S3Proxy]:
    """A server with one empty bucket, and its proxy."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    proxy = S3Proxy(port)
    try:
        _make_bucket(port, process)
        proxy.start()
        yield proxy
    finally:
        proxy.stop()
        process.kill()
        process.wait()


def _make_bucket(port: int, process: subprocess.Popen[bytes]) -> None:
    """Wait for the server; the bucket is the first request that it answers."""
    deadline = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("PUT", f"/{BUCKET}")
            assert connection.getresponse().status == 200
            return
        except OSError:
            assert process.poll() is None, "the server did not start"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)
        finally:
            connection.close()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
