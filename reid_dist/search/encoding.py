"""Features of many photographs on all devices, in chunks that are kept until the index is written.

A chunk is a file named after everything that decides its content: model, decoder, files and their versions. Killed at
any moment and started again, only chunks that are not there are computed, each from the same batches as before, so that
the index is the same to the bit.

Shape suffixes: B batch, D features, H height, W width, C channels.
"""

import hashlib
import json
import queue
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from reid_dist.data.pictures import decode_picture
from reid_dist.data.transforms import Pixels, decode_image, decoder_name
from reid_dist.errors import UserError
from reid_dist.files import flush
from reid_dist.search.entries import Entry, entry_line
from reid_dist.search.pictures import entry_bytes
from reid_dist.trained import TrainedModel

BATCH = 64
CHUNK = 16 * BATCH  # decoded images of a chunk wait in memory: 150 MB at 384 x 128 pixels
_SAY_EVERY = 30.0  # seconds between lines where there is no terminal


@dataclass(frozen=True)
class Chunk:
    """Encoded photographs.

    Attributes:
        entries: those that decode, with the dates that they hold.
        vectors_BD: fp16, of length 1.
        bad: one line for each of the others.
    """

    entries: list[Entry]
    vectors_BD: npt.NDArray[np.float16]
    bad: list[str]


def encode_entries(
    models: Sequence[TrainedModel],
    entries: Sequence[Entry],
    work: Path,
    allowed: int = 0,
    threads: int = 4,
) -> list[Path]:
    """Encodes photographs into chunks in a folder; those that are there already stay.

    Args:
        models: the same model on each device.
        entries: in the order of the index.
        work: folder of the chunks.
        allowed: how many may be unreadable and are left out.
        threads: that decode.

    Returns:
        The chunks in order, for `read_chunk`.

    Raises:
        UserError: more photographs are unreadable, or the features hold nan or inf.
    """
    parts = [entries[begin : begin + CHUNK] for begin in range(0, len(entries), CHUNK)]
    paths = [work / f"{_chunk_name(models[0], part)}.npz" for part in parts]
    bad = list[str]()
    free: queue.SimpleQueue[TrainedModel] = queue.SimpleQueue()
    for model in models:
        free.put(model)
    with ThreadPoolExecutor(threads) as decoders, ThreadPoolExecutor(len(models)) as workers:
        done = [
            workers.submit(_make, free, decoders, part, path, allowed) for part, path in zip(parts, paths, strict=True)
        ]
        try:
            for problems in _shown(done, [len(part) for part in parts]):
                bad += problems
                _check_bad(bad, allowed, len(entries))
        except BaseException:
            for future in done:
                future.cancel()
            raise
    for line in bad:
        print(f"left out: {line}", file=sys.stderr)
    return paths


def read_chunk(path: Path) -> Chunk | None:
    """A chunk; None where it is not there or not whole."""
    try:
        with np.load(path, allow_pickle=False) as file:
            lines, bad = (json.loads(file[name].tobytes()) for name in ("entries", "bad"))
            return Chunk([Entry(**line) for line in lines], file["vectors"], bad)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None


def _check_bad(bad: list[str], allowed: int, total: int) -> None:
    if len(bad) > allowed:
        more = f" (and {len(bad) - 1} more of {total})" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}, or allow some to be left out with --max-bad-fraction")


def _chunk_name(model: TrainedModel, part: Sequence[Entry]) -> str:
    settings = [model.digest, decoder_name(), str(BATCH), model.device.type]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for entry in part:
        digest.update(entry_line(entry) + b"\n")
    return digest.hexdigest()[:32]


def _make(
    free: "queue.SimpleQueue[TrainedModel]",
    decoders: ThreadPoolExecutor,
    part: Sequence[Entry],
    path: Path,
    allowed: int,
) -> list[str]:
    """Makes sure that a chunk is there and returns what is unreadable in it."""
    kept = read_chunk(path)
    if kept is not None:
        return kept.bad
    model = free.get()
    try:
        chunk = _encode(model, decoders, part, allowed)
    finally:
        free.put(model)
    if len(chunk.bad) <= allowed:
        _write_chunk(path, chunk)
    return chunk.bad


def _encode(model: TrainedModel, decoders: ThreadPoolExecutor, part: Sequence[Entry], allowed: int) -> Chunk:
    entries, images, bad = list[Entry](), list[Pixels](), list[str]()
    vectors = [np.zeros((0, model.features), np.float16)]
    decoding = [decoders.submit(_decode, entry, model.image_size) for entry in part]
    try:
        for entry, found in zip(part, decoding, strict=True):
            try:
                image_HWC, date = found.result()
            except UserError as error:
                bad.append(str(error))
                if len(bad) > allowed:
                    break
                continue
            entries.append(replace(entry, taken=date, date=entry.date or date))
            images.append(image_HWC)
            if len(images) == BATCH:
                vectors.append(_vectors(model, images))
                images.clear()
    finally:
        for waiting in decoding:
            waiting.cancel()
    if images:
        vectors.append(_vectors(model, images))
    return Chunk(entries, np.concatenate(vectors), bad)


def _vectors(model: TrainedModel, images: Sequence[Pixels]) -> npt.NDArray[np.float16]:
    return model.encode_image(list(images), batch_size=BATCH).cpu().numpy().astype(np.float16)


def _decode(entry: Entry, size: tuple[int, int]) -> tuple[Pixels, str | None]:
    data = entry_bytes(entry)
    if entry.shards is not None:  # exactly as evaluation reads it
        return decode_image(data, size, entry.file), None
    image, date = decode_picture(data, entry.file, size)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC)), date


def _write_chunk(path: Path, chunk: Chunk) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    lines = b"[" + b",".join(entry_line(entry) for entry in chunk.entries) + b"]"
    entries, bad = (np.frombuffer(text, np.uint8) for text in (lines, json.dumps(chunk.bad).encode()))
    try:
        with partial.open("wb") as file:
            np.savez(file, vectors=chunk.vectors_BD, entries=entries, bad=bad)
        flush(partial)
    except OSError:
        partial.unlink(missing_ok=True)  # gives a full disk its space back
        raise
    partial.rename(path)


def _shown(done: "list[Future[list[str]]]", sizes: list[int]) -> Iterator[list[str]]:
    """Results in order, with a bar on a terminal and a line now and then elsewhere."""
    total, ready, began, said = sum(sizes), 0, time.monotonic(), time.monotonic()
    with tqdm(total=total, desc="features", unit="image", disable=None) as bar:
        for future, size in zip(done, sizes, strict=True):
            yield future.result()
            ready += size
            bar.update(size)
            if bar.disable and time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                print(f"features: {ready} of {total} images, {ready / (said - began):.0f} a second", file=sys.stderr)
