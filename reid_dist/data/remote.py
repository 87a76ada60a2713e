"""Where shards may lie, and byte ranges of those behind http(s) and in S3, through fsspec.

A location is a local path or a URL of one of SCHEMES; nothing in it is executed, and nothing is expanded but number
ranges where a pattern is asked for. The query of a URL (a signature, a token) is kept for requests and left out of
messages.
"""

import asyncio
import hashlib
import math
import os
import re
import time
from collections.abc import Callable
from typing import IO, Any, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from braceexpand import braceexpand

from reid_dist.errors import UserError

SCHEMES = ("path", "file", "http", "https", "s3")

# Waits of 0.2, 0.4, 0.8 and 1.6 s between them: a server that restarts is back, a typing error is not waited for.
ATTEMPTS = 5
FIRST_WAIT_S = 0.2
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 10, 30
_CHUNK = 1 << 20
# LAION-5B has 231,000 tars. A pattern is expanded in memory.
MAX_TARS = 1_000_000

_RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_TEMPORARY_STATUS = (408, 425, 429, 500, 502, 503, 504)


_T = TypeVar("_T")


class _TemporaryError(Exception):
    """A failure that may pass; its text says what happened."""


class _FinalError(Exception):
    """A failure that stays; its text says what happened and what to do."""


def is_remote(location: str) -> bool:
    """Whether a checked location is a URL."""
    return location.startswith(("http://", "https://", "s3://"))


def check_location(text: str | os.PathLike[str]) -> str:
    """The location that a text means: a path without scheme, or an http, https or s3 URL.

    A path object is always a path. In a text, `path:` and `file:` mean local paths.

    Raises:
        UserError: another scheme, a chain of them (`::`), a variable, or control characters; a path object made of
            a URL.
    """
    if isinstance(text, os.PathLike):
        path = os.fspath(text)
        if re.match(r"(https?|s3):/", path):
            raise UserError(f"{path}: a URL became a path on the way and lost a slash; hand it over as text")
        return path
    found = _SCHEME.match(text)
    if found is None:
        return text
    shown, scheme = shown_location(text), found[1].lower()
    if scheme not in SCHEMES:
        raise UserError(
            f"{shown}: scheme {found[1]}: is not read; shards lie in a folder (a name with a colon is written "
            f"./NAME) or behind https://, http:// or s3://"
        )
    if "::" in re.sub(r"//([^/]*@)?\[[0-9a-fA-F:.]+\]", "//", text):  # not counting an IPv6 host
        raise UserError(f"{shown}: chains of file systems (::) are not read; give the plain URL")
    if scheme in ("path", "file"):
        return _local_path(text, shown)
    if re.search(r"\$[A-Za-z{]", text):
        raise UserError(f"{shown}: variables are not expanded; write the URL out")
    if re.search(r"[\s\x00-\x1f\x7f]", text):
        raise UserError(f"{shown!r}: a URL has no spaces or control characters; encode them (%20)")
    if not _is_whole(text):
        raise UserError(f"{shown}: not a whole URL; it begins like https://host/folder or s3://bucket/folder")
    return scheme + text[len(scheme) :]


def _is_whole(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, half an IPv6 host
        return False


def _local_path(text: str, shown: str) -> str:
    path = text.partition(":")[2]
    if path.startswith("//"):
        if not path.startswith("///"):
            raise UserError(f"{shown}: names another machine; a local file URL begins with file:///")
        path = path[2:]
    if not path:
        raise UserError(f"{shown}: no path")
    return path


def join_location(folder: str, name: str) -> str:
    """The location of a file in a folder; the query of a URL stays at its end."""
    if not is_remote(folder):
        return os.path.join(folder, name)
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def shown_location(location: str) -> str:
    """A location as messages may show it: without the query, user and password of a URL."""
    head, separator, rest = location.partition("://")
    if not separator:
        return location
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{head}://{host.rpartition('@')[2]}{slash}{path}"


def expand_ranges(pattern: str) -> list[str]:
    """The names of a pattern with number ranges in braces, at most MAX_TARS of them.

    Raises:
        UserError: more, or braces that hold something else.
    """
    shown = shown_location(pattern)
    if re.search(r"[{}]", _RANGE.sub("", pattern)):
        raise UserError(f"{shown}: braces hold a range of numbers, {{00000..00331}}; give other names one by one")
    count = math.prod(abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern))
    if count > MAX_TARS:
        raise UserError(f"{shown}: stands for {count} tars, more than {MAX_TARS}; correct the range")
    return list(braceexpand(pattern, escape=False))


