"""The web page in a real browser: what a person with a keyboard, a telephone or a hostile file name sees."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reid_dist.search.change import delete
from reid_dist.search.entries import Filter
from reid_dist.search.serve import ServeSettings
from tests.search.served import HOSTILE, PHOTOS, Served, make_index, served, set_threshold

CHROMIUM = "/usr/bin/chromium"
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra [dev]")
pytest.importorskip("faiss", reason="needs the extra [search]")
pytest.importorskip("uvicorn", reason="needs the extra [search]")
pytestmark = pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason=f"needs a browser, {CHROMIUM}")

SIZES = {"desk": (1280, 900), "phone": (390, 844)}
TOKEN = "0123456789abcdef"
DESCRIBED = "#summary:has-text('photo'), #token"  # the page knows the index, or asks for the token


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_index(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def server(index: Path) -> Iterator[Served]:
    with served(ServeSettings(index, port=0, max_upload_mb=0.25)) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        # --no-sandbox: Chromium refuses to run as root with it, and the page is our own.
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Any, server: Served, index: Path) -> Iterator[Callable[..., Any]]:
    """`open_page(size)`: the page; at the end nothing was asked of other machines, and no script failed."""
    contexts, problems = list[Any](), list[str]()

    def opened(size: str = "desk", address: str = server.address) -> Any:
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, has_touch=size == "phone")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: outside(request.url))
        page.goto(address)
        page.locator(DESCRIBED).first.wait_for()
        return page

    def outside(url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "blob:", "data:")):
            problems.append(url)

    set_threshold(index, None)
    yield opened
    for context in contexts:
        context.close()
    assert not problems


def scores(page: Any) -> list[float]:
    return [float(text) for text in page.locator(".card .score").all_inner_texts()]


def find(page: Any, text: str) -> None:
    page.get_by_label("Describe the person").fill(text)
    page.get_by_role("button", name="Search", exact=True).click()
    page.locator(".card").first.wait_for()


def wait(page: Any, condition: str) -> None:
    """Until a condition in JavaScript holds; playwright's own would compile it in the page, whose policy forbids it."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(20)
    raise AssertionError(condition)


def fits(page: Any) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_example_shows_ranked_photos(open_page: Callable[..., Any]) -> None:
    page = open_page()
    assert page.locator("#summary").inner_text() == f"{PHOTOS} photos · 3 cameras"
    page.locator("#examples button").first.click()
    page.locator(".card").first.wait_for()
    assert page.locator(".card").count() == PHOTOS and scores(page) == sorted(scores(page), reverse=True)
    assert page.locator(".rank").all_inner_texts() == [str(rank) for rank in range(1, PHOTOS + 1)]
    wait(page, "[...document.querySelectorAll('.photo img')].every((image) => image.naturalWidth > 0)")
    assert "most similar photos" in page.locator("#results-title").inner_text()


def test_photo_and_description_together(open_page: Callable[..., Any], index: Path) -> None:
    page = open_page()
    page.get_by_label("Or show a photo").set_input_files(index.parent / "photos" / "2.png")
    assert page.get_by_label("What counts more?").is_hidden()
    page.get_by_role("button", name="Search", exact=True).click()
    page.locator(".card").first.wait_for()
    assert scores(page)[0] == pytest.approx(1, abs=2e-3)
    page.get_by_label("Describe the person").fill("a person in a red coat")
    page.get_by_label("What counts more?").fill("1")
    page.get_by_role("button", name="Search", exact=True).click()
    wait(page, "document.querySelector('.card .score')?.textContent < '0.99'")
    page.get_by_role("button", name="Remove").click()
    assert page.get_by_label("What counts more?").is_hidden() and page.locator("#preview").is_hidden()


