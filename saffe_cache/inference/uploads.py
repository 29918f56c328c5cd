"""The files of a request, in memory: one as the body itself, or several in a form, each under the name of its medium.

Starlette's own reader of forms needs another package and writes files to the disk.
"""

from __future__ import annotations

from collections.abc import Collection
from email.message import Message
from email.parser import BytesHeaderParser

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import Request

from saffe_cache.core.features import NOUNS, Modality
from saffe_cache.store.joined import MEDIA

_UPLOAD_SECONDS = 60
_FORM_BYTES = 2**14
"""Of a body, besides its files."""
_MOST_PARTS = 8


async def read_files(request: Request, most_bytes: int, takes: Collection[Modality]) -> dict[Modality, bytes]:
    """The files of a request by medium.

    Args:
        most_bytes: of all files together.
        takes: the media of which the index takes files; if it is one, the file may be the body itself.

    Raises:
        HTTPException: the files are too large or come too slowly.
        ValueError: the form is damaged, or nothing says of which medium a file is.
    """
    body = await _read_body(request, most_bytes + _FORM_BYTES)
    kind = request.headers.get("content-type", "")
    if kind.lower().startswith("multipart/"):
        found = form_files(kind, body)
    elif body and len(takes) != 1:
        options = " ".join(f"--form {medium}=@FILE" for medium in takes or MEDIA)
        raise ValueError(f"Found a file of an unknown medium. Send a form that names it, as curl {options} does.")
    else:
        found = dict.fromkeys(takes, body) if body else {}
    if sum(map(len, found.values())) > most_bytes:
        raise _too_large(most_bytes)
    return found


def form_files(kind: str, body: bytes) -> dict[Modality, bytes]:
    """The files of a form (multipart/form-data) by their names, which are media.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    header = Message()
    header["content-type"] = kind
    boundary = str(header.get_boundary("")).encode("utf-8", "surrogateescape")
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary, _MOST_PARTS)
    if not boundary or not parts or not parts[-1].startswith(b"--"):
        raise ValueError("The form is damaged: its end is missing, or it has too many parts. Send it again.")
    found: dict[Modality, bytes] = {}
    for part in parts[:-1]:
        head, is_whole, content = part.partition(b"\r\n\r\n")
        name = BytesHeaderParser().parsebytes(head.lstrip()).get_param("name", "", "content-disposition")
        medium = next((one for one in MEDIA if one == name and is_whole), None)
        if medium is None or medium in found:
            expected = " or ".join(f"{one} (a {NOUNS[one]})" for one in MEDIA)
            raise ValueError(f"The form has a part {name!r:.40}, expected {expected}, each once. A text is an option.")
        found[medium] = content
    return found


async def _read_body(request: Request, most: int) -> bytes:
    """The body. The rest of one that is too large is read, not kept, so that its sender sees the answer."""
    kept, size = [], 0
    try:
        with anyio.fail_after(_UPLOAD_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    kept.append(part)
                else:
                    kept.clear()
                if size > 4 * most:
                    break
    except TimeoutError:
        raise HTTPException(408, f"The upload took over {_UPLOAD_SECONDS} s. Try again.") from None
    if size > most:
        raise _too_large(most - _FORM_BYTES)
    return b"".join(kept)


def _too_large(most: int) -> HTTPException:
    return HTTPException(
        413, f"The files have over {most / 1e6:g} MB, expected at most that. Send smaller ones, or raise --upload-mb."
    )
