"""The server of the web page by raw requests: who is answered, what is refused, and what no request reaches."""

import base64
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reid_dist.errors import UserError
from reid_dist.search.change import delete
from reid_dist.search.entries import Filter
from reid_dist.search.index import PhotoIndex
from reid_dist.search.query import combine
from reid_dist.search.serve import ServeSettings, open_page, serve
from reid_dist.trained import load
from tests.search.served import PHOTOS, Served, make_index, served, set_threshold

pytest.importorskip("faiss", reason="needs the extra [search]")
pytest.importorskip("uvicorn", reason="needs the extra [search]")

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_index(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def page(index: Path) -> Iterator[Served]:
    with served(ServeSettings(index, port=0, max_upload_mb=0.25, examples=("a red coat",))) as found:
        yield found


@pytest.fixture(scope="module")
def guarded(index: Path) -> Iterator[Served]:
    with served(ServeSettings(index, port=0, token=TOKEN)) as found:
        yield found


def png(size: tuple[int, int] = (30, 60), noise: bool = True) -> bytes:
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    if noise:
        pixels = np.random.default_rng(1).integers(0, 256, pixels.shape, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def error_of(answer: tuple[int, dict[str, str], bytes]) -> tuple[int, str]:
    line = json.loads(answer[2])["error"]
    assert "\n" not in line and line
    return answer[0], line


def test_search_finds_what_the_index_finds(page: Served, index: Path) -> None:
    opened, model = PhotoIndex.open(index), load(index.parent / "run", "cpu")
    found = page.search(text="a person in a red coat", count=5, camera="door 0", since="2026-05-02")
    hits = opened.search(combine(model, "a person in a red coat"), 5, Filter(camera="door 0", since="2026-05-02"))
    assert [hit["number"] for hit in found["hits"]] == [hit.row for hit in hits] and len(hits) == 3
    np.testing.assert_allclose([hit["score"] for hit in found["hits"]], [hit.score for hit in hits], rtol=1e-6)
    first = found["hits"][0]
    assert first["file"] == hits[0].entry.file and first["camera"] == "door 0" and first["rank"] == 1
    assert found["threshold"] is None and not found["unknown"] and all(hit["known"] for hit in found["hits"])


def test_a_photo_finds_itself_by_upload_and_by_number(page: Served, index: Path) -> None:
    data = (index.parent / "photos" / "3.png").read_bytes()
    found = page.search(image=base64_of(data), count=1)
    assert found["hits"][0]["number"] == 3 and found["hits"][0]["score"] == pytest.approx(1, abs=2e-3)
    both = page.search(text="a blue coat", image=base64_of(data), weight=0.0, count=1)
    assert both["hits"] == found["hits"]


def test_a_photo_of_the_index_is_searched_with_by_its_stored_features(tmp_path: Path) -> None:
    """The file need not be there any more, nor decode to the same pixels as when it was indexed."""
    index = make_index(tmp_path)
    opened, model = PhotoIndex.open(index), load(tmp_path / "run", "cpu")
    stored_D = opened.vectors_ND[3].astype(np.float32)
    os.remove(opened.entries[3].file)
    with served(ServeSettings(index, port=0)) as page:
        generation = page.search(text="a person", count=1)["generation"]
        found = page.search(similar=3, generation=generation, count=PHOTOS)
        assert found["hits"][0]["number"] == 3
        assert [hit["score"] for hit in found["hits"]] == [hit.score for hit in opened.search(stored_D, PHOTOS)]
        both = page.search(similar=3, generation=generation, text="a red coat", weight=0.25, count=PHOTOS)
        hits = opened.search(0.25 * combine(model, "a red coat") + 0.75 * stored_D, PHOTOS)
        assert [hit["number"] for hit in both["hits"]] == [hit.row for hit in hits]
        np.testing.assert_allclose([hit["score"] for hit in both["hits"]], [hit.score for hit in hits], rtol=1e-5)


def test_names_that_are_not_utf8_are_told_and_shown(tmp_path: Path) -> None:
    index = make_index(tmp_path, odd_names=True)
    with served(ServeSettings(index, port=0)) as page:
        found = page.search(text="a person", count=PHOTOS)
        odd = [hit for hit in found["hits"] if hit["file"].endswith("/odd \udcff\udcfe.png")]
        assert len(odd) == 1
        path = f"/thumbnail/{found['generation']}/{odd[0]['number']}"
        assert page.ask("GET", path)[0] == 200
        os.remove(odd[0]["file"])
        assert error_of(page.ask("GET", path))[0] == 404  # the line names the file


def test_index_is_described(page: Served) -> None:
    status, headers, body = page.ask("GET", "/api/index")
    found = json.loads(body)
    assert status == 200 and found["photos"] == PHOTOS and found["people"] == ["0", "1", "2", "3"]
    assert "door 0" in found["cameras"] and found["has_dates"] and found["examples"] == ["a red coat"]
    assert headers["cache-control"] == "no-store"


def test_thumbnails_are_upright_jpegs_of_the_photos(page: Served, index: Path) -> None:
    found = page.search(text="a person", count=PHOTOS)
    assert len(found["hits"]) == PHOTOS
    for hit in found["hits"]:
        status, headers, body = page.ask("GET", f"/thumbnail/{found['generation']}/{hit['number']}")
        assert status == 200 and headers["content-type"] == "image/jpeg" and headers["cache-control"] == "no-store"
        shown, source = Image.open(io.BytesIO(body)), Image.open(hit["file"])
        assert shown.size == source.size
        difference = np.abs(np.asarray(shown, np.int16) - np.asarray(source.convert("RGB"), np.int16))
        assert difference.mean() < 12


@pytest.mark.parametrize(
    "path",
    [
        "/thumbnail/{generation}/8",
        "/thumbnail/{generation}/-1",
        "/thumbnail/{generation}/0.5",
        "/thumbnail/{generation}/99999999999999999999999999",
        "/thumbnail/{generation}/" + 5000 * "9",
        "/thumbnail/0000000000000000/0",
        "/thumbnail/{generation}/../../../../etc/passwd",
        "/thumbnail/{generation}/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/thumbnail/{generation}/..%5c..%5cwindows",
        "/../../../../etc/passwd",
        "/..%2f..%2f..%2fetc%2fpasswd",
        "//etc/passwd",
        "/page/login.html",
        "/serve.py",
        "/manifest.json",
        "/vectors.npy",
        "/style.css/../serve.py",
        "/%00",
        "/file=/etc/passwd",
        "/docs",
        "/openapi.json",
    ],
)
def test_no_path_leads_to_a_file(page: Served, path: str) -> None:
    path = path.format(generation=page.search(text="a person", count=1)["generation"])
    status, line = error_of(page.ask("GET", path))
    assert status in (404, 410) and "root:" not in line


@pytest.mark.parametrize(
    ("query", "status", "says"),
    [
        ({}, 400, "empty"),
        ({"text": "  \n "}, 400, "empty"),
        ({"text": "a" * 20_001}, 400, "text: "),
        ({"text": 5}, 400, "text: "),
        ({"text": "a", "count": 0}, 400, "count: "),
        ({"text": "a", "count": 101}, 400, "count: "),
        ({"text": "a", "weight": 1.5}, 400, "weight: "),
        ({"text": "a", "since": "yesterday"}, 400, "not a date"),
        ({"text": "a", "unheard": 1}, 400, "unheard: "),
        ({"image": "###"}, 400, "base64"),
        ({"image": base64_of(b"GIF89a" + bytes(50))}, 400, "the photo: the image does not decode"),
        ({"image": base64_of(png()[:200])}, 400, "the photo: the image does not decode"),
        ({"image": base64_of(bytes(270_000))}, 413, "0.25 MB"),
        ({"similar": 3, "generation": "old"}, 410, "search again"),
        ({"similar": 3}, 410, "search again"),
    ],
)
def test_wrong_searches_are_refused_in_one_line(page: Served, query: dict[str, Any], status: int, says: str) -> None:
    found = error_of(page.ask("POST", "/api/search", query))
    assert found[0] == status and says in found[1]


def test_number_outside_the_index_is_refused(page: Served) -> None:
    generation = page.search(text="a person", count=1)["generation"]
    for number in (-1, PHOTOS):
        found = error_of(page.ask("POST", "/api/search", {"similar": number, "generation": generation}))
        assert found == (404, f"there is no photo {number}")


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "null", '{"text": "\\ud800"}', "[" * 10_000, b"\xff\xfe", '{"text": NaN}']
)
def test_what_is_no_search_is_refused(page: Served, body: str | bytes) -> None:
    assert error_of(page.ask("POST", "/api/search", body, {"Content-Type": "application/json"}))[0] == 400


