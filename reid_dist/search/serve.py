"""The web page of an index: `python launch/search.py serve photos.index`.

Everything comes from this machine: no font, script or picture from elsewhere, and nothing is reported to anyone.
"""

import argparse
import contextlib
import ipaddress
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from reid_dist.search.index import PhotoIndex
from reid_dist.search.query import combine, load_model

EXAMPLES = (
    "a woman in a red coat with a black backpack",
    "a man in a gray hoodie, blue trousers and white sneakers",
    "an elderly lady in a long skirt who carries a handbag",
)
_RANDOM_TOKEN = "auto"  # noqa: S105
_SHORTEST_TOKEN = 12  # nothing else keeps guesses out
_MAX_CONNECTIONS = 200  # the system allows some hundreds of open files


@dataclass(frozen=True)
class ServeSettings:
    """How an index is shown.

    Attributes:
        index: its folder.
        model: folder of the model; None: where it was when the index was made.
        host: address to listen on; the default is reached from this machine alone.
        port: to listen on; 0: any free one.
        token: what visitors must know; `auto`: a random one, printed with the address; None: nothing.
        max_upload_mb: largest photograph to search with, in units of 2**20 bytes.
        examples: descriptions that the page offers.
    """

    index: Path
    model: Path | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None
    max_upload_mb: float = 10
    examples: tuple[str, ...] = EXAMPLES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `serve`."""
    default = ServeSettings(Path())
    parser.add_argument("index", type=Path, help="folder of the index")
    parser.add_argument("--model", type=Path, help="the model, where it moved since the index was made")
    parser.add_argument("--host", default=default.host, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=default.port, help="0: any free one (default: %(default)s)")
    parser.add_argument(
        "--token",
        help="what visitors must know, 12 characters or more; auto: a random one, advised on a shared machine",
    )
    parser.add_argument("--max-upload-mb", type=float, default=default.max_upload_mb, help="default: %(default)s")
    parser.add_argument("--example", action="append", help="description that the page offers; may be repeated")


def run(arguments: argparse.Namespace) -> None:
    """Serves until it is interrupted."""
    serve(
        ServeSettings(
            arguments.index,
            arguments.model,
            arguments.host,
            arguments.port,
            arguments.token,
            arguments.max_upload_mb,
            EXAMPLES if arguments.example is None else tuple(arguments.example),
        )
    )


def serve(settings: ServeSettings) -> None:
    """Serves the page until it is interrupted.

    Raises:
        UserError: see `open_page`.
    """
    page = open_page(settings)
    for line in page.warnings:
        print(f"warning: {line}", file=sys.stderr, flush=True)
    print(f"{page.photos:,} photos at {page.address} (stop with Ctrl+C)", flush=True)
    with contextlib.suppress(KeyboardInterrupt), page.listener:
        page.server.run(sockets=[page.listener])


@dataclass(frozen=True)
class OpenPage:
    """A page that is ready.

    Attributes:
        server: an `uvicorn.Server`; `server.run(sockets=[listener])` answers until it is interrupted.
        listener: the socket; browsers may connect already.
        address: of the page, with the token where that is a random one.
        photos: in the index.
        warnings: what whoever serves them must know, a line each.
    """

    server: Any
    listener: socket.socket
    address: str
    photos: int
    warnings: list[str]


def open_page(settings: ServeSettings) -> OpenPage:
    """Opens port, index and model, and tries a search.

    Raises:
        UserError: a setting, the index or the model is wrong, the port is taken, or a library is missing.
    """
    try:
        import uvicorn

        from reid_dist.search.web_app import SearchPage
        from reid_dist.search.web_connection import Connection
        from reid_dist.search.web_guard import Guard
    except ImportError as error:
        raise UserError(f"serve: needs {error.name}; install the extra: pip install -e '.[search]'") from None
    token = _token(settings.token)
    if not 0 < settings.max_upload_mb <= 100:
        raise UserError(f"--max-upload-mb {settings.max_upload_mb:g}: must be above 0 and at most 100")
    listener = _listen(settings.host, settings.port)
    try:
        port = listener.getsockname()[1]
        index = PhotoIndex.open(settings.index)
        model = load_model(index, settings.model)
        if len(index.entries):
            index.search(combine(model, "a person"), 1)  # the first search loads what later ones find in memory
        page = SearchPage(index, model, int(settings.max_upload_mb * 2**20), settings.examples)
        app = Guard(page.application(), token, settings.host, port)
    except BaseException:
        listener.close()
        raise
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,  # who asks when is nobody's business
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=2,
    )
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    secret = f"?token={token}" if settings.token == _RANDOM_TOKEN else ""
    return OpenPage(
        uvicorn.Server(config),
        listener,
        f"http://{host}:{port}/{secret}",
        len(index.entries),
        _warnings(settings.host, f"{host}:{port}", token),
    )


def _warnings(host: str, place: str, token: str | None) -> list[str]:
    if _loopback(host):
        return []
    if token is None:
        return [f"whoever reaches {place} can search these photos and see them; add --token auto"]
    return [f"photos and token travel unencrypted to {place}; serve in networks that you trust, or behind TLS"]


def _token(given: str | None) -> str | None:
    if given == _RANDOM_TOKEN:
        return secrets.token_urlsafe(24)
    if given is not None and (len(given) < _SHORTEST_TOKEN or not all("!" <= letter <= "~" for letter in given)):
        raise UserError(
            f"--token: use {_SHORTEST_TOKEN} or more ASCII characters without spaces, or `--token auto`: a random one"
        )
    return given


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, made before anything is loaded: a port that is taken is told at once."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: must be from 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family)
    except UnicodeError:
        raise UserError(f"--host {host[:80]}: not an address") from None
    except socket.gaierror as error:
        raise UserError(f"--host {host[:80]}: not an address of this machine ({error.strerror})") from None
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from None


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
