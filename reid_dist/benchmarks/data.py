"""Images per second of the training loader beside a limit and two usual ways: `benchmark.py data --shards DIR`.

The images of DIR are first brought to one form, JPEG crops of 128 x 256 pixels, in a temporary shard set (those that
have it already go in byte for byte). Four pipelines read them in turns within one run, so that whatever else the
machine does hits all of them alike; a row gives the median over the rounds. No augmentation, no cache, pages of the
files in memory.

- ours: `TrainLoader` over the shards.
- bare: decode and resize into a batch buffer, in as many processes, from bytes in memory: the limit.
- webdataset: the library's usual pipeline over the same shards.
- imagefolder: a torch Dataset over image files with PIL.
"""

import argparse
import hashlib
import io
import math
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from reid_dist.benchmarks.machine import describe_machine
from reid_dist.benchmarks.pipelines import Bare, Pipeline, Size, image_folder, ours, plain_webdataset
from reid_dist.data.reader import ShardSet
from reid_dist.data.sample import Sample
from reid_dist.data.transforms import decode_image, decoder_name
from reid_dist.errors import UserError
from reid_dist.files import write_results
from shards.index import ShardWriter

SOURCE: Size = (256, 128)
SIZES: tuple[Size, ...] = ((256, 128), (64, 32))
PIPELINES = ("ours", "bare", "webdataset", "imagefolder")

