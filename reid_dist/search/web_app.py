"""The routes of the web page: the page, what can be filtered by, a search, and thumbnails by number.

Starlette and one HTML page, not Gradio: that keeps copies of the photographs of every question and answer in a folder
of temporary files and serves them by their path, so that a photograph deleted from the index could still be seen; and
its own login leaves some of its routes open.

Shape suffixes: D features.
"""

import base64
import binascii
import hashlib
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from reid_dist.data.pictures import decode_picture
from reid_dist.errors import UserError
from reid_dist.search.entries import Filter
from reid_dist.search.index import Hit, Kind, PhotoIndex, Vector, unknown
from reid_dist.search.query import combine, kind_of
from reid_dist.search.web_body import read_body
from reid_dist.trained import TrainedModel

PAGE_FOLDER = Path(__file__).parent / "page"
_PAGE_FILES = {"": "index.html", "style.css": "style.css", "script.js": "script.js"}
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_THUMBNAIL_SIZE = 512
_LISTED_PEOPLE = 1000
_OTHER_FIELDS_BYTES = 64_000
_UPLOAD_PIXELS = 50_000_000  # more than telephones take unless told to; what lies in the index may be larger
_UPLOADS = 4
_UPLOAD_SECONDS = 120.0  # ten megabytes through a slow telephone
_PATIENCE_SECONDS = 5.0