def read_range(url: str, offset: int, size: int) -> bytes:
    """Exactly these bytes of a remote file, with retries.

    Args:
        url: http, https or s3.
        offset: of the first byte.
        size: number of bytes.

    Raises:
        UserError: the file is not there, is shorter, or the server keeps failing or does not serve ranges.
    """
    return _retry(url, lambda: _client(url).read_range(url, offset, size)) if size else b""


def read_file(url: str, max_bytes: int) -> bytes:
    """A whole remote file, with retries.

    Raises:
        UserError: as `read_range`, or the file is larger than `max_bytes`.
    """

    def attempt() -> bytes:
        chunks: list[bytes] = []
        _client(url).stream(url, max_bytes, chunks.append)
        return b"".join(chunks)

    return _retry(url, attempt)


def copy_file(url: str, file: IO[bytes], max_bytes: int) -> str:
    """Copy a remote file into an open, empty local one, with retries, and return its sha256 (hex).

    Raises:
        UserError: as `read_file`.
    """

    def attempt() -> str:
        file.seek(0)
        file.truncate()
        digest = hashlib.sha256()

        def keep(chunk: bytes) -> None:
            digest.update(chunk)
            file.write(chunk)

        _client(url).stream(url, max_bytes, keep)
        file.flush()
        return digest.hexdigest()

    return _retry(url, attempt)


def file_size(url: str) -> int:
    """Bytes of a remote file, with retries.

    Raises:
        UserError: as `read_range`.
    """
    return _retry(url, lambda: _client(url).size(url))


def _retry(url: str, attempt: Callable[[], _T]) -> _T:
    for number in range(ATTEMPTS):
        if number:
            time.sleep(FIRST_WAIT_S * 2 ** (number - 1))
        try:
            return attempt()
        except _TemporaryError as error:
            problem = str(error)
        except _FinalError as error:
            raise UserError(f"{shown_location(url)}: {error}") from None
    raise UserError(
        f"{shown_location(url)}: {problem}, {ATTEMPTS} times in a row; check the server and the network, or copy the "
        f"set to a local folder"
    )


# One client of a kind in a process. Event loop, threads and connections must not be carried across a fork; those of the
# parent stay here untouched, as closing them is the parent's to do.
_clients: dict[tuple[int, str], "_Client"] = {}


class _Client(Protocol):
    def read_range(self, url: str, offset: int, size: int) -> bytes:
        """Exactly these bytes."""

    def stream(self, url: str, max_bytes: int, keep: Callable[[bytes], None]) -> None:
        """Hand over a whole file piece by piece."""

    def size(self, url: str) -> int:
        """Bytes of a file."""


def _client(url: str) -> _Client:
    kind = "s3" if url.startswith("s3:") else "http"
    if (os.getpid(), kind) not in _clients:
        try:
            _clients[os.getpid(), kind] = _S3() if kind == "s3" else _Http()
        except ImportError as error:
            raise UserError(
                f"{shown_location(url)}: {error.name} is not installed; pip install 'reid_dist[remote]'"
            ) from None
    return _clients[os.getpid(), kind]