# Enough that an epoch is some batches long, few enough to be prepared in seconds.
_LEAST_IMAGES, _MOST_IMAGES = 1024, 8192
_QUALITY = 90


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        workers: processes of each pipeline.
        seconds: of one measurement.
        rounds: measurements of each pipeline at each size.
        batch_size: images of a batch.
    """

    workers: int
    seconds: float = 1.0
    rounds: int = 9
    batch_size: int = 256


@dataclass(frozen=True)
class Crops:
    """The images that all pipelines read, in the three forms that they take them in.

    Attributes:
        shards: folder of a shard set.
        files: folder of image files.
        images: the files' bytes.
        resized: number of images that had another size or form before.
    """

    shards: Path
    files: Path
    images: list[bytes]
    resized: int


def prepare(source: ShardSet, folder: Path, settings: Settings) -> Crops:
    """Make crops of the images of a set; when it has few, they are repeated.

    Raises:
        UserError: the set is empty or an image does not decode.
    """
    if not len(source):
        raise UserError(f"{source.shown}: holds no images; name a set that does")
    shards, files = folder / "shards", folder / "files"
    shards.mkdir()
    files.mkdir()
    step = max(1, len(source) // _MOST_IMAGES)
    rows = list(range(0, len(source), step))[:_MOST_IMAGES]
    found = [_crop(source, row) for row in tqdm(rows, desc="benchmark: preparing crops", unit=" images", disable=None)]
    count = max(len(rows), _LEAST_IMAGES, 2 * settings.batch_size)
    images = [found[number % len(found)][0] for number in range(count)]
    resized = sum(not found[number % len(found)][1] for number in range(count))
    # webdataset gives whole tars to workers: some for each of them.
    writer = ShardWriter(shards, "crops", max(10_000, sum(map(len, images)) // (8 * settings.workers)))
    for number, image in enumerate(images):
        writer.add(f"crop{number:06d}", _record(number, image), image)
        (files / f"crop{number:06d}.jpg").write_bytes(image)
    writer.finish({"licence": "as the set that the benchmark was given", "consent": "as that set", "temporary": True})
    return Crops(shards, files, images, resized)


def _crop(source: ShardSet, row: int) -> tuple[bytes, bool]:
    """A JPEG of the size, and whether it is the stored one."""
    data = source.image_bytes(row)
    if data.startswith(b"\xff\xd8\xff") and Image.open(io.BytesIO(data), formats=["JPEG"]).size == SOURCE[::-1]:
        return data, True
    buffer = io.BytesIO()
    Image.fromarray(decode_image(data, SOURCE, source.describe(row))).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue(), False


def _record(number: int, image: bytes) -> Sample:
    return Sample(
        dataset="crops",
        pid=f"crops:{number}",
        camid=0,
        split="train",
        role="train",
        source=f"{number}.jpg",
        width=SOURCE[1],
        height=SOURCE[0],
        sha256=hashlib.sha256(image).hexdigest(),
    )


def measure(crops: Crops, settings: Settings) -> list[dict[str, Any]]:
    """Rows of all pipelines at all sizes: name, size, workers, median, least and greatest images per second."""
    rows: list[dict[str, Any]] = []
    total = len(SIZES) * settings.rounds * len(PIPELINES)
    with tqdm(total=total, desc="benchmark: measuring", unit=" measurements", disable=None) as progress:
        for size in SIZES:
            rows += _measure_size(crops, size, settings, progress)
    return rows


def _measure_size(crops: Crops, size: Size, settings: Settings, progress: Any) -> list[dict[str, Any]]:
    pipelines = _open(crops, size, settings)
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    try:
        for number in range(settings.rounds):
            # Another one begins each time, so that no place in the round belongs to one of them.
            first = number % len(PIPELINES)
            for name in (*PIPELINES[first:], *PIPELINES[:first]):
                rates[name].append(pipelines[name].measure(settings.seconds))
                progress.update()
    finally:
        for pipeline in pipelines.values():
            pipeline.close()
    return [
        {
            "pipeline": name,
            "size": f"{size[0]}x{size[1]}",
            "workers": settings.workers,
            "samples_per_s": round(statistics.median(rates[name]), 1),
            "least": round(min(rates[name]), 1),
            "greatest": round(max(rates[name]), 1),
            # By rounds: what changes from one to the next leaves a quotient within one alone.
            "share_of_bare": round(
                statistics.median(a / b for a, b in zip(rates[name], rates["bare"], strict=True)), 4
            ),
        }
        for name in PIPELINES
    ]


def _open(crops: Crops, size: Size, settings: Settings) -> dict[str, Pipeline]:
    batch_size, workers = settings.batch_size, settings.workers
    return {
        "bare": Bare(crops.images, size, batch_size, workers),
        "ours": ours(crops.shards, size, batch_size, workers),
        "webdataset": plain_webdataset(crops.shards, size, batch_size, workers),
        "imagefolder": image_folder(crops.files, size, batch_size, workers),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'pipeline':<14}{'size':>10}{'workers':>9}{'images/s':>11}{'of bare':>9}   least to greatest"]
    for row in rows:
        lines.append(
            f"{row['pipeline']:<14}{row['size']:>10}{row['workers']:>9}{row['samples_per_s']:>11,.0f}"
            f"{row['share_of_bare']:>9.1%}   {row['least']:,.0f} to {row['greatest']:,.0f}"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `benchmark.py data`."""
    parser.add_argument("--shards", required=True, help="any shard set, folder or URL; its images are used as crops")
    parser.add_argument("--json", required=True, type=Path, help="file to write the rows to")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help=f"processes of each pipeline (default: {cores})")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement (default: 1)")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of which the median is taken (default: 9)")
    parser.add_argument("--batch-size", type=int, default=256, help="images of a batch (default: 256)")


def run(options: argparse.Namespace) -> None:
    """Measure, print the table and write the file.

    Raises:
        UserError: wrong options or a damaged set.
    """
    settings = Settings(options.workers, options.seconds, options.rounds, options.batch_size)
    for name in ("workers", "seconds", "rounds", "batch_size"):
        if not 0 < getattr(settings, name) < math.inf:  # nan is not either
            raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be above 0")
    if options.json.is_dir():
        raise UserError(f"--json {options.json}: is a folder; name a file, such as {options.json / 'data.json'}")
    source = ShardSet(options.shards)
    machine = describe_machine()  # its load before ours
    with tempfile.TemporaryDirectory(prefix="reid_dist-benchmark-") as folder:
        crops = prepare(source, Path(folder), settings)
        rows = measure(crops, settings)
    results = {
        "rows": rows,
        "decoder": decoder_name(),
        "images": len(crops.images),
        "images_resized_first": crops.resized,
        "mean_bytes": round(sum(map(len, crops.images)) / len(crops.images)),
        "settings": {"seconds": settings.seconds, "rounds": settings.rounds, "batch_size": settings.batch_size},
        "machine": machine,
    }
    write_results(options.json, results)
    print(table(rows))
    print(f"written: {options.json}")