class Query(BaseModel):
    """A search as the page sends it.

    Attributes:
        text: description; empty: none.
        image: photograph, the file in base64.
        similar: number of a photograph of the index, instead of `image`.
        generation: of the index that `similar` counts in.
        weight: share of the description where there are both.
        count: of photographs to find.
        person: exactly this one.
        camera: exactly this one.
        since: this date or later.
        until: this date or earlier.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str = Field("", max_length=20_000)
    image: str | None = None
    similar: int | None = None
    generation: str | None = None
    weight: float = Field(0.5, ge=0, le=1)
    count: int = Field(20, ge=1, le=100)
    person: str | None = None
    camera: str | None = None
    since: str | None = None
    until: str | None = None


@dataclass(frozen=True)
class _Opened:
    index: PhotoIndex
    generation: str  # numbers of photographs mean something in one generation only: a deletion moves them


class SearchPage:
    """Answers the page's requests.

    Args:
        index: open.
        model: that made it.
        max_upload_bytes: of a photograph.
        examples: descriptions that the page offers.
    """

    def __init__(self, index: PhotoIndex, model: TrainedModel, max_upload_bytes: int, examples: Sequence[str]) -> None:
        self._opened, self._model = _Opened(index, _generation(index)), model
        self._max_upload_bytes, self._examples = max_upload_bytes, list(examples)
        self._reopening = threading.Lock()
        # One search at a time uses all cores.
        self._searches, self._thumbnails = anyio.CapacityLimiter(1), anyio.CapacityLimiter(4)
        # Memory: a photograph that is sent is held from its first byte to the answer, and one that is decoded, for a
        # search or a thumbnail, may take several hundred megabytes.
        self._uploads, self._decoding = anyio.Semaphore(_UPLOADS), threading.Semaphore(2)

    def application(self) -> Starlette:
        """The ASGI application, which trusts whoever reaches it; see `web_guard.Guard`."""
        routes = [_page_route(path, PAGE_FOLDER / name) for path, name in _PAGE_FILES.items()]
        routes += [
            Route("/api/index", self._describe),
            Route("/api/search", self._search, methods=["POST"]),
            Route("/thumbnail/{generation}/{number}", self._thumbnail),
        ]
        handlers: dict[Any, Any] = {HTTPException: _refused, UserError: _user_error, Exception: _failed}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _describe(self, _: Request) -> Response:
        return _Json(await anyio.to_thread.run_sync(self._description, limiter=self._searches))

    async def _search(self, request: Request) -> Response:
        # JSON is no type that a page of another origin may send unasked.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "send the search as application/json")
        async with self._room_for(request):
            limit = self._max_upload_bytes * 4 // 3 + _OTHER_FIELDS_BYTES
            body = await read_body(request, limit, _UPLOAD_SECONDS)
            if isinstance(body, Response):
                return body
            return _Json(await anyio.to_thread.run_sync(self._answer, body, limiter=self._searches))

    @asynccontextmanager
    async def _room_for(self, request: Request) -> AsyncIterator[None]:
        """Until a search is answered: no more than a few that hold photographs; descriptions alone pass them by."""
        headers = request.headers
        if "transfer-encoding" not in headers and int(headers.get("content-length", 0)) <= _OTHER_FIELDS_BYTES:
            yield
            return
        try:
            with anyio.fail_after(_PATIENCE_SECONDS):
                await self._uploads.acquire()
        except TimeoutError:
            raise HTTPException(503, "too many photos are being searched with; try again in a minute") from None
        try:
            yield
        finally:
            self._uploads.release()

    async def _thumbnail(self, request: Request) -> Response:
        generation = request.path_params["generation"]
        try:
            number = int(request.path_params["number"])
        except ValueError:  # no number, or one of thousands of digits
            raise HTTPException(404, "there is no such photo") from None
        data = await anyio.to_thread.run_sync(self._jpeg, generation, number, limiter=self._thumbnails)
        return Response(data, media_type="image/jpeg")

    def _current(self) -> _Opened:
        """The index as it is on disk now: what another process deleted is not shown any more."""
        with self._reopening:
            if not self._opened.index.current:
                index = PhotoIndex.open(self._opened.index.folder)
                if index.digest != self._model.digest:
                    raise UserError(f"{index.folder}: was built again with another model; start this server again")
                self._opened = _Opened(index, _generation(index))
            return self._opened

    def _description(self) -> dict[str, Any]:
        entries = self._current().index.entries
        return {
            "photos": len(entries),
            "people": entries.persons[:_LISTED_PEOPLE],
            "cameras": entries.cameras,
            "has_dates": len(entries.rows(Filter(since="0000"))) > 0,
            "upload_bytes": self._max_upload_bytes,
            "examples": self._examples,
        }

    def _answer(self, body: bytes) -> dict[str, Any]:
        query = _parse(body)
        opened = self._current()
        where = Filter(query.person or None, query.camera or None, query.since or None, query.until or None)
        began = time.perf_counter()
        kind, feature_D = self._features(query, opened)
        hits = opened.index.search(feature_D, query.count, where)
        milliseconds = 1000 * (time.perf_counter() - began)
        threshold = opened.index.threshold(kind, query.weight)
        return {
            "generation": opened.generation,
            "photos": len(opened.index.entries),
            "hits": [_hit(hit, rank, threshold) for rank, hit in enumerate(hits, 1)],
            "threshold": threshold,
            "calibrated": bool(opened.index.manifest.get("thresholds")),
            "unknown": unknown(hits, threshold),
            "cut": bool(query.text.strip()) and self._model.is_cut(query.text),
            "milliseconds": milliseconds,
        }

    def _features(self, query: Query, opened: _Opened) -> tuple[Kind, Vector]:
        """Shape of the features: (D,)."""
        text = query.text if query.text.strip() else None
        if query.similar is None:
            image = None if query.image is None else self._photo(query.image)
            return kind_of(text, image), combine(self._model, text, image, query.weight)
        _check_number(opened, query.generation, query.similar)
        stored_D = opened.index.vectors_ND[query.similar].astype(np.float32)
        if text is None:
            return "image", stored_D
        return "both", query.weight * combine(self._model, text) + (1 - query.weight) * stored_D

    def _photo(self, encoded: str) -> Image.Image:
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError):
            raise UserError("image: not in base64") from None
        if len(data) > self._max_upload_bytes:
            raise HTTPException(413, f"the photo is larger than {self._max_upload_bytes / 2**20:g} MB; shrink it")
        with self._decoding:
            return decode_picture(data, "the photo", self._model.image_size, _UPLOAD_PIXELS)[0]

    def _jpeg(self, generation: str, number: int) -> bytes:
        opened = self._current()
        _check_number(opened, generation, number)
        try:
            with self._decoding:
                image = opened.index.thumbnail(opened.index.entries[number], _THUMBNAIL_SIZE)
        except UserError as error:
            raise HTTPException(404, str(error)) from None
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=88)
        return buffer.getvalue()


class _Json(JSONResponse):
    """JSON in ASCII: names of files need not be UTF-8, and what is not can stand in it as an escape only."""

    def render(self, content: Any) -> bytes:
        """As Starlette calls it."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def _page_route(path: str, file: Path) -> Route:
    """A file of the page, read now: no address ever leads to a file."""
    content, media_type = file.read_bytes(), _MEDIA_TYPES[file.suffix]

    async def answer(_: Request) -> Response:
        return Response(content, media_type=media_type)

    return Route(f"/{path}", answer)


def _generation(index: PhotoIndex) -> str:
    return hashlib.sha256(json.dumps(index.manifest, sort_keys=True).encode()).hexdigest()[:16]


def _check_number(opened: _Opened, generation: str | None, number: int) -> None:
    if generation != opened.generation:
        raise HTTPException(410, "the index has changed since this search; search again")
    if not 0 <= number < len(opened.index.entries):
        raise HTTPException(404, f"there is no photo {number}")


def _hit(hit: Hit, rank: int, threshold: float | None) -> dict[str, Any]:
    entry = hit.entry
    return {
        "rank": rank,
        "number": hit.row,
        "score": hit.score,
        "known": threshold is None or hit.score >= threshold,
        "file": entry.file,
        "person": entry.person,
        "camera": entry.camera,
        "date": entry.date,
        "time": entry.time,
    }


def _parse(body: bytes) -> Query:
    try:
        return Query.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{place or 'request'}: {first['msg']}") from None


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _Json({"error": error.detail}, error.status_code)


async def _user_error(_: Request, error: Exception) -> Response:
    return _Json({"error": str(error)}, 400)


async def _failed(_: Request, __: Exception) -> Response:
    """The traceback goes to the terminal of the server, not to the page."""
    return _Json({"error": "the search failed; the terminal of the server says why"}, 500)