class _Http:
    """Requests over fsspec's http session. Its own range reader takes a whole file for a range without a word."""

    def __init__(self) -> None:
        import aiohttp
        import yarl
        from fsspec.implementations.http import HTTPFileSystem

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_READ_TIMEOUT_S)
        # Stored bytes are wanted as they are: no compression on the way, which would also hide their number.
        client = {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}
        self._files = HTTPFileSystem(skip_instance_cache=True, client_kwargs=client)
        # Not OSError: a full disk under `copy_file` is no fault of the server.
        self._errors = (aiohttp.ClientError, asyncio.TimeoutError, TimeoutError, ConnectionError)
        self._invalid = aiohttp.InvalidURL
        self._url_class = yarl.URL

    def read_range(self, url: str, offset: int, size: int) -> bytes:
        parts: list[bytes] = []
        self._sync(self._get(url, (offset, size), size, parts.append))
        return b"".join(parts)

    def stream(self, url: str, max_bytes: int, keep: Callable[[bytes], None]) -> None:
        self._sync(self._get(url, None, max_bytes, keep))

    def size(self, url: str) -> int:
        size: int = self._sync(self._head(url))
        return size

    def _address(self, url: str) -> Any:
        # A signature covers the address as it was written, which must not be encoded anew.
        return self._url_class(url, encoded="%" in url)

    def _sync(self, request: Any) -> Any:
        from fsspec.asyn import sync

        try:
            return sync(self._files.loop, lambda: request)
        except self._invalid as error:
            raise _FinalError(f"not a valid URL ({_text(error)}); correct it") from None
        except self._errors as error:
            raise _TemporaryError(f"the connection failed ({_text(error)})") from None

    async def _get(self, url: str, part: tuple[int, int] | None, max_bytes: int, keep: Callable[[bytes], None]) -> None:
        session = await self._files.set_session()
        headers = {"Range": f"bytes={part[0]}-{sum(part) - 1}"} if part else {}
        async with session.get(self._address(url), headers=headers) as answer:
            _check_status(answer.status)
            if part and answer.status != 206:
                raise _FinalError(
                    f"the server ignores byte ranges (status {answer.status} instead of 206) and would send the "
                    f"whole file; serve it from one that knows them, or copy the set to a local folder"
                )
            sent = answer.headers.get("Content-Range", "")
            if part and sent and not sent.startswith(f"bytes {part[0]}-"):
                raise _TemporaryError(f"the server sent another range ({sent[:60]})")
            received = 0
            async for chunk in answer.content.iter_chunked(_CHUNK):
                received += len(chunk)
                _check_received(received, max_bytes, part)
                keep(chunk)
            if part and received != part[1]:
                raise _TemporaryError(f"{received} bytes came instead of {part[1]} at offset {part[0]}")

    async def _head(self, url: str) -> int:
        session = await self._files.set_session()
        async with session.head(self._address(url), allow_redirects=True) as answer:
            _check_status(answer.status)
            if "Content-Length" not in answer.headers:
                raise _FinalError("the server does not tell the size of the file; serve it from another one")
            return int(answer.headers["Content-Length"])


class _S3:
    """Requests over s3fs; endpoint and keys come from the usual AWS settings, and fsspec's (FSSPEC_S3_ANON=true)."""

    def __init__(self) -> None:
        import botocore.exceptions  # type: ignore[import-untyped]
        import s3fs

        # Its own retries are left off: ours also cover what arrives short.
        self._files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        self._files.retries = 1
        self._boto_error = botocore.exceptions.BotoCoreError
        self._no_keys = botocore.exceptions.NoCredentialsError

    def read_range(self, url: str, offset: int, size: int) -> bytes:
        data: bytes = self._call(lambda: self._files.cat_file(url, start=offset, end=offset + size))
        _check_received(len(data), size, (offset, size))
        if len(data) != size:
            raise _TemporaryError(f"{len(data)} bytes came instead of {size} at offset {offset}")
        return data

    def stream(self, url: str, max_bytes: int, keep: Callable[[bytes], None]) -> None:
        size = self.size(url)
        _check_received(size, max_bytes, None)
        for offset in range(0, size, 8 * _CHUNK):
            keep(self.read_range(url, offset, min(8 * _CHUNK, size - offset)))

    def size(self, url: str) -> int:
        return int(self._call(lambda: self._files.info(url, refresh=True))["size"])

    def _call(self, request: Callable[[], Any]) -> Any:
        try:
            return request()
        except FileNotFoundError:
            raise _FinalError(_missing("no such object")) from None
        except (PermissionError, self._no_keys) as error:
            raise _FinalError(
                f"access denied ({_text(error)}); check the AWS keys, or set FSSPEC_S3_ANON=true for a public bucket"
            ) from None
        except (OSError, self._boto_error, asyncio.TimeoutError) as error:
            raise _TemporaryError(f"the request failed ({_text(error)})") from None


def _check_status(status: int) -> None:
    if status in _TEMPORARY_STATUS:
        raise _TemporaryError(f"the server answers with status {status}")
    if status == 416:
        raise _FinalError("the file ends before the bytes that the index names; it is not the one that was indexed")
    if status in (401, 403):
        raise _FinalError(f"access denied (status {status}); check the address, its signature and when that expires")
    if status in (404, 410):
        raise _FinalError(_missing(f"status {status}"))
    if not 200 <= status < 300:
        raise _FinalError(f"the server answers with status {status}; check the address")


def _check_received(received: int, most: int, part: tuple[int, int] | None) -> None:
    if received > most and part:
        raise _FinalError(
            "the server sends more than the byte range that was asked for; copy the set to a local folder"
        )
    if received > most:
        raise _FinalError(f"more than {most} bytes, the cap for such a file")


def _missing(reason: str) -> str:
    return f"the file is not there ({reason}); restore it, or correct the address"


def _text(error: BaseException) -> str:
    """One line about an exception, without the secrets of a URL that it may quote."""
    text = re.sub(r"\?[^\s'\")]*|//[^\s/@]*@", "?", " ".join(str(error).split()))[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
