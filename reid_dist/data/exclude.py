"""Lists of what must not be trained on: people or images of a test split, or people who asked to be left out."""

import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reid_dist.data.reader import Rows, ShardSet
from reid_dist.data.remote import is_remote, read_file
from reid_dist.data.sample import DATASET_PATTERN
from reid_dist.errors import UserError

# A raw id that holds white space would not be told from two entries on a line.
EXCLUDABLE = re.compile(rf"{DATASET_PATTERN.pattern}:\S+")
IMAGE_PREFIX = "sha256:"
# A comment that tells of a set: name, and sha256 of its index.
COMPARED = "# compared: {} {}"

_MAX_BYTES = 1 << 30
_HEX = re.compile(r"[0-9a-fA-F]{64}")
_COMPARED = re.compile(rf"^{COMPARED.format(DATASET_PATTERN.pattern, '([0-9a-f]{64})')}$")
_COMMAND = "python -m shards.verify --overlap DIR... --out"


@dataclass(frozen=True)
class Exclusions:
    """What is left out.

    Attributes:
        pids: identities, "dataset:raw id".
        images: hex sha256 of stored images.
        compared: sets that the list was made by comparing, each by the sha256 of its index; for `contamination`.
    """

    pids: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()
    compared: frozenset[str] = field(default=frozenset(), compare=False)

    def __bool__(self) -> bool:
        return bool(self.pids or self.images)

    def keeps(self, shards: ShardSet, rows: Rows) -> Rows:
        """Those of some rows that are not excluded, in their order.

        Args:
            shards: the set that the rows belong to.
            rows: row numbers. Shape: (N,).

        Returns:
            Row numbers, at most N. Images are known by the first 8 bytes of their hash, as the index keeps them.
        """
        kept = np.ones(len(rows), dtype=bool)
        if self.pids:
            dropped = np.array([pid in self.pids for pid in shards.identities], dtype=bool)
            kept &= ~dropped[shards.index["pid"][rows]]
        if self.images:
            kept &= ~np.isin(shards.index["image_digest"][rows], self._digests)
        return rows[kept]

    @cached_property
    def _digests(self) -> npt.NDArray[np.uint64]:
        beginnings = (bytes.fromhex(image)[:8] for image in sorted(self.images))
        return np.array([int.from_bytes(beginning, "little") for beginning in beginnings], dtype=np.uint64)


NOTHING = Exclusions()


def read_exclusions(path: str | os.PathLike[str]) -> Exclusions:
    """An exclusion list: an identity ("dataset:raw id") or an image ("sha256:" and 64 hex digits) a line.

    Args:
        path: UTF-8 text file, as `python -m shards.verify --overlap` writes it, or its http, https or s3 address (a
            text); `#` comments and blank lines are passed over.

    Raises:
        UserError: the file cannot be read, or a line is something else.
    """
    try:
        far = isinstance(path, str) and is_remote(path)
        content = read_file(str(path), _MAX_BYTES) if far else Path(path).read_bytes()
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(
            f"{path}: the exclusion list cannot be read ({reason}); write it with `{_COMMAND} {os.fspath(path)}`"
        ) from None
    pids, images, compared = set(), set(), set()
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            compared.update(_COMPARED.findall(line))
            continue
        prefix, _, image = line.partition(IMAGE_PREFIX)
        if not prefix and _HEX.fullmatch(image):
            images.add(image.lower())
        elif prefix and EXCLUDABLE.fullmatch(line):
            pids.add(line)
        else:
            raise UserError(
                f'{path}: line {number} "{line[:60]}" is neither an identity nor an image; write one '
                f'"dataset:raw id" or "sha256:<64 hex digits>" a line, without spaces, and start comments with #'
            )
    return Exclusions(frozenset(pids), frozenset(images), frozenset(compared))
