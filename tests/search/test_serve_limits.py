"""What the web page's server keeps for everyone else when somebody takes: connections, memory, time."""

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("faiss", reason="needs the extra [search]")
pytest.importorskip("uvicorn", reason="needs the extra [search]")

from reid_dist.search import serve, web_app, web_connection, web_guard
from reid_dist.search.serve import ServeSettings
from tests.search.served import PHOTOS, Served, make_index, served
from tests.search.test_serve import TOKEN, base64_of, error_of, png

HEAD = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_index(tmp_path_factory.mktemp("limits"))


@pytest.fixture
def connect() -> Iterator[Any]:
    """`connect(page, first bytes)`: a connection, closed at the end."""
    with contextlib.ExitStack() as opened:

        def connected(page: Served, data: bytes = b"") -> socket.socket:
            made = opened.enter_context(socket.create_connection(("127.0.0.1", page.port), timeout=10))
            made.sendall(data)
            return made

        yield connected


def seconds_open(connection: socket.socket) -> float:
    """Until the server closes it, whatever it answers before."""
    began = time.monotonic()
    while connection.recv(65536):
        pass
    return time.monotonic() - began


def test_who_asks_nothing_makes_room(index: Path, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_connection, "IDLE_SECONDS", 1.0)
    monkeypatch.setattr(serve, "_MAX_CONNECTIONS", 6)
    with served(ServeSettings(index, port=0, token=TOKEN)) as page:
        idle = [connect(page, data) for data in (b"", b"GET / HT", b"GET / HTTP/1.1\r\n", b"\r\n", b"", b"")]
        time.sleep(0.2)
        assert page.ask("GET", "/")[0] == 503
        assert 0.3 < seconds_open(idle[0]) < 3 and all(seconds_open(each) < 1 for each in idle[1:])
        assert page.ask("GET", "/")[0] == 401
        # After an answer, too, and a part of a next request does not reset the clock.
        later = connect(page, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert later.recv(65536).startswith(b"HTTP/1.1 401")
        later.sendall(b"GET / HT")
        assert 0.3 < seconds_open(later) < 3


def test_who_asks_again_and_again_stays(index: Path, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_connection, "IDLE_SECONDS", 1.0)
    with served(ServeSettings(index, port=0)) as page:
        busy = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
        for _ in range(4):
            time.sleep(0.35)
            busy.request("GET", "/style.css")
            assert b"{" in busy.getresponse().read()  # it would raise on a closed connection
        busy.close()
        slow = connect(page, HEAD + b'Content-Length: 17\r\n\r\n{"text":')
        time.sleep(1.3)  # a body may take longer
        slow.sendall(b' "a man"}')
        assert slow.recv(100).startswith(b"HTTP/1.1 200")


def test_the_form_for_the_token_is_not_waited_for(index: Path, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_guard, "_FORM_SECONDS", 0.3)
    with served(ServeSettings(index, port=0, token=TOKEN)) as page:
        slow = connect(page, b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\ntok")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("length", [b"Content-Length: 200000", b"Transfer-Encoding: chunked"])
def test_few_photos_are_held_at_once(index: Path, length: bytes, connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_app, "_PATIENCE_SECONDS", 0.3)
    with served(ServeSettings(index, port=0)) as page:
        part = b"3E8\r\n" + bytes(1000) + b"\r\n" if length.startswith(b"T") else bytes(1000)
        held = [connect(page, HEAD + length + b"\r\n\r\n" + part) for _ in range(web_app._UPLOADS)]
        time.sleep(0.2)
        photo = {"image": base64_of(png((300, 300)))}
        assert len(photo["image"]) > 100_000
        status, line = error_of(page.ask("POST", "/api/search", photo))
        assert status == 503 and "try again" in line
        assert len(page.search(text="a person")["hits"]) == PHOTOS  # a description needs no room
        held[0].close()
        monkeypatch.setattr(web_app, "_PATIENCE_SECONDS", 10.0)
        assert len(page.search(**photo)["hits"]) == PHOTOS
        for each in held:
            each.close()


def test_few_photos_are_decoded_at_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def counted(decode: Any) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.05)
            try:
                return decode(*arguments, **named)
            finally:
                with lock:
                    now[0] -= 1

        return wrapped

    monkeypatch.setattr(web_app, "decode_picture", counted(web_app.decode_picture))
    monkeypatch.setattr(web_app.PhotoIndex, "thumbnail", counted(web_app.PhotoIndex.thumbnail))
    with served(ServeSettings(index, port=0)) as page:
        generation = page.search(text="a person", count=1)["generation"]
        asked = [("GET", f"/thumbnail/{generation}/{number}", None) for number in range(PHOTOS)]
        asked.insert(2, ("POST", "/api/search", {"image": base64_of(png())}))
        answers: list[int] = []
        threads = [threading.Thread(target=lambda each=each: answers.append(page.ask(*each)[0])) for each in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [200] * len(asked) and most[0] == 2


def test_photos_to_search_with_have_a_lower_cap(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_app, "_UPLOAD_PIXELS", 30 * 60)
    with served(ServeSettings(index, port=0)) as page:
        assert page.search(image=base64_of(png((30, 60))))["hits"]
        status, line = error_of(page.ask("POST", "/api/search", {"image": base64_of(png((30, 61)))}))
        assert status == 400 and "1830 pixels, more than the cap of 1800" in line


def test_wrong_tokens_hold_no_connection(index: Path) -> None:
    """A wait would slow nobody down who asks in parallel."""
    with served(ServeSettings(index, port=0, token=TOKEN)) as page:
        began = time.monotonic()
        for _ in range(5):
            assert page.ask("GET", "/?token=wrong")[0] == page.ask("POST", "/login", "token=wrong")[0] == 401
        assert time.monotonic() - began < 1
