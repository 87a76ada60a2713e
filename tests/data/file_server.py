"""A folder behind http for the tests of remote sets, with a server that can misbehave."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Server:
    """A folder behind http, with faults: each request for a file takes the next fault from its list."""

    folder: Path
    url: str = ""
    faults: dict[str, list[str]] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        name = unquote(parts.path).rpartition("/")[2]
        asked = handler.headers.get("Range", "")
        self.requests.append((name, asked, parts.query))
        waiting = self.faults.get(name, [])
        fault = waiting.pop(0) if waiting else ""
        if fault == "hang":
            time.sleep(1)
        if fault.isdigit():
            return self._error(handler, int(fault))
        file = self.folder / name
        if not file.is_file():
            return self._error(handler, 404)
        data, status, extra = file.read_bytes(), 200, {}
        if asked and fault != "ignore range":
            first, last = (int(number) for number in re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
            if first >= len(data):
                return self._error(handler, 416)
            extra = {"Content-Range": f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"}
            data, status = data[first : last + 1], 206
            if fault == "other range":
                extra = {"Content-Range": f"bytes {first + 1}-{last}/9999999"}
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "short":
            data = data[: len(data) // 2]
        if fault == "long":
            data += b"more"
        handler.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "ETag": '"1"', **extra}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return None
        if fault == "cut":
            handler.wfile.write(data[: len(data) // 2])
            handler.close_connection = True
            return None
        handler.wfile.write(data)
        return None

    def _error(self, handler: BaseHTTPRequestHandler, status: int) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", "0")
        handler.end_headers()


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder at /bucket/<its name> until the block ends."""
    state = Server(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.answer(self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that hangs up is none of ours."""

    http = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    state.url = f"http://127.0.0.1:{http.server_port}/bucket/{folder.name}"
    try:
        yield state
    finally:
        http.shutdown()
        http.server_close()