def test_photo_dropped_anywhere_is_searched_with(open_page: Callable[..., Any], index: Path) -> None:
    page = open_page()
    data = list((index.parent / "photos" / "6.png").read_bytes())
    transfer = page.evaluate_handle(
        "(data) => { const made = new DataTransfer();"
        " made.items.add(new File([new Uint8Array(data)], 'dropped.png', { type: 'image/png' })); return made; }",
        data,
    )
    page.dispatch_event("#results", "drop", {"dataTransfer": transfer})
    assert page.locator("#preview-name").inner_text() == "dropped.png"
    page.get_by_role("button", name="Search", exact=True).click()
    page.locator(".card").first.wait_for()
    assert scores(page)[0] == pytest.approx(1, abs=2e-3)
    assert page.locator(".card").first.get_attribute("aria-label").endswith("6.png")


def test_filters_narrow_and_say_when_nothing_is_left(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.get_by_label("Camera").select_option("door 1")
    page.get_by_label("From").fill("2026-05-03")
    assert page.locator("#filter-count").inner_text() == "2 set"
    find(page, "a person")
    assert page.locator(".card").count() == 2
    page.get_by_label("Person", exact=True).fill("nobody")
    page.get_by_role("button", name="Search", exact=True).click()
    page.get_by_role("heading", name="No photo fits the filters").wait_for()
    page.get_by_role("button", name="Clear").click()
    page.locator("#filter-count").wait_for(state="hidden")
    page.locator("#examples button").first.wait_for(state="visible")


def test_a_search_before_the_index_is_described_stays(open_page: Callable[..., Any]) -> None:
    page = open_page()
    held = list[Any]()
    page.route("**/api/index", lambda route: held.append(route))
    page.reload()
    find(page, "a person")
    held[0].continue_()
    page.locator(DESCRIBED).wait_for()
    assert page.locator(".card").count() == PHOTOS


def test_unknown_person_is_told(open_page: Callable[..., Any], index: Path) -> None:
    page = open_page()
    set_threshold(index, 2.0)
    find(page, "a blue coat")
    assert page.get_by_role("heading", name="Probably unknown").is_visible()
    assert "below the threshold of 2.000" in page.get_by_role("status").inner_text()
    assert page.locator(".below .card").count() == PHOTOS
    middle = (scores(page)[3] + scores(page)[4]) / 2
    set_threshold(index, middle)
    find(page, "a blue coat ")
    page.get_by_role("heading", name="4 likely matches").wait_for()
    assert page.locator(".below .card").count() == 4 and page.locator("#notice").is_hidden()
    page.get_by_label("Or show a photo").set_input_files(index.parent / "photos" / "2.png")
    page.get_by_role("button", name="Search", exact=True).click()
    page.get_by_text("no threshold was calibrated for this kind of search").wait_for()


def test_errors_are_told_in_the_page(open_page: Callable[..., Any], tmp_path: Path) -> None:
    page = open_page()
    page.get_by_role("button", name="Search", exact=True).click()
    assert "Nothing to search for" in page.get_by_role("alert").inner_text()
    broken, large, other = tmp_path / "broken.jpg", tmp_path / "large.png", tmp_path / "text.pdf"
    broken.write_bytes(b"\xff\xd8\xff" + bytes(100))
    large.write_bytes(bytes(300_000))
    other.write_bytes(b"%PDF")
    page.locator("#photo").set_input_files(broken)
    page.get_by_role("button", name="Search", exact=True).click()
    page.get_by_text("the photo: the image does not decode").wait_for()
    for file, line in ((large, "The photo is larger"), (other, "Not a JPEG, PNG or WebP")):
        page.locator("#photo").set_input_files(file)
        assert line in page.locator("#photo-problem").inner_text() and page.locator("#preview").is_hidden()
    page.route("**/api/search", lambda route: route.abort())
    page.get_by_label("Describe the person").fill("a coat")
    page.get_by_role("button", name="Search", exact=True).click()
    page.get_by_text("The server does not answer").wait_for()


def test_keyboard_alone_searches_opens_and_closes(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.locator("#examples button").first.wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    page.keyboard.type("a red coat")
    page.keyboard.press("Enter")
    page.locator(".card").first.wait_for()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "card":
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog").is_visible() and "Rank 1" in page.get_by_role("dialog").inner_text()
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").is_hidden()
    assert page.evaluate("document.activeElement.className") == "card"


def test_found_photo_is_searched_with(open_page: Callable[..., Any]) -> None:
    page = open_page()
    find(page, "a red coat")
    wanted = page.locator(".card").nth(4).get_attribute("aria-label").rpartition("File ")[2]
    page.locator(".card").nth(4).click()
    page.get_by_role("button", name="Search with this photo").click()
    wait(page, "document.querySelector('.card .score')?.textContent > '0.99'")
    assert page.locator(".card").first.get_attribute("aria-label").endswith(wanted)
    assert page.get_by_label("Describe the person").input_value() == ""


def test_hostile_names_are_only_text(open_page: Callable[..., Any]) -> None:
    page = open_page()
    find(page, "a red coat")
    assert page.locator(".card").get_by_text(HOSTILE).is_visible() and page.title() == "Photo search"
    assert page.locator("img[src=x]").count() == 0 and HOSTILE in page.locator("#camera").inner_text()


def test_phone_reaches_every_control(open_page: Callable[..., Any], index: Path) -> None:
    page = open_page("phone")
    assert fits(page) and not page.locator("#filters").get_attribute("open")
    page.locator("summary").click()
    page.locator("#photo").set_input_files(index.parent / "photos" / "2.png")
    page.get_by_label("Describe the person").fill("a_word_without_end_" * 20)
    assert fits(page)
    controls = page.locator("textarea, select, button, summary, input:not(#photo)")
    for control in controls.all():
        if control.is_visible():
            control.scroll_into_view_if_needed()
            box = control.bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and 0 <= box["y"] < 844
            assert box["height"] >= (28 if control.get_attribute("type") == "range" else 40)
    page.get_by_role("button", name="Search", exact=True).tap()
    page.locator(".card").first.wait_for()
    wait(page, "document.querySelector('#results').getBoundingClientRect().top < 200")
    assert fits(page)
    page.locator(".card").first.tap()
    assert fits(page) and page.get_by_role("button", name="Close").is_visible()


def test_every_control_has_a_name(open_page: Callable[..., Any]) -> None:
    page = open_page()
    find(page, "a red coat")
    nameless = page.evaluate(
        "[...document.querySelectorAll('textarea, select, input, button, dialog')].filter((control) => !("
        "control.labels?.length || control.getAttribute('aria-label') || control.textContent.trim()"
        ")).map((control) => control.outerHTML)"
    )
    assert nameless == []


def test_empty_index_is_told(open_page: Callable[..., Any], tmp_path: Path) -> None:
    index = make_index(tmp_path)
    with served(ServeSettings(index, port=0)) as emptied:
        page = open_page("desk", emptied.address)
        page.locator("#examples button").first.wait_for()
        delete(index, Filter(since="2026"))
        page.locator("#examples button").first.click()
        page.get_by_role("heading", name="This index is empty").wait_for()
        page.reload()
        page.get_by_role("heading", name="This index is empty").wait_for()
        assert page.locator("#examples").is_hidden()


def test_token_is_asked_for_once(browser: Any, index: Path, open_page: Callable[..., Any]) -> None:
    with served(ServeSettings(index, port=0, token=TOKEN)) as guarded:
        page = open_page("phone", guarded.address)
        assert fits(page) and page.locator("#query").count() == 0
        page.get_by_label("Token").fill("not the right one")
        page.keyboard.press("Enter")
        page.get_by_text("This is not the token.").wait_for()
        page.get_by_label("Token").fill(TOKEN)
        page.keyboard.press("Enter")
        page.locator("#examples button").first.wait_for()
        assert TOKEN not in page.url
        find(page, "a red coat")
        wait(page, "document.querySelector('.photo img')?.naturalWidth > 0")
