"""Checking one sample: whether its image decodes, and what its record says against its row of the index."""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from pydantic import ValidationError

from reid_dist.data.sample import MAX_IMAGE_BYTES, MAX_PIXELS, ROLES, SPLITS, Sample
from reid_dist.errors import UserError
from shards.raw import ImageFile, RawSample

_FORMATS = ("JPEG", "PNG", "WEBP")


def decoded_size(image: bytes) -> tuple[int, int]:
    """Width and height of an image, all of whose pixels decode.

    Raises:
        UserError: they do not, or there are too many; one phrase.
    """
    if len(image) > MAX_IMAGE_BYTES:
        raise UserError(f"the image has more than the cap of {MAX_IMAGE_BYTES} bytes")
    try:
        with warnings.catch_warnings():
            # Refused below with a reason of our own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(image), formats=_FORMATS)
        if opened.width * opened.height <= MAX_PIXELS:
            opened.load()
            return opened.size
    except Image.DecompressionBombError:
        raise UserError(f"the image has more than the cap of {MAX_PIXELS} pixels") from None
    except Exception as error:  # damaged files raise OSError, but also SyntaxError, struct.error, ...
        reason = "no JPEG, PNG or WebP" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UserError(f"the image does not decode ({reason})") from None
    raise UserError(f"the image has {opened.width} x {opened.height} pixels, more than the cap of {MAX_PIXELS}")


def read_record(record: bytes) -> Sample:
    """The record in the bytes of a JSON member.

    Raises:
        UserError: it is none; one phrase.
    """
    try:
        return Sample.model_validate_json(record, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"{place}: {first['msg']}" if place else str(first["msg"])
        raise UserError(f"the record is damaged ({reason})") from None


def differences(sample: Sample, entry: Any, pid: str) -> Iterator[str]:
    """What a record says otherwise than its row of the index."""
    pairs = {
        "identity": (sample.pid, pid),
        "camera": (sample.camid, int(entry["camid"])),
        "split": (sample.split, _name(SPLITS, int(entry["split"]))),
        "role": (sample.role, _name(ROLES, int(entry["role"]))),
        "number of captions": (len(sample.captions), int(entry["captions"])),
    }
    for what, (stated, indexed) in pairs.items():
        if stated != indexed:
            yield f"its record says {what} {stated}, the index {indexed}"


def published_part(converter: str, sample: Sample) -> str:
    """The row of the published counts that a sample is counted in."""
    if not converter:
        return ""
    from shards.write import CONVERTERS  # here: it knows every data set

    raw = RawSample(
        image=ImageFile(Path(sample.source), 0),
        pid=sample.pid.partition(":")[2],
        camid=sample.camid,
        split=sample.split,
        role=sample.role,
        captions=tuple(sample.captions),
        source=sample.source,
    )
    return CONVERTERS[converter].part(raw)


def _name(names: tuple[str, ...], number: int) -> str:
    return names[number] if 0 <= number < len(names) else str(number)
