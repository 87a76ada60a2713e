"""`python -m shards.write NAME --root RAW --out DIR`: a raw data set to shards with index and manifest.

The same raw files and options give the same bytes, with any number of workers, parts and interruptions.
"""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reid_dist.data.sample import Manifest
from reid_dist.errors import UserError
from shards import (
    coco,
    csv_file,
    cuhk03_np,
    cuhk_pedes,
    flickr30k,
    folder,
    icfg_pedes,
    img2dataset,
    jsonl_file,
    luperson,
    luperson_mllm,
    mals,
    market1501,
    msmt17,
    rstp_reid,
    synth_pedes,
    ufine6926,
    webperson,
    wit,
)
from shards.command import exit_code
from shards.raw import Converter
from shards.workers import processors
from shards.writing.plan import ORDERS
from shards.writing.shard_set import WriteOptions, write_set

CONVERTERS: dict[str, Converter] = {
    "cuhk_pedes": cuhk_pedes,
    "icfg_pedes": icfg_pedes,
    "rstp_reid": rstp_reid,
    "ufine6926": ufine6926,
    "market1501": market1501,
    "msmt17": msmt17,
    "cuhk03_np": cuhk03_np,
    "luperson": luperson,
    "img2dataset": img2dataset,
    "synth_pedes": synth_pedes,
    "mals": mals,
    "luperson_mllm": luperson_mllm,
    "webperson": webperson,
    "coco": coco,
    "flickr30k": flickr30k,
    "wit": wit,
    "csv": csv_file,
    "jsonl": jsonl_file,
    "folder": folder,
}


def find_converter(name: str) -> Converter:
    """The converter of a data set.

    Raises:
        UserError: unknown (the nearest name is offered) or refused.
    """
    if name in CONVERTERS:
        return CONVERTERS[name]
    if "duke" in name.lower():
        raise UserError(
            f"{name}: refused. DukeMTMC was filmed without the consent of the people in it and withdrawn in "
            f"2019; neither it nor sets made from it are supported"
        )
    near = difflib.get_close_matches(name.lower().replace("-", "_"), CONVERTERS, n=1, cutoff=0.4)
    offer = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"{name}: no such converter; {offer}There are: {', '.join(CONVERTERS)}")


def write(name: str, root: Path, out: Path, **options: Any) -> Manifest | None:
    """Write a raw data set as shards, continue what was interrupted, or keep what is there.

    Args:
        name: one of CONVERTERS.
        root: the raw tree; only read.
        out: folder to make, or one that an earlier call with the same options began.
        **options: fields of WriteOptions.

    Returns:
        The manifest; None when shards of other parts are still missing.

    Raises:
        UserError: wrong name, option, tree, counts or image, or `out` holds something else.
        OSError: a full disk, missing rights, a worker that was killed.
    """
    return write_set(name, find_converter(name), root, out, WriteOptions(**options))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 2 for wrong input, 1 for a full disk and the like, 128 + a signal."""
    options = _parser().parse_args(arguments)

    def command() -> int:
        write(
            options.name,
            options.root,
            options.out,
            dataset=options.dataset,
            variant=options.variant,
            shard_bytes=_shard_bytes(options.shard_mb),
            seed=options.seed,
            order=options.order,
            exclude=options.exclude,
            max_bad_fraction=options.max_bad_fraction,
            allow_mismatch=options.allow_mismatch,
            workers=options.workers,
            part=options.part,
        )
        return 0

    kept = f"{options.out} keeps the finished shards; run the same command again to continue"
    return exit_code(command, f", {kept}", last=arguments is None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards.write", description="A raw data set to shards.")
    parser.add_argument("name", help=f"converter: {', '.join(CONVERTERS)}")
    parser.add_argument("--root", required=True, type=Path, help="folder of the raw data set; only read")
    parser.add_argument("--out", required=True, type=Path, help="shard folder to make or to continue")
    parser.add_argument("--dataset", default="", help="name in samples and identities (default: the converter's)")
    parser.add_argument("--variant", default="", help="of the data set, where it has several (default: the first)")
    parser.add_argument("--workers", type=int, default=processors(), help="processes (default: all processors)")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="i/n", help="write every n-th shard only")
    parser.add_argument("--shard-mb", type=float, default=64, help="size of a shard in megabytes (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of samples (default: 0)")
    parser.add_argument("--order", choices=ORDERS, default="shuffled", help="identity: images of one stand together")
    parser.add_argument("--exclude", type=Path, metavar="FILE", help="identities and images to leave out, one a line")
    parser.add_argument("--max-bad-fraction", type=float, default=0.0, metavar="F", help="skip images that are damaged")
    parser.add_argument("--allow-mismatch", action="store_true", help="accept other counts than the published")
    return parser


def _shard_bytes(megabytes: float) -> int:
    if not math.isfinite(megabytes):
        raise UserError(f"--shard-mb {megabytes:g}: must be above 0 and finite")
    return int(megabytes * 1_000_000)


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: write i/n, for example 3/8")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
