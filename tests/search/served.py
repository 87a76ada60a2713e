"""An index of eight photographs of a tiny model, and a page of it that a thread serves."""

import contextlib
import csv
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reid_dist.search.change import add
from reid_dist.search.serve import ServeSettings, open_page
from reid_dist.search.sources import list_source
from reid_dist.trained import load
from tests.test_trained import make

HOSTILE = '<img src=x onerror="document.title=1">'
PHOTOS = 8


def make_index(folder: Path, odd_names: bool = False) -> Path:
    """Photographs of one colour each; `folder/run` holds the model, `folder/photos` the photographs."""
    run = make("vit", folder)[2]
    photos, random = folder / "photos", np.random.default_rng(0)
    photos.mkdir()
    rows = []
    for number in range(PHOTOS):
        pixels = random.integers(0, 256, (4, 2, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50 + number, 120), Image.Resampling.NEAREST).save(photos / f"{number}.png")
        rows.append([f"{number}.png", number // 2, HOSTILE if number == 5 else f"door {number % 2}"])
        rows[-1].append(f"2026-05-0{1 + number}T12:30:00")
    with (photos / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "person", "camera", "date"], *rows])
    if odd_names:
        (photos / "7.png").rename(photos / "odd \udcff\udcfe.png")  # bytes that are not UTF-8
    add([load(run, "cpu")], list_source(str(photos)), folder / "photos.index")
    return folder / "photos.index"


def set_threshold(index: Path, score: float | None) -> None:
    """What `calibrate` leaves in the manifest, without measuring anything."""
    path = index / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["thresholds"] = {} if score is None else {"text": {"score": score}, "image": {"score": score}}
    changed = path.with_suffix(".new")
    changed.write_text(json.dumps(manifest))
    changed.rename(path)


class Served:
    """A page that is being served."""

    def __init__(self, address: str, port: int) -> None:
        self.address, self.port = address, port

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in small letters) and body; the path is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = dict(headers or {})
        if isinstance(body, dict):
            body = json.dumps(body)
            headers.setdefault("Content-Type", "application/json")
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        connection.close()
        return found

    def search(self, **query: Any) -> Any:
        """The content of a search's answer."""
        return json.loads(self.ask("POST", "/api/search", query)[2])

    def raw(self, request: bytes) -> bytes:
        """The first bytes that come back for bytes as they are."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(request)
            return connection.recv(65536)


@contextlib.contextmanager
def served(settings: ServeSettings) -> Iterator[Served]:
    """Serves on a free port until the block ends."""
    page = open_page(settings)
    thread = threading.Thread(target=page.server.run, kwargs={"sockets": [page.listener]}, daemon=True)
    thread.start()
    try:
        yield Served(page.address, page.listener.getsockname()[1])
    finally:
        page.server.should_exit = True
        thread.join(10)
        page.listener.close()
        assert not thread.is_alive()
