"""The search page's server: whom it answers, what it never serves, and errors that say what to do."""

from __future__ import annotations

import http.client
import io
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from PIL import Image
from served_index import BOUNDARY, HOSTILE, Client, FakeIndex, drawn, form, serving, tone, usual_texts

from saffe_cache.inference.server import is_loopback, key_of, listen
from saffe_cache.inference.uploads import form_files

TEXTS = usual_texts(40) | HOSTILE | {"missing.png": "its file is gone"}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(FakeIndex(TEXTS)) as client:
        yield client


def test_text_photo_or_both_find_hits(client: Client) -> None:
    found = [client.search(*query).content for query in (("a disc",), ("", drawn("x")), ("a disc", drawn("x")))]
    firsts = [[hit["id"] for hit in one["systems"]["fusion"]] for one in found]
    assert [len(one) for one in firsts] == [24] * 3
    assert len({tuple(one) for one in firsts}) == 3
    scores = [hit["score"] for hit in found[0]["systems"]["fusion"]]
    assert scores == sorted(scores, reverse=True)
    assert all(hit["text"] == TEXTS[hit["id"]] for hit in found[0]["systems"]["fusion"])


def test_two_systems_answer_side_by_side(client: Client) -> None:
    found = client.search("a disc", options="&systems=fusion,ridge&k=5").content["systems"]
    assert list(found) == ["fusion", "ridge"]
    assert [hit["id"] for hit in found["fusion"]] != [hit["id"] for hit in found["ridge"]]


@pytest.mark.parametrize("name", TEXTS)
def test_each_id_finds_its_own_item(client: Client, name: str) -> None:
    found = client.ask(f"/api/like?id={key_of(name)}&k=3").content["systems"]["fusion"]
    assert found[0]["id"] == name
    assert found[0]["key"] == key_of(name)
    assert found[0]["score"] == pytest.approx(1, abs=1e-5)
    picture = client.ask(f"/api/thumbnail?id={found[0]['key']}")
    if name != "missing.png":
        assert picture.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(picture.body)).size == (160, 120)


@pytest.mark.parametrize("path", ["thumbnail", "sound", "like", "heatmap"])
@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "..%2F..%2Fetc%2Fpasswd",
        "file:///etc/passwd",
        "test/0000.png%00",
        "test/../test/0000.png",
        "TEST/0000.png",
        "nothing",
        "%ff%fe",
        "a" * 5000,
        "test/0000.png&id=test/0001.png",
    ],
)
def test_other_ids_find_nothing(client: Client, path: str, name: str) -> None:
    answer = client.ask(f"/api/{path}?id={name}")
    assert 400 <= answer.status < 500
    assert answer.error
    assert b"root:" not in answer.body


@pytest.mark.parametrize(
    "path", ["/../server.py", "/page.html", "/static/x", "/api", "//etc/passwd", "/%2e%2e/config.py"]
)
def test_other_paths_are_not_there(client: Client, path: str) -> None:
    answer = client.ask(path)
    assert (answer.status, answer.error) == (404, "Not Found")


def test_missing_photo_says_why(client: Client) -> None:
    answer = client.ask("/api/thumbnail?id=missing.png")
    assert (answer.status, answer.error) == (404, "The photo cannot be shown: its file is gone")


def test_sounds_are_wav_files_and_may_be_asked_for_in_parts() -> None:
    with serving(FakeIndex({"a.wav": "", "no": "", "missing.png": ""}, modality="audio")) as client:
        answer = client.ask("/api/sound?id=a.wav")
        assert (answer.status, answer.headers["content-type"]) == (200, "audio/wav")
        assert answer.body == tone("a.wav")
        size = len(answer.body)
        for asked, first, last in (("0-", 0, size - 1), ("100-199", 100, 199), (f"100-{2 * size}", 100, size - 1)):
            part = client.ask("/api/sound?id=a.wav", headers={"Range": f"bytes={asked}"})
            assert (part.status, part.headers["content-range"]) == (206, f"bytes {first}-{last}/{size}")
            assert part.body == answer.body[first : last + 1]
        for asked in ("x", "bytes=-5", f"bytes={size}-", "bytes=9-3", "bytes=0-1,5-6"):
            assert client.ask("/api/sound?id=a.wav", headers={"Range": asked}).body == answer.body
        for name, why in (
            ("missing.png", "its file is gone"),
            ("no", "libsndfile cannot read it: Format not recognised"),
        ):
            answer = client.ask(f"/api/sound?id={name}")
            assert answer.status == 404
            assert answer.error.startswith(f"The sound cannot be played: {why}")