def test_forms_of_other_pages_are_refused(page: Served) -> None:
    """A page elsewhere can make a browser send these types unasked, but not JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert error_of(page.ask("POST", "/api/search", '{"text": "a"}', {"Content-Type": kind}))[0] == 415
    assert page.ask("GET", "/api/search")[0] == 405


def test_long_description_counts_by_its_first_words(page: Served) -> None:
    long = page.search(text=" ".join(["a person in a red coat"] * 167))
    assert long["hits"] and long["hits"] == page.search(text=" ".join(["a person in a red coat"] * 160))["hits"]


def test_bomb_is_refused_before_it_is_decoded(page: Served) -> None:
    """Half a gigabyte of pixels in a file of kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (30_000).to_bytes(4, "big") + (20_000).to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes(1 + 30_000 // 8) * 20_000)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    began = time.monotonic()
    status, line = error_of(page.ask("POST", "/api/search", {"image": base64_of(bomb)}))
    assert status == 400 and "600000000 pixels" in line and time.monotonic() - began < 2


def test_large_body_is_refused_unread(page: Served) -> None:
    head = "POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    announced = page.raw(f"{head}Content-Length: 99999999999\r\n\r\n".encode())
    assert announced.startswith(b"HTTP/1.1 413")
    part = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    streamed = page.raw(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + part * 8)
    assert streamed.startswith(b"HTTP/1.1 413")
    assert page.raw(f"{head}Content-Length: -5\r\n\r\n".encode()).startswith(b"HTTP/1.1 400")


def test_names_of_other_machines_are_refused_without_a_token(page: Served, guarded: Served) -> None:
    """A name whose address an attacker changes to this machine must not let their page read the answers."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        for path in ("/", "/api/index"):
            assert error_of(page.ask("GET", path, headers={"Host": host}))[0] == 403
    for host in ("localhost", "LOCALHOST:7860", "127.0.0.1:1", "192.168.1.7:7860", "[::1]:7860", "[::1]"):
        assert page.ask("GET", "/api/index", headers={"Host": host})[0] == 200
    allowed = {"Host": "photos.example", "Authorization": f"Bearer {TOKEN}"}
    assert guarded.ask("GET", "/api/index", headers=allowed)[0] == 200


ROUTES = ["/", "/style.css", "/script.js", "/api/index", "/api/search", "/thumbnail/0/0", "/login", "/nothing"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
def test_every_route_needs_the_token(guarded: Served, method: str, path: str) -> None:
    if (method, path) == ("POST", "/login"):
        return  # answers with the form again
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": f"photo_search_{guarded.port}=wrong"}):
        status, _, body = guarded.ask(method, path, headers=headers)
        assert status == 401 and b"door 0" not in body and b"script" not in body


def test_token_opens_every_route_and_the_cookie_holds_it_not(guarded: Served) -> None:
    form = "token=" + TOKEN
    status, headers, _ = guarded.ask("POST", "/login", form, {"Content-Type": "application/x-www-form-urlencoded"})
    cookie = headers["set-cookie"]
    assert status == 303 and headers["location"] == "./" and TOKEN not in cookie
    assert "httponly" in cookie.lower() and "samesite=strict" in cookie.lower()
    assert guarded.ask("GET", f"/?token={TOKEN}")[1]["set-cookie"] == cookie
    for sent in ({"Cookie": cookie.partition(";")[0]}, {"Authorization": f"Bearer {TOKEN}"}):
        for path in ("/", "/style.css", "/script.js", "/api/index"):
            assert guarded.ask("GET", path, headers=sent)[0] == 200
        found = json.loads(guarded.ask("POST", "/api/search", {"text": "a coat"}, sent)[2])
        path = f"/thumbnail/{found['generation']}/{found['hits'][0]['number']}"
        assert guarded.ask("GET", path, headers=sent)[0] == 200 and guarded.ask("GET", path)[0] == 401


def test_wrong_token_is_told(guarded: Served) -> None:
    for path in ("/?token=wrong", "/?token=%ff%00"):
        status, headers, body = guarded.ask("GET", path)
        assert status == 401 and b"This is not the token" in body and "set-cookie" not in headers
    assert guarded.ask("POST", "/login", "token=" + "x" * 5000)[0] == 413


def test_page_may_load_nothing_from_elsewhere(page: Served) -> None:
    for path in ("/", "/style.css", "/script.js"):
        _, headers, body = page.ask("GET", path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers
        for outside in (b"http://", b"https://", b"url(", b"@import", b'"//', b"innerHTML ="):
            assert outside not in body


def test_deleted_photos_are_not_served_any_more(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    with served(ServeSettings(index, port=0)) as page:
        found = page.search(text="a person", count=PHOTOS)
        old = f"/thumbnail/{found['generation']}/7"
        assert page.ask("GET", old)[0] == 200
        delete(index, Filter(camera="door 0"))
        assert error_of(page.ask("GET", old)) == (410, "the index has changed since this search; search again")
        left = page.search(text="a person", count=PHOTOS)
        assert {hit["camera"] for hit in left["hits"]}.isdisjoint({"door 0"}) and left["hits"]
        os.remove(left["hits"][0]["file"])
        gone = page.ask("GET", f"/thumbnail/{left['generation']}/{left['hits'][0]['number']}")
        assert error_of(gone)[0] == 404
        set_threshold(index, 2.0)
        unknown = page.search(text="a person", count=2)
        assert unknown["calibrated"] and not left["calibrated"]
        assert unknown["unknown"] and unknown["threshold"] == 2 and not unknown["hits"][0]["known"]
        (index / "entries.jsonl").write_bytes(b"damaged")
        set_threshold(index, 1.0)
        assert "does not match its hash" in error_of(page.ask("POST", "/api/search", {"text": "a person"}))[1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"token": "short"}, "--token: use 12 or more"),
        ({"token": "with spaces in it"}, "--token: use 12 or more"),
        ({"max_upload_mb": 0}, "--max-upload-mb 0"),
        ({"max_upload_mb": float("nan")}, "--max-upload-mb nan"),
        ({"port": 70_000}, "--port 70000"),
        ({"host": "no.such.host.invalid"}, "--host no.such.host.invalid"),
        ({"host": "192.0.2.1"}, "--host 192.0.2.1"),
        ({"index": Path("/nowhere")}, "/nowhere: no index"),
        ({"model": Path("nowhere")}, "nowhere: no exported model"),
    ],
)
def test_wrong_settings_are_refused(index: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match="^" + says.replace("-", "[-]")):
        open_page(ServeSettings(**{"index": index, "port": 0, **changes}))


def test_missing_library_names_the_extra(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"^serve: needs uvicorn; install the extra: pip install -e '.\[search\]'$"):
        open_page(ServeSettings(index, port=0))


def test_port_that_is_taken_is_told(index: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port}: .*in use"):
            open_page(ServeSettings(index, port=port))


@pytest.mark.parametrize(
    ("host", "token", "warns"),
    [
        ("127.0.0.1", None, ""),
        ("localhost", None, ""),
        ("127.0.0.1", "auto", ""),
        ("0.0.0.0", None, "add --token auto"),
        ("0.0.0.0", TOKEN, "unencrypted"),
    ],
)
def test_whoever_opens_the_page_to_others_is_warned(index: Path, host: str, token: str | None, warns: str) -> None:
    page = open_page(ServeSettings(index, host=host, port=0, token=token))
    page.listener.close()
    assert [warns in line for line in page.warnings] == ([True] if warns else [])
    assert page.address.startswith(f"http://{host}:") and ("?token=" in page.address) == (token == "auto")
    assert TOKEN not in page.address


def _serve(settings: ServeSettings, output: Path) -> None:
    with output.open("w") as sys.stdout:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        serve(settings)
    os._exit(7)


def test_interrupt_ends_it_cleanly(index: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(ServeSettings(index, port=0), output))
    process.start()
    try:
        deadline = time.monotonic() + 20
        while "Ctrl+C" not in (output.read_text() if output.exists() else "") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert f"{PHOTOS} photos at http://127.0.0.1:" in output.read_text()
        time.sleep(0.3)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(10)
        assert process.exitcode == 7
    finally:
        process.kill()
        process.join()
