"""Where streams come from: shard sets with a manifest, and tars of image-text pairs made by other software."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from reid_dist.data.exclude import NOTHING, Exclusions
from reid_dist.data.reader import ShardSet
from reid_dist.data.remote import check_location, is_remote, join_location, shown_location
from reid_dist.data.sample import MANIFEST_NAME
from reid_dist.data.stream.listing import tar_locations
from reid_dist.data.stream.opening import open_tar
from reid_dist.data.stream.tar import BrokenShardError, TarSample, tar_samples
from reid_dist.errors import UserError


class Pair(NamedTuple):
    """A sample as it stands in its tar, undecoded, or what is wrong with it.

    Attributes:
        tar: number of the tar within the run.
        visit: with the seed and the sample it decides augmentation and caption; not negative.
        ordinal: number of the sample in its tar.
        key: name of its members without extension.
        image: the image file.
        text: record (JSON) of a shard set, or .json or .txt of other software.
        is_json: which of them.
        digests: of image and record as the index has them, None where it has none.
        problem: one line that names tar, key and remedy; empty when there is none.
    """

    tar: int
    visit: int
    ordinal: int
    key: str
    image: bytes
    text: bytes
    is_json: bool
    digests: tuple[int, int | None] | None
    problem: str


class _Row(NamedTuple):
    kept: bool
    digests: tuple[int, int | None]


@dataclass(frozen=True)
class Tar:
    """One tar of a source.

    Attributes:
        location: local path or URL.
        samples: those that are trained on; None when nobody knows before reading it.
        size: bytes by the manifest; None without one.
        rows: rows of the set's index, begin and end; empty without one.
    """

    location: str
    samples: int | None = None
    size: int | None = None
    rows: tuple[int, int] = (0, 0)


class StreamSource:
    """A shard set, or tars by name, in an order that does not depend on the machine.

    Attributes:
        name: what messages call it.
        tars: those with training samples.
        excluded: training samples left out because of `exclude`.
        uncaptioned: training samples that have no caption by the index.
        shards: the set; None for tars by name.
        ours: whether records are those of the shard contract.

    Args:
        location: a folder or URL of a shard set (its training split is used), a folder of tars, one tar, tars by a
            pattern with number ranges (`cc3m/{00000..00331}.tar`), or a text file (.txt) with one tar a line, relative
            to it.
        exclude: identities and images that are left out; needs the index of a shard set, except when empty.

    Raises:
        UserError: a scheme or pattern that is not read, no tars, missing ones, a damaged set, or exclusions for tars
            that cannot be told apart.
    """

    def __init__(self, location: str | os.PathLike[str], exclude: Exclusions = NOTHING) -> None:
        checked = check_location(location)
        self.name = shown_location(checked)
        self.excluded = self.uncaptioned = 0
        self.shards: ShardSet | None = None
        self.ours = False
        self._kept: npt.NDArray[np.bool_] | None = None
        if _is_shard_set(checked):
            self.shards = ShardSet(checked)
            self.ours = not self.shards.manifest.records_sha256
            self.tars = self._set_tars(self.shards, exclude)
        elif exclude.pids or exclude.images:
            raise UserError(
                f"{self.name}: exclusions need an index; make one with `python -m shards.index build {self.name} "
                f"--out DIR` and name DIR, or leave out data.exclude"
            )
        else:
            self.tars = [Tar(each) for each in tar_locations(checked)]
        if not self.tars:
            raise UserError(f"{self.name}: no training samples (split train, role train, not excluded)")

    @property
    def samples(self) -> int | None:
        """Training samples of all tars; None when a tar was not counted."""
        counts = [tar.samples for tar in self.tars]
        return None if None in counts else sum(count for count in counts if count is not None)

    def identity(self) -> list[object]:
        """What decides the samples and their order, for `stream.position.digest`."""
        kept = "" if self._kept is None else hashlib.sha256(np.packbits(self._kept).tobytes()).hexdigest()
        index = "" if self.shards is None else self.shards.manifest.index_sha256
        names = [os.path.basename(shown_location(tar.location)) for tar in self.tars]
        sizes = [(tar.samples, tar.size) for tar in self.tars]
        return [*zip(names, sizes, strict=True), index, kept]

    def pairs(self, tar: Tar, number: int, visit: int = 0) -> Iterator[Pair]:
        """The training samples of a tar in order.

        Args:
            tar: one of `tars`.
            number: of the tar, which the pairs carry.
            visit: likewise.

        Yields:
            One pair per sample and per problem. When the tar cannot be read to its end and the number of its samples
            is known, the missing ones follow as problems, so that none is lost without being counted.

        Raises:
            UserError: the tar cannot be read and nobody knows how many samples are lost.
        """
        found = 0
        try:
            known = self._known(tar)
            with open_tar(tar.location, tar.size, self.remedy()) as file:
                for sample in tar_samples(file, shown_location(tar.location), "json" if self.ours else "txt"):
                    pair = self._pair(tar, (number, visit), sample, known)
                    if pair is not None:
                        found += known is None or sample.offset in known
                        yield pair
            if tar.samples is not None and found != tar.samples:
                shown = shown_location(tar.location)
                raise BrokenShardError(f"{shown}: {found} of the {tar.samples} samples in the index; {self.remedy()}")
        except (UserError, OSError) as error:
            problem = str(error)
            if isinstance(error, OSError):
                problem = f"{shown_location(tar.location)}: cannot be read ({error.strerror}); {self.remedy()}"
            if tar.samples is None:
                raise UserError(problem) from None
            for missing in range(found, tar.samples):
                yield Pair(number, visit, missing, "?", b"", b"", False, None, problem)

    def _pair(self, tar: Tar, marks: tuple[int, int], sample: TarSample, known: dict[int, _Row] | None) -> Pair | None:
        """A sample of a tar as a training pair; None when it is not one to train on."""
        digests = None
        problem = sample.problem
        if known is not None:
            row = known.get(sample.offset)
            if row is None and not problem:
                if not self.ours:
                    return None  # left out, and counted, when the index was made
                problem = "it is not in the index"
            elif row is not None:
                if not row.kept:
                    return None
                digests = row.digests
        if problem:
            problem = f"{self.describe(tar, sample.key)}: {problem}; {self.remedy()}"
        return Pair(*marks, sample.ordinal, sample.key, sample.image, sample.text, sample.is_json, digests, problem)

    def describe(self, tar: Tar, key: str = "") -> str:
        """A tar, and a sample of it where there is a key, for messages."""
        shown = key[:120] if key.isprintable() else ascii(key[:120])
        return shown_location(tar.location) + (f", sample {shown}" if key else "")

    def _known(self, tar: Tar) -> dict[int, _Row] | None:
        """What the index has of a tar's samples, by the offset of their images."""
        if self.shards is None or self._kept is None:
            return None
        begin, end = tar.rows
        index = self.shards.index[begin:end]
        kept = self._kept[begin:end].tolist()
        columns = (index[name].tolist() for name in ("image_offset", "image_digest", "json_digest"))
        return {
            offset: _Row(keep, (image, text if self.ours else None))
            for offset, image, text, keep in zip(*columns, kept, strict=True)
        }

    def _set_tars(self, shards: ShardSet, exclude: Exclusions) -> list[Tar]:
        """The tars of a set that hold training samples."""
        rows = shards.rows("train", ["train"])
        kept = exclude.keeps(shards, rows)
        self.excluded = len(rows) - len(kept)
        self.uncaptioned = int((shards.index["captions"][kept] == 0).sum())
        self._kept = np.zeros(len(shards), dtype=bool)
        self._kept[kept] = True
        tars, begin = [], 0
        for number, shard in enumerate(shards.manifest.shards):
            end = begin + shard.samples
            if (shards.index["shard"][begin:end] != number).any():
                raise UserError(f"{self.name}: the index is not in the order of the tars; {self.remedy()}")
            samples = int(self._kept[begin:end].sum())
            if samples:
                location = shard.location or join_location(shards.location, shard.name)
                tars.append(Tar(check_location(location), samples, shard.bytes, (begin, end)))
            begin = end
        return tars

    def remedy(self) -> str:
        """What to do about a damaged tar or sample."""
        if self.shards is None:
            return "get the tar again, or write it as shards with `python -m shards.write img2dataset`"
        if not self.ours:
            return f"get the tar again and index it: `python -m shards.index build TARS --out {self.name}`"
        return f"copy it again, or remove the folder and write it with `python -m shards.write ... --out {self.name}`"


def _is_shard_set(location: str) -> bool:
    if location.split("?")[0].endswith((".tar", ".txt")):
        return False
    return is_remote(location) or os.path.isfile(os.path.join(location, MANIFEST_NAME))