def test_missing_photo_does_not_say_where_it_was() -> None:
    class Unreadable(FakeIndex):
        def file(self, name: str) -> bytes:
            raise FileNotFoundError(2, "No such file or directory", f"/home/somebody/{name}")

    with serving(Unreadable({"a.png": ""})) as client:
        answer = client.ask("/api/thumbnail?id=a.png")
    assert (answer.status, answer.error) == (404, "The photo cannot be shown: No such file or directory")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("text=a&k=0", "k: found '0'"),
        ("text=a&k=241", "expected a number from 1 to 240"),
        ("text=a&k=1e3", "k: found '1e3'"),
        ("text=a&k=%D9%A3", "k: found"),
        ("text=a&systems=other", "expected fusion or ridge"),
        ("text=", "neither a text nor a file"),
        ("text=" + "a" * 2001, "at most 2000"),
        ("text=%ff", "no UTF-8"),
        ("text=a&text=b", "found twice"),
    ],
)
def test_wrong_options_are_refused(client: Client, options: str, expected: str) -> None:
    answer = client.ask(f"/api/search?{options}", "POST")
    assert answer.status == 400
    assert expected in answer.error


@pytest.mark.parametrize(
    "body", [b"no picture", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"PK\3\4"]
)
def test_body_that_is_no_photo_is_refused(client: Client, body: bytes) -> None:
    answer = client.search("", body)
    assert answer.status == 400
    assert answer.error


def test_files_of_a_form_search_with_and_without_a_text() -> None:
    served = FakeIndex(usual_texts(30), takes=("image", "audio"))
    photo, sound = drawn("x"), tone("x")
    with serving(served) as client:
        answers = [
            client.search_by("", image=photo),
            client.search_by("", audio=sound),
            client.search_by("", audio=sound, image=photo),
            client.search_by("a disc", image=photo, audio=sound),
        ]
        found = [[hit["id"] for hit in one.content["systems"]["fusion"]] for one in answers]
        assert len({*map(tuple, found)}) == 4
        assert served.asked == [
            (None, "image"),
            (None, "audio"),
            (None, "audio", "image"),
            ("a disc", "image", "audio"),
        ]
        assert client.search_by("a disc").status == 200
        answer = client.search("", sound)
        assert (answer.status, answer.error) == (
            400,
            "Found a file of an unknown medium. Send a form that names it, as curl --form image=@FILE --form "
            "audio=@FILE does.",
        )
        answer = client.search_by("", image=photo, audio=b"no sound")
        assert (answer.status, answer.error) == (
            400,
            "The sound: libsndfile cannot read it: Format not recognised",
        )


def test_a_file_may_be_the_body_where_one_medium_is_taken() -> None:
    with serving(served := FakeIndex(usual_texts(3), modality="audio")) as client:
        answers = [client.search("", tone("x")), client.search_by("", audio=tone("x"))]
    assert answers[0].content["systems"] == answers[1].content["systems"]
    assert served.asked == [(None, "audio")] * 2


@pytest.mark.parametrize(
    "data", [b"", b"\r\n", b"x--" + BOUNDARY.encode(), b"\r\n\r\n--", bytes(range(256)) * 9, b"\r\n--" + b"x" * 99]
)
def test_files_of_a_form_keep_every_byte(data: bytes) -> None:
    """Also those that look like a boundary, as long as they are none."""
    kind = f'multipart/form-data; charset=utf-8; boundary="{BOUNDARY}"'
    assert form_files(kind, form({"audio": data, "image": data[::-1]})) == {"audio": data, "image": data[::-1]}


GOOD = form({"image": b"a"})


@pytest.mark.parametrize(
    ("body", "boundary", "expected"),
    [
        (GOOD[:-6], BOUNDARY, "The form is damaged"),
        (GOOD, "another", "The form is damaged"),
        (GOOD, "", "The form is damaged"),
        (form(dict.fromkeys("abcdefghij", b"")), BOUNDARY, "too many parts"),
        (form({"text": b"a"}), BOUNDARY, r"a part 'text', expected image \(a photo\) or audio \(a sound\) or video"),
        (GOOD.replace(b'"image"', b'"im"'), BOUNDARY, "a part 'im'"),
        (GOOD.replace(b"Content-Disposition", b"Other"), BOUNDARY, "a part ''"),
        (GOOD.replace(b"\r\n\r\n", b"\r\n"), BOUNDARY, "a part 'image', expected"),
        (form({"image": b"a"})[: -len(BOUNDARY) - 6] + form({"image": b"b"}), BOUNDARY, "each once"),
    ],
)
def test_damaged_forms_are_refused(client: Client, body: bytes, boundary: str, expected: str) -> None:
    answer = client.search("", body, headers={"Content-Type": f"multipart/form-data; boundary={boundary}"})
    assert answer.status == 400
    assert re.search(expected, answer.error)


