"""The search page in a real browser: people can search with it, and nothing in an index takes it over."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browsing, find_browser
from served_index import HOSTILE, Client, FakeIndex, drawn, serving, tone, usual_texts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no chromium or chrome is installed"),
]

HITS = "document.querySelectorAll('.hit').length"
SHOWN = "[...document.querySelectorAll('.hits .id')].map(one => one.textContent)"
STATUS = "document.getElementById('status').textContent"
FOCUS = "document.activeElement.id || document.activeElement.className"
PLACE = "+document.activeElement.closest('li').dataset.place"
LOADED = "[...document.querySelectorAll('.hit img')].every(one => one.complete && one.naturalWidth > 0)"
OPEN = "document.getElementById('dialog').open"


@pytest.fixture(scope="module")
def served() -> FakeIndex:
    return FakeIndex(usual_texts(60) | HOSTILE)


@pytest.fixture(scope="module")
def client(served: FakeIndex) -> Iterator[Client]:
    with serving(served) as client:
        yield client


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("browser"), is_online=True) as page:
        yield page


@pytest.fixture
def page(browser: Page, client: Client) -> Iterator[Page]:
    browser.complaints.clear()
    browser.requests.clear()
    open_page(browser, client)
    yield browser
    assert not browser.complaints
    assert {one.split("/")[2] for one in browser.requests if one.startswith("http")} == {f"127.0.0.1:{client.port}"}
    assert {one.split(":")[0] for one in browser.requests} <= {"http", "blob"}


def open_page(page: Page, client: Client, width: int = 1200, *, dark: bool = False, hash: str = "") -> None:
    page.call("Page.navigate", url="about:blank")  # a change of the hash alone would not load the page again
    page.wait("location.protocol === 'about:'")
    page.open(client.address + hash, width, dark=dark)
    page.wait("index !== null")


def search(page: Page, text: str, hits: int = 24) -> None:
    page.run("document.getElementById('text').focus()")
    page.run("document.getElementById('text').select()")
    page.type(text)
    page.press("Enter")
    page.wait(f"{STATUS}.includes('for “{text}”') && {HITS} === {hits}")


def test_text_query_shows_hits_with_scores_and_captions(page: Page, client: Client) -> None:
    assert page.run(FOCUS) == "text"
    search(page, "three discs")
    expected = client.search("three discs").content["systems"]["fusion"]
    assert page.run(SHOWN) == [hit["id"] for hit in expected]
    scores = page.run("[...document.querySelectorAll('.numbers b')].map(one => one.textContent)")
    assert scores == [f"{hit['score']:.3f}" for hit in expected]
    captions = page.run("[...document.querySelectorAll('.hits .caption')].map(one => one.textContent)")
    assert captions == [hit["text"] for hit in expected]
    page.wait(LOADED.replace(".hit img", "li:nth-child(-n+6) .hit img"))


def test_photo_query_with_and_without_a_text(page: Page, served: FakeIndex, tmp_path: Path) -> None:
    path = tmp_path / "mine.png"
    path.write_bytes(drawn("mine"))
    served.asked.clear()
    page.upload("#file-image", path)
    page.wait(f"{STATUS}.includes('for the photo') && {HITS} === 24")
    assert page.run("document.getElementById('chosen-image').naturalWidth") == 160
    page.run("document.getElementById('text').focus()")
    page.type("but green")
    page.press("Enter")
    page.wait(f"{STATUS}.includes('for “but green” and for the photo')")
    assert served.asked == [(None, "image"), ("but green", "image")]
    page.run("document.getElementById('remove-image').click()")
    assert page.run("document.getElementById('preview-image').hidden")
    page.press("Enter")
    page.wait(f"{STATUS}.includes('for “but green”,')")
    assert served.asked[-1] == ("but green",)


def test_the_page_says_that_a_text_changes_the_photo(
    page: Page, served: FakeIndex, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "composes", True)
    open_page(page, client)
    assert "or both: the text then says what to change" in page.run("document.getElementById('hint').textContent")
    (tmp_path / "mine.png").write_bytes(drawn("mine"))
    page.upload("#file-image", tmp_path / "mine.png")
    page.wait(f"{STATUS}.includes('for the photo,')")
    page.run("document.getElementById('text').focus()")
    page.type("in grey")
    page.press("Enter")
    page.wait(f"{STATUS}.includes('for the photo, changed by “in grey”') && {HITS} === 24")
    assert served.asked[-1] == ("in grey", "image")


def test_photo_can_be_dropped_and_pasted(page: Page) -> None:
    for kind, holder in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.run("document.getElementById('found').replaceChildren()")
        page.run(f"""(async () => {{
            const answer = await fetch("api/thumbnail?id=" + encodeURIComponent("test/0003.png"));
            const data = new DataTransfer();
            data.items.add(new File([await answer.blob()], "mine.jpg", {{ type: "image/jpeg" }}));
            const event = new {"DragEvent" if kind == "drop" else "ClipboardEvent"}("{kind}",
                {{ {holder}: data, bubbles: true, cancelable: true }});
            return document.body.dispatchEvent(event);
        }})()""")
        page.wait(f"{STATUS}.includes('for the photo') && {HITS} === 24")
        page.press("Escape")


DROP = """(([...files]) => {{
    const data = new DataTransfer();
    files.forEach(([name, type, content]) =>
        data.items.add(new File([Uint8Array.from(atob(content), one => one.charCodeAt(0))], name, {{ type }})));
    document.body.dispatchEvent(new DragEvent("drop", {{ dataTransfer: data, bubbles: true, cancelable: true }}));
}})({0})"""


def dropped(*files: tuple[str, str, bytes]) -> str:
    """A script that drops files: their names, types and contents."""
    return DROP.format(json.dumps([(name, kind, base64.b64encode(data).decode()) for name, kind, data in files]))


def test_a_sound_searches_an_index_of_sounds(browser: Page, tmp_path: Path) -> None:
    with serving(served := FakeIndex({"a.wav": "high", "b.wav": "low"}, modality="audio")) as other:
        open_page(browser, other)
        assert "drop a sound" in browser.run("document.getElementById('hint').textContent")
        (tmp_path / "mine.wav").write_bytes(tone("mine"))
        browser.upload("#file-audio", tmp_path / "mine.wav")
        browser.wait(f"{STATUS}.includes('2 hits for the sound,')")
        browser.wait("document.getElementById('chosen-audio').duration === 0.5")
        browser.press("Escape")
        assert browser.run("document.getElementById('chosen-audio')") is None
        browser.run(dropped(("theirs", "", tone("theirs"))))  # no type: the only medium is meant
        browser.wait(f"{STATUS}.includes('2 hits for the sound,')")
        browser.run(dropped(("mine.png", "image/png", drawn("mine"))))
        browser.wait(f"{STATUS} === 'This index takes no photo as a query, only a text or a sound.'")
        browser.run(dropped(("bad.wav", "audio/wav", b"no sound")))
        browser.wait(f"{STATUS} === 'The sound: libsndfile cannot read it: Format not recognised'")
    assert served.asked == [(None, "audio")] * 2


def test_a_photo_and_a_sound_are_one_query(browser: Page) -> None:
    texts = {"a.png": "seen", "b.wav": "heard"}
    with serving(served := FakeIndex(texts, takes=("image", "audio"), takes_both=False)) as other:
        open_page(browser, other)
        browser.complaints.clear()
        assert "a photo or a sound; several files are one query" in browser.run(
            "document.getElementById('hint').textContent"
        )
        browser.press("Enter")
        browser.wait(f"{STATUS} === 'Type a text or choose a photo or a sound first.'")
        browser.run(dropped(("a", "audio/wav", tone("a")), ("b", "image/png", drawn("b"))))
        browser.wait(f"{STATUS}.includes('2 hits for the sound and for the photo,')")
        browser.wait("document.querySelectorAll('.hits img').length === 1")
        assert browser.run("document.querySelectorAll('.hits audio').length") == 1
        browser.run("document.getElementById('remove-audio').click()")
        browser.press("Enter")
        browser.wait(f"{STATUS}.includes('2 hits for the photo,')")
        browser.run(dropped(("strange", "", b"?")))
        browser.wait(f"{STATUS} === 'What strange holds is unknown: choose it with a button.'")
        browser.run(dropped(("c", "audio/wav", b"." * 999_900)))
        browser.wait(f"{STATUS} === 'The files have 1.0 MB, expected at most 1 MB.'")
        assert not browser.complaints
    assert served.asked == [(None, "audio", "image"), (None, "image")]


def test_more_like_this_searches_and_back_returns(page: Page) -> None:
    search(page, "yellow")
    first = page.run(SHOWN)
    page.run("document.querySelectorAll('.more')[3].click()")
    page.wait(f"{STATUS}.includes(' like ') && {HITS} === 24")
    assert page.run(SHOWN)[0] == first[3]
    assert page.run("document.getElementById('text').value") == ""
    page.run("history.back()")
    page.wait(f"{STATUS}.includes('for “yellow”')")
    assert page.run(SHOWN) == first


def test_ridge_regression_is_shown_side_by_side(page: Page, client: Client) -> None:
    search(page, "red")
    page.run("document.getElementById('compare').click()")
    page.wait(f"{HITS} === 48")
    found = client.search("red", options="&systems=fusion,ridge").content["systems"]
    of_fusion, of_ridge = ([hit["id"] for hit in found[name]] for name in ("fusion", "ridge"))
    assert page.run(SHOWN) == of_fusion + of_ridge
    assert page.run("[...document.querySelectorAll('h2')].map(one => one.textContent)")[:2] == [
        "Fusion: linear",
        "Ridge regression",
    ]
    alone = len(set(of_fusion) - set(of_ridge))
    assert page.run("document.querySelectorAll('.only').length") == 2 * alone > 0
    page.run("document.getElementById('compare').click()")
    page.wait(f"{HITS} === 24")


def test_keyboard_alone_is_enough(page: Page) -> None:
    search(page, "green")
    for expected in ("choose-image", "search", "compare", "hit", "more", "hit"):
        page.press("Tab")
        assert page.run(FOCUS) == expected
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Tab", modifiers=8)
    page.press("Tab", modifiers=8)
    assert page.run(PLACE) == 0
    for key, expected in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowDown", 8), ("ArrowLeft", 7), ("ArrowUp", 1),
                          ("End", 23), ("Home", 0), ("ArrowLeft", 0), ("ArrowUp", 0)):  # fmt: skip
        page.press(key)
        assert page.run(PLACE) == expected, key
    page.press("Enter")
    page.wait(OPEN)
    assert page.run(FOCUS) == "close"
    page.press("Escape")
    page.wait(f"!{OPEN}")
    assert page.run(PLACE) == 0
    page.press("Escape")
    assert page.run(FOCUS) == "text"
    assert page.run("document.getElementById('text').value") == ""


def test_dialog_shows_the_photo_and_where_the_model_looked(page: Page) -> None:
    search(page, "blue")
    page.run("document.querySelector('.hit').click()")
    page.wait(f"{OPEN} && document.querySelector('#frame img').naturalWidth > 0")
    page.run("document.getElementById('look').click()")
    page.wait("document.getElementById('heat') !== null")
    assert page.run("(() => { const one = document.getElementById('heat'); return [one.width, one.height] })()") == [
        4,
        3,
    ]
    inside = """(() => { const [map, photo] = ["#heat", "#frame img"].map(one =>
        document.querySelector(one).getBoundingClientRect());
        return [(map.left - photo.left) / photo.width, (map.right - photo.left) / photo.width,
                (map.top - photo.top) / photo.height, (map.bottom - photo.top) / photo.height] })()"""
    assert page.run(inside) == pytest.approx([0.25, 0.75, 0, 1], abs=0.01)
    last = "[...document.getElementById('heat').getContext('2d').getImageData(3, 2, 1, 1).data]"
    assert page.run(last) == [255, 235, 30, 215]
    assert page.run("document.getElementById('why').textContent") == "attention with blue"
    page.run("document.getElementById('look').click()")
    page.wait("document.getElementById('heat') === null")
    page.press("Escape")


def test_show_more_extends_the_list(page: Page) -> None:
    search(page, "discs")
    first = page.run(SHOWN)
    page.run("document.getElementById('further').click()")
    page.wait(f"{HITS} === 48")
    assert page.run(SHOWN)[:24] == first
    page.run("document.getElementById('further').click()")
    page.wait(f"{HITS} === 68 && document.getElementById('further').hidden")


def test_hostile_names_and_captions_stay_texts(page: Page, client: Client) -> None:
    search(page, "all")
    for count in (48, 68):
        page.run("document.getElementById('further').click()")
        page.wait(f"{HITS} === {count}")
    for name, caption in HOSTILE.items():
        shown = name.replace("\udcff", "\ufffd").replace("\udc80", "\ufffd")
        place = next(
            place for place, hit in enumerate(client.search("all", options="&k=68").content["systems"]["fusion"])
            if hit["id"] == name
        )  # fmt: skip
        card = f"document.querySelectorAll('.hits li')[{place}]"
        page.run(f"{card}.scrollIntoView()")
        assert page.run(f"{card}.querySelector('.id').textContent.toWellFormed()") == shown
        if caption.isprintable():
            assert page.run(f"{card}.querySelector('.caption').textContent") == caption
        page.wait(f"{card}.querySelector('img').naturalWidth > 0")
        page.run(f"{card}.querySelector('.more').click()")
        page.wait(f"{STATUS}.includes(' like ') && {HITS} === 24")
        assert page.run(f"{SHOWN}[0].toWellFormed()") == shown
        page.run("document.querySelector('.hit').click()")
        page.wait(f"{OPEN} && document.querySelector('#frame img')?.naturalWidth > 0")
        assert page.run("document.documentElement.scrollWidth") <= 1200
        page.press("Escape")
        page.run("history.back()")
        page.wait(f"{STATUS}.includes('for “all”')")
        for count in (48, 68):
            page.run("document.getElementById('further').click()")
            page.wait(f"{HITS} === {count}")
    assert page.run("window.hacked") is None
    assert page.run("document.querySelectorAll('.hits script, .hits svg, .hits a').length") == 0


@pytest.mark.parametrize("hash", ["#like=%3Cscript%3E", "#like=%25ff", "#text=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E",
                                  "#%", "#text=" + "a" * 5000])  # fmt: skip
def test_hostile_addresses_do_no_harm(browser: Page, client: Client, hash: str) -> None:
    open_page(browser, client, hash=hash)
    browser.wait(f"{STATUS} !== 'Searching …'")
    assert browser.run("document.querySelectorAll('main img[src=x]').length") == 0
    search(browser, "red")


def test_errors_are_shown_in_words(browser: Page, served: FakeIndex, client: Client, tmp_path: Path) -> None:
    open_page(browser, client)
    browser.press("Enter")
    browser.wait(f"{STATUS} === 'Type a text or choose a photo first.'")
    for name, content, expected in (
        ("large.png", b"\0" * 1_000_001, "The photo has 1.0 MB, expected at most 1 MB."),
        ("no.png", b"no picture", "The photo: cannot identify image file"),
    ):
        (tmp_path / name).write_bytes(content)
        browser.upload("#file-image", tmp_path / name)
        browser.wait(f"{STATUS}.includes('{expected}')")
        assert browser.run("document.getElementById('status').className") == "wrong"
        browser.press("Escape")
    with serving(FakeIndex({"missing.png": "gone"}, no_ridge="No ridge here.", no_heat_map="no grid")) as other:
        open_page(browser, other)
        assert browser.run("document.getElementById('switch').hidden")
        assert browser.run("document.getElementById('alone').textContent") == "No ridge here."
        search(browser, "x", hits=1)
        browser.wait("document.querySelector('.photo').textContent === 'The photo cannot be shown: its file is gone'")
        browser.run("document.querySelector('.hit').click()")
        assert browser.run("document.getElementById('looks').hidden")
        browser.press("Escape")
    browser.run("document.getElementById('text').focus()")
    browser.press("Enter")
    browser.wait(f"{STATUS} === 'The server cannot be reached. Is saffe serve still running?'")


def test_sounds_have_players_and_missing_ones_a_reason(browser: Page, tmp_path: Path) -> None:
    with serving(FakeIndex({"a.wav": "high", "b.wav": "low", "missing.png": "gone"}, modality="audio")) as other:
        open_page(browser, other)
        browser.complaints.clear()
        search(browser, "x", hits=3)
        browser.run("document.querySelectorAll('audio').forEach(one => { one.preload = 'auto'; one.load() })")
        browser.wait("document.querySelectorAll('audio').length === 2")
        browser.wait("[...document.querySelectorAll('audio')].every(one => one.duration === 0.5)")
        assert browser.run("document.querySelector('.sound:not(audio)').textContent") == (
            "The sound cannot be played: its file is gone"
        )
        browser.run("document.querySelector('li:has(audio) .hit').click()")
        browser.wait(f"{OPEN} && document.querySelector('#frame audio') !== null")
        browser.press("Escape")
        browser.wait("document.querySelector('#frame audio') === null")


_CONTRAST = """(() => {
  const light = (color) => { const [r, g, b] = color.match(/[\\d.]+/g).map(one => { const part = one / 255;
    return part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4 });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const behind = (one) => { for (; one; one = one.parentElement) { const color = getComputedStyle(one).backgroundColor;
    if (!/, 0\\)$/.test(color)) return color } return "rgb(255, 255, 255)" };
  let least = [21, ""];
  for (const one of document.querySelectorAll("h1, h2, p, button, label, .numbers span, .numbers b, .caption, .id")) {
    if (!one.textContent.trim() || !one.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(one).color), light(behind(one))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least[0]) least = [ratio, one.outerHTML.slice(0, 80)];
  }
  return least })()"""


@pytest.mark.parametrize("width", [320, 360, 768, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_phones_in_light_and_dark(browser: Page, client: Client, width: int, dark: bool) -> None:
    browser.complaints.clear()
    open_page(browser, client, width, dark=dark)
    search(browser, "all")
    browser.run("run(asked, false, 68)")
    browser.wait(f"{HITS} === 68")
    for hits in (68, 136):
        browser.wait(f"{HITS} === {hits}")
        assert browser.run("document.documentElement.scrollWidth") <= width
        contrast, where = browser.run(_CONTRAST)
        assert contrast >= 4.5, where
        browser.run("document.getElementById('compare').click()")
    browser.run("document.querySelectorAll('.hit')[9].click()")
    browser.wait(f"{OPEN} && document.querySelector('#frame img').naturalWidth > 0")
    assert browser.run("document.getElementById('dialog').scrollWidth <= document.getElementById('dialog').clientWidth")
    assert browser.run("document.querySelector('#frame').getBoundingClientRect().right") <= width
    browser.press("Escape")
    assert not browser.complaints


def test_everything_has_a_name_for_screen_readers(page: Page) -> None:
    search(page, "all")
    page.run("document.querySelector('.hit').click()")
    page.wait(OPEN)
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    unnamed = [
        node["role"]["value"]
        for node in nodes
        if not node["ignored"]
        and node["role"]["value"] in ("button", "textbox", "switch", "dialog", "search")
        and not node["name"]["value"].strip()
    ]
    assert not unnamed
    assert {"dialog", "button", "switch"} <= {node["role"]["value"] for node in nodes if not node["ignored"]}
    page.press("Escape")
