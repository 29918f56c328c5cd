"""Files in an object store: S3 and what speaks its protocol, Google's and Azure's, and plain web servers to read from.

obstore is the client. It takes credentials and endpoints from the environment by each store's own names, sends large
objects in parts, and tries again while a server is away. Two writers cannot both win: stores write conditionally, if
there is no object of that name, or if it still has the etag that was read.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from saffe_cache.core.atomic_io import Buffer

try:
    import obstore
    from obstore import exceptions, store
except ImportError:  # of the extra `objects`
    obstore = None

Answer = TypeVar("Answer")

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl", "http", "https")
RETRY_SECONDS = 60.0
"""How long a request is tried again while the server is away; `SAFFE_RETRY_SECONDS` sets another time."""
_PART_BYTES = 2**24
"""Larger objects are sent in parts of this size."""
_REQUEST_TIMEOUT = "300s"
"""A part must be through in this time."""
_WRITER = "saffe-writer"
"""An object's metadata that says which conditional request wrote it."""
_CLIENT_OPTIONS = ("allow_http", "allow_invalid_certificates", "proxy_url", "connect_timeout", "timeout")
_MISSING_BUCKETS = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_CREDENTIAL_SOURCES = ("169.254.169.254", "metadata.google.internal", "token request", "Account must be specified")


class ReplacedError(OSError):
    """An object has another etag than before."""


class ObjectFiles:
    """Objects below a URL, by names that use `/`."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            ImportError: obstore is not installed.
            OSError: the URL is none of its.
            ValueError: SAFFE_RETRY_SECONDS is no number.
        """
        self._url = url.rstrip("/")
        if obstore is None:
            raise ImportError(f"{url}: object stores need the package obstore: pip install 'saffe-cache[objects]'.")
        self._give_up = number_from_environment("SAFFE_RETRY_SECONDS", RETRY_SECONDS)
        backoff = {"max_backoff": timedelta(seconds=5)}
        with self._told("the store"):
            self._store = store.from_url(
                self._url,
                client_options=_client_options(self._url, os.environ),
                retry_config={
                    "max_retries": 10_000,
                    "backoff": backoff,
                    "retry_timeout": timedelta(seconds=self._give_up),
                },
            )

    def exists(self, name: str) -> bool:
        try:
            with self._told(name):
                obstore.head(self._store, name)
        except FileNotFoundError:
            return False
        return True

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError if there is none."""
        return bytes(self.read_buffer(name))

    def read_buffer(self, name: str) -> memoryview:
        return self._asked(name, lambda: memoryview(obstore.get(self._store, name).bytes()))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        return self.read_version(name, start, stop, None)[0]

    def read_version(self, name: str, start: int, stop: int, etag: str | None) -> tuple[bytes, int, str | None]:
        """Bytes of an object, fewer at its end; its size (0 if it ends before them), and its etag.

        Raises:
            FileNotFoundError: there is no object.
            ReplacedError: it has another etag than the given one.
        """
        options: dict[str, Any] = {"range": (start, stop), **({"if_match": etag} if etag else {})}

        def piece() -> tuple[bytes, int, str | None]:
            try:
                found = obstore.get(self._store, name, options=options)
                return bytes(found.bytes()), found.meta["size"], found.meta["e_tag"]
            except exceptions.PreconditionError:
                raise ReplacedError(f"{self._url}: {name} was replaced while it was read.") from None
            except exceptions.GenericError as error:
                if "416 Range Not Satisfiable" in str(error):
                    return b"", 0, None
                raise

        return self._asked(name, piece)

    def write(self, name: str, *parts: Buffer) -> None:
        data = b"".join(parts)
        with self._told(name):
            obstore.put(self._store, name, data, use_multipart=len(data) > _PART_BYTES, chunk_size=_PART_BYTES)

    def create(self, name: str, *parts: Buffer) -> bool:
        return self._write_if(name, b"".join(parts), "create")

    def replace(self, name: str, data: bytes, was: bytes | None) -> bool:
        if was is None:
            return self.create(name, data)

        def current() -> tuple[bytes, Any]:
            found = obstore.get(self._store, name)
            return bytes(found.bytes()), found.meta

        try:
            content, meta = self._asked(name, current)
        except FileNotFoundError:
            return False
        if content != was:
            return False
        version = {"e_tag": meta["e_tag"], "version": meta["version"]}
        return self._write_if(name, data, {key: value for key, value in version.items() if value is not None})

    def list(self, prefix: str) -> list[str]:
        return self._asked(
            prefix, lambda: sorted(one["path"] for batch in obstore.list(self._store, prefix) for one in batch)
        )

    def remove(self, name: str) -> None:
        self._delete(name, [name])

    def remove_folder(self, name: str) -> None:
        self._delete(name, self.list(name))

    def _delete(self, what: str, names: Sequence[str]) -> None:
        with self._told(what):
            try:
                if names:
                    obstore.delete(self._store, [*names])
            except FileNotFoundError as error:
                if _lacks_bucket(error):
                    raise

    def _write_if(self, name: str, data: bytes, mode: Any) -> bool:
        """Write on a condition, and return whether it held.

        A request whose answer was lost may have written: the object says by which request it was written.
        """
        token, started = uuid.uuid4().hex, time.monotonic()
        while True:
            with self._told(name):
                try:
                    obstore.put(self._store, name, data, mode=mode, attributes={_WRITER: token})
                    return True
                except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                    return self._is_by(name, token)
                except exceptions.GenericError:
                    if self._is_by(name, token):
                        return True
                    if time.monotonic() - started > self._give_up:
                        raise

    def _is_by(self, name: str, token: str) -> bool:
        try:
            return bool(obstore.get(self._store, name).attributes.get(_WRITER) == token)
        except FileNotFoundError:
            return False

    def _asked(self, name: str, request: Callable[[], Answer]) -> Answer:
        """What a request to read returns.

        The client goes on with an answer that was cut off, but not with a list, nor if the object was replaced since.
        """
        started = time.monotonic()
        while True:
            with self._told(name):
                try:
                    return request()
                except exceptions.GenericError as error:
                    if "body error" not in str(error) or time.monotonic() - started > self._give_up:
                        raise

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Errors of the client become one line; FileNotFoundError stays.

        Raises OSError, which says whether the bucket, the access to it or the server is missing.
        """
        try:
            yield
        except (exceptions.BaseError, FileNotFoundError) as error:
            if _lacks_bucket(error):
                raise OSError(f"{self._url}: there is no such bucket. Make it, or correct the URL.") from None
            if isinstance(error, FileNotFoundError):
                raise
            raise _explained(error, f"{self._url}: {name}") from None


