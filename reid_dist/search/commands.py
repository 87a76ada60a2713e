"""What `launch/search.py` runs: one pair of functions for each command, its arguments and its work."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from reid_dist.data.pictures import read_picture
from reid_dist.data.reader import ShardSet
from reid_dist.data.sample import SPLITS
from reid_dist.errors import UserError
from reid_dist.files import write_results
from reid_dist.search.calibrate import calibrate
from reid_dist.search.change import add, delete
from reid_dist.search.entries import Filter
from reid_dist.search.index import PhotoIndex
from reid_dist.search.lists import faiss_module
from reid_dist.search.query import combine, kind_of, load_model
from reid_dist.search.show import hit_record, hit_table, write_sheet
from reid_dist.search.sources import list_source
from reid_dist.trained import TrainedModel, load

_SHOWN = 20  # files that a deletion lists
_ONE_KIND = (
    "this model has features of its own for picture queries (dual_token); an index holds those for sentences only, and"
    " pictures are compared by them too"
)


def add_index_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `index`."""
    parser.add_argument("run", help="folder of a run, of one of its stages, or an export")
    parser.add_argument("source", help="folder of images (with metadata.csv or without), shard set, or list of frames")
    parser.add_argument("--out", type=Path, required=True, help="the index, such as photos.index; made or added to")
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.0, help="share of unreadable images that is left out (default: 0)"
    )
    parser.add_argument("--device", help="where the model runs, such as cpu (default: all GPUs, else the CPU)")


def run_index(arguments: argparse.Namespace) -> None:
    """Makes an index or adds to it."""
    if not 0 <= arguments.max_bad_fraction < 1:
        raise UserError(f"--max-bad-fraction {arguments.max_bad_fraction}: must be 0 or more and below 1")
    faiss_module()  # before hours of encoding
    models = _models(arguments.run, arguments.device)
    listing = list_source(arguments.source)
    if models[0].encoder.has_i2i_token:
        print(f"note: {_ONE_KIND}", file=sys.stderr)
    for note in listing.notes:
        print(f"note: {note}", file=sys.stderr)
    added = add(models, listing, arguments.out, arguments.max_bad_fraction, len(os.sched_getaffinity(0)))
    print(
        f"{arguments.out}: {added.new + added.kept} photographs: {added.new} encoded"
        f" ({added.changed} of them had changed), {added.kept} were there, {added.bad} left out as unreadable"
    )


def _models(path: str, device: str | None) -> list[TrainedModel]:
    if device is not None:
        try:
            return [load(path, torch.device(device))]
        except RuntimeError as error:
            raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return [load(path, f"cuda:{number}") for number in range(torch.cuda.device_count())] or [load(path, "cpu")]


def _add_filter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--person", help="only photographs of this person")
    parser.add_argument("--camera", help="only photographs of this camera")
    parser.add_argument("--since", help="only photographs of this date or later: 2024, 2024-05, 2024-05-31 ...")
    parser.add_argument("--until", help="only photographs of this date or earlier")


def _filter(arguments: argparse.Namespace) -> Filter:
    return Filter(arguments.person, arguments.camera, arguments.since, arguments.until)


def add_query_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `query`."""
    parser.add_argument("index", type=Path, help="folder of the index")
    parser.add_argument("--text", help="a sentence about the person")
    parser.add_argument("--image", type=Path, help="a picture of the person")
    parser.add_argument(
        "--weight", type=float, default=0.5, help="of the sentence where there are both (default: %(default)s)"
    )
    parser.add_argument("--top", type=int, default=10, help="how many (default: %(default)s)")
    _add_filter(parser)
    parser.add_argument("--model", help="the model, where it moved since the index was made")
    parser.add_argument("--sheet", type=Path, help="picture of the hits to write, such as hits.png")
    parser.add_argument("--json", type=Path, help="file to write the hits to; -: print them instead of the table")


def run_query(arguments: argparse.Namespace) -> None:
    """Searches an index and shows what it found."""
    where = _filter(arguments)
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top}: must be above 0")
    index = PhotoIndex.open(arguments.index)
    if not len(index.entries):
        raise UserError(f"{arguments.index}: holds no photographs; index some first")
    model = load_model(index, arguments.model)
    image = None if arguments.image is None else read_picture(arguments.image, model.image_size)
    feature_D = combine(model, arguments.text, image, arguments.weight)
    if arguments.text is not None and model.is_cut(arguments.text):
        print("note: the sentence is longer than the model reads; its end does not count", file=sys.stderr)
    hits = index.search(feature_D, arguments.top, where)
    kind = kind_of(arguments.text, image)
    threshold = index.threshold(kind, arguments.weight)
    query = {"text": arguments.text, "image": None if image is None else str(arguments.image)}
    query |= {"weight": arguments.weight if kind == "both" else None, "top": arguments.top, **vars(where)}
    record = hit_record(index, query, hits, threshold)
    if arguments.json == Path("-"):
        print(json.dumps(record, indent=1, allow_nan=False))
    else:
        print(hit_table(hits, threshold))
    if arguments.json not in (None, Path("-")):
        write_results(arguments.json, record)
        print(f"written: {arguments.json}", file=sys.stderr)
    if arguments.sheet is not None:
        write_sheet(arguments.sheet, index, arguments.text, image, hits, threshold)
        print(f"written: {arguments.sheet}", file=sys.stderr)


def add_delete_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `delete`."""
    parser.add_argument("index", type=Path, help="folder of the index")
    parser.add_argument("--file", action="append", default=[], help="this photograph; may be repeated")
    _add_filter(parser)
    parser.add_argument(
        "--missing", action="store_true", help="photographs whose file, or sample in its shard set, is gone"
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")


def run_delete(arguments: argparse.Namespace) -> None:
    """Deletes what meets every condition."""
    gone = delete(arguments.index, _filter(arguments), arguments.file, arguments.missing, arguments.dry_run)
    for entry in gone[:_SHOWN]:
        print(entry.file if entry.file.isprintable() else repr(entry.file))
    if len(gone) > _SHOWN:
        print(f"... and {len(gone) - _SHOWN} more")
    if arguments.dry_run:
        print(f"{arguments.index}: {len(gone)} photographs would be deleted; nothing was changed")
    else:
        print(
            f"{arguments.index}: {len(gone)} photographs deleted. The image files are where they were: an `index` of"
            " their folder would bring them back"
        )


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `calibrate`."""
    parser.add_argument("index", type=Path, help="folder of the index")
    parser.add_argument("shards", help="shard set of people who are not in the index")
    parser.add_argument("--split", choices=SPLITS, default="val", help="of the set (default: %(default)s)")
    parser.add_argument(
        "--false-accept", type=float, default=0.01, help="share of unknown people taken for known (default: 0.01)"
    )
    parser.add_argument("--model", help="the model, where it moved since the index was made")


def run_calibrate(arguments: argparse.Namespace) -> None:
    """Measures the thresholds of an index."""
    model = load_model(PhotoIndex.open(arguments.index), arguments.model)
    found = calibrate(arguments.index, model, ShardSet(arguments.shards), arguments.split, arguments.false_accept)
    for kind, threshold in found.items():
        known = "not measured" if threshold.known_found is None else f"{threshold.known_found:.1%}"
        print(
            f"{kind}: unknown below {threshold.score:.4f}; {threshold.false_accept:.2%} of {threshold.queries} queries"
            f" for unknown people reach it, known people found: {known}"
        )
    if "text" not in found:
        print("text, both: not calibrated, too few of the images have captions")
