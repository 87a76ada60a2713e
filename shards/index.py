"""`python -m shards.index merge DIR` ends a set whose parts were written apart; `… build DIR|URL…` indexes other tars.

ShardWriter makes a small set from samples in memory.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from reid_dist.data.sample import Manifest, Sample, Split
from reid_dist.errors import UserError
from shards.command import exit_code
from shards.indexing.build_index import BuildOptions, build_index
from shards.workers import processors
from shards.writing.build import merge
from shards.writing.files import file_sha256 as file_sha256
from shards.writing.files import write_file as write_file
from shards.writing.merge import write_index
from shards.writing.tar_shard import ShardPart, TarShard


class ShardWriter:
    """Writes samples into tars of about `shard_bytes`, then index and manifest.

    The folder is complete once `finish` returns; a reader refuses one without a manifest, which is written last.

    Args:
        folder: an existing folder.
        dataset: name of the data set, also the tars' prefix.
        shard_bytes: a new tar is begun before one would grow above this.
    """

    def __init__(self, folder: Path, dataset: str, shard_bytes: int = 64_000_000) -> None:
        self.folder = folder
        self.dataset = dataset
        self.shard_bytes = shard_bytes
        self._parts: list[ShardPart] = []
        self._keys: set[str] = set()
        self._shard: TarShard | None = None

    def add(self, key: str, sample: Sample, image: bytes) -> None:
        """Append one sample.

        Args:
            key: unique, `[A-Za-z0-9_-]`, at most 95 characters.
            sample: its record; `sample.sha256` is that of `image`.
            image: the JPEG file.

        Raises:
            UserError: the key is malformed or taken, or image or record is above its cap.
        """
        if key in self._keys:
            raise UserError(f"{sample.source}: sample key {key} is already taken")
        if self._shard is not None and self._shard.size + len(image) > self.shard_bytes:
            self._close_shard()
        if self._shard is None:
            self._shard = TarShard(self.folder / f"{self.dataset}-{len(self._parts):06d}.tar")
        self._shard.add(key, sample, image)
        self._keys.add(key)

    def finish(self, card: dict[str, Any]) -> Manifest:
        """Close the last tar, write index and manifest.

        Args:
            card: what is known of the data set; goes into the manifest as it is.

        Raises:
            UserError: no sample was added.
        """
        if self._shard is not None:
            self._close_shard()
        return write_index(self.folder, self.dataset, self._parts, card)

    def _close_shard(self) -> None:
        assert self._shard is not None
        self._parts.append(self._shard.finish())
        self._shard = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 2 for wrong input, 1 for a full disk and the like, 128 + a signal."""
    options = _parser().parse_args(arguments)

    def command() -> int:
        if options.command == "merge":
            folder, manifest = options.folder, merge(options.folder)
        else:
            build = BuildOptions(
                out=options.out,
                dataset=options.dataset,
                split=options.split,
                max_bad_fraction=options.max_bad_fraction,
                workers=options.workers,
            )
            folder, manifest = build_index(options.sources, build)
        print(f"{folder}: {manifest.samples} samples in {len(manifest.shards)} shards")
        return 0

    return exit_code(command, "; run the same command again to continue", last=arguments is None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards.index", description="Make the index of a shard set.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("merge", help="end a set that was written with --part")
    command.add_argument("folder", type=Path, metavar="DIR", help="the --out of python -m shards.write")
    command = commands.add_parser("build", help="index tars of image-text pairs made by others, such as img2dataset")
    command.add_argument("sources", nargs="+", metavar="DIR|URL", help="folder of tars, or tars; {00000..00012} counts")
    command.add_argument("--out", type=Path, help="folder of the index (default: the folder of the tars)")
    command.add_argument("--dataset", default="", help="name of the set (default: that of the folder)")
    command.add_argument("--split", choices=get_args(Split), default="train", help="of all samples (default: train)")
    command.add_argument("--max-bad-fraction", type=float, default=0.0, metavar="F", help="skip bad samples")
    command.add_argument("--workers", type=int, default=processors(), help="processes (default: all processors)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