def number_from_environment(name: str, default: float) -> float:
    """Raises ValueError if the variable is set to anything but a number of 0 or more."""
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: found {text!r}, expected a number of 0 or more.")
    return value


def _lacks_bucket(error: Exception) -> bool:
    return any(one in str(error) for one in _MISSING_BUCKETS)


def _explained(error: Exception, where: str) -> OSError:
    """What a user reads of an error of the client."""
    text = str(error)
    line = " ".join(text.split("\n\nDebug source")[0].split())
    if any(one in line for one in _CREDENTIAL_SOURCES):
        return OSError(
            f"{where}: no credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "GOOGLE_APPLICATION_CREDENTIALS, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY."
        )
    if isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)):
        code = re.search(r"<Code>(\w+)</Code>", line)
        return OSError(
            f"{where}: the store refuses access ({code[1] if code else type(error).__name__}). Check the credentials "
            "in the environment (AWS_ACCESS_KEY_ID, …) and what they may do with this bucket."
        )
    causes = {
        "dns error": "the server's name cannot be resolved",
        "ConnectionRefused": "nothing listens at the server's address",
        "TimedOut": "the server does not answer",
    }
    cause = next((cause for sign, cause in causes.items() if sign in text), None)
    return OSError(f"{where}: {f'{cause}: ' if cause else ''}{line[:400]}. Run the same command again to resume.")


def _client_options(url: str, environment: Mapping[str, str]) -> Any:
    """Options of the HTTP client, by the names that obstore gives them: AWS_ALLOW_HTTP, AZURE_PROXY_URL and so on.

    obstore reads them itself only where none are given. An endpoint `http://…` allows HTTP.
    """
    options: dict[str, Any] = {"timeout": _REQUEST_TIMEOUT}
    for name in _CLIENT_OPTIONS:
        for prefix in ("AWS", "GOOGLE", "AZURE"):
            if value := environment.get(f"{prefix}_{name.upper()}"):
                options[name] = value.lower() in ("true", "1") if name.startswith("allow") else value
    endpoints = [
        url,
        *(value for name, value in environment.items() if name.startswith(("AWS_ENDPOINT", "AZURE_ENDP"))),
    ]
    if any(one.startswith("http://") for one in endpoints):
        options["allow_http"] = True
    return options