def bomb() -> bytes:
    """A PNG of 3 kB that says it has 10 billion pixels."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def test_photo_of_too_many_pixels_is_refused(client: Client) -> None:
    answer = client.search("", bomb())
    assert answer.status == 400
    assert "DecompressionBomb" in answer.error


@pytest.mark.parametrize("size", [1_000_001, 3_000_000])
def test_large_uploads_are_refused(client: Client, size: int) -> None:
    answer = client.search("", b"\xff" * size)
    assert answer.status == 413
    assert "expected at most" in answer.error
    assert client.search_by("", image=b"\xff" * (size // 2), audio=b"\xff" * (size - size // 2)).status == 413


def test_endless_uploads_are_cut_off(client: Client) -> None:
    """The sender may see the answer or a closed connection, depending on how fast it sends."""
    with suppress(ConnectionError, http.client.HTTPException):
        assert client.search("", b"\xff" * 30_000_000).status == 413
    assert client.search("still there").status == 200


def test_upload_of_the_largest_size_is_read(client: Client) -> None:
    answer = client.search("", drawn("x").ljust(1_000_000, b"\0"))  # what follows the picture is passed over
    assert answer.status == 200


def test_chunks_count_without_a_stated_length(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.port)) as connection:
        head = (
            f"POST /api/search?text=a HTTP/1.1\r\nHost: 127.0.0.1:{client.port}\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode())
        part = b"10000\r\n" + b"\0" * 0x10000 + b"\r\n"
        for _ in range(20):
            connection.sendall(part)
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil", "", "[::1", "a@127.0.0.1",
     "127.0.0.1:x", "localhost, evil.example", "2130706433"],
)  # fmt: skip
def test_names_of_other_hosts_are_refused(client: Client, host: str) -> None:
    for path in ("/", "/api/index", "/api/thumbnail?id=test/0000.png"):
        answer = client.ask(path, headers={"Host": host})
        assert answer.status == 403
        assert "Host: found" in answer.error


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:8000", "192.168.0.7:80"])
def test_addresses_and_localhost_are_answered(client: Client, host: str) -> None:
    assert client.ask("/api/index", headers={"Host": host}).status == 200


def test_allowed_name_is_answered() -> None:
    with serving(FakeIndex(usual_texts(3)), names=["Photos.example"]) as client:
        assert client.ask("/", headers={"Host": "photos.example:8000"}).status == 200
        assert client.ask("/", headers={"Host": "other.example"}).status == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://localhost"])
def test_requests_from_other_sites_are_refused(client: Client, origin: str) -> None:
    answer = client.ask("/api/search?text=a", "POST", headers={"Origin": origin})
    assert answer.status == 403
    assert "another site" in answer.error
    own = f"http://127.0.0.1:{client.port}"
    assert client.ask("/api/search?text=a", "POST", headers={"Origin": own}).status == 200


def test_answers_stay_with_their_site(client: Client) -> None:
    for path in ("/", "/api/index", "/api/thumbnail?id=test/0000.png", "/nothing"):
        headers = client.ask(path, headers={"Sec-Fetch-Site": "same-origin"}).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in headers if name.startswith("access-control")]
    preflight = client.ask("/api/search", "OPTIONS", headers={"Access-Control-Request-Method": "POST"})
    assert not [name for name in preflight.headers if name.startswith("access-control")]


def test_page_may_load_nothing_from_elsewhere(client: Client) -> None:
    answer = client.ask("/")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert re.fullmatch("'sha256-[A-Za-z0-9+/]{43}='", policy["script-src"])
    page = answer.body.decode()
    assert not re.findall(r"(?:src|href)=|https?://|url\(|@import", page)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bon\w+=", page)


def test_failure_is_answered_without_details(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    served = FakeIndex(usual_texts(3))
    served.like = lambda *_: 1 / 0  # type: ignore[assignment,method-assign]
    with serving(served) as broken:
        answer = broken.ask("/api/like?id=test/0000.png")
        assert (answer.status, answer.error) == (500, "The server failed; its log says where. This is a bug.")
    assert "ZeroDivisionError" in caplog.text


def test_encoders_serve_one_request_at_a_time() -> None:
    served = FakeIndex(usual_texts(3), delay_seconds=0.05)
    at_once, most = 0, 0
    search = served.search

    def counted(*arguments: object) -> object:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        found = search(*arguments)  # type: ignore[arg-type]
        at_once -= 1
        return found

    served.search = counted  # type: ignore[assignment,method-assign]
    with serving(served) as client:
        answers: list[int] = []
        threads = [threading.Thread(target=lambda: answers.append(client.search("a").status)) for _ in range(50)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        assert client.ask("/api/index").status == 200  # meanwhile
        assert time.perf_counter() - started < 50 * 0.05
        for thread in threads:
            thread.join()
    assert answers == [200] * 50
    assert most == 1


def test_port_in_use_is_refused_in_words() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--port {port}: Address already in use, .* Choose another --port"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("a.b", False)]
)
def test_loopback_addresses_are_known(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
