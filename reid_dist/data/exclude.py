"""Lists of identities that must not be trained on: people of a test split, or people who asked to be left out."""

import os
import re
from pathlib import Path

from reid_dist.data.sample import DATASET_PATTERN
from reid_dist.errors import UserError

# A raw id that holds white space would not be told from two entries on a line.
EXCLUDABLE = re.compile(rf"{DATASET_PATTERN.pattern}:\S+")


def read_exclusions(path: str | os.PathLike[str]) -> frozenset[str]:
    """The identities of an exclusion list: one pid ("dataset:raw id") a line, `#` comments, blank lines.

    Args:
        path: UTF-8 text file, as `python -m shards.overlap` writes it.

    Returns:
        Pid strings as they stand in samples and manifests; empty when the list holds comments only.

    Raises:
        UserError: the file cannot be read, or a line is something else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(
            f"{path}: the list of excluded identities cannot be read ({reason}); "
            f"write it with `python -m shards.overlap --train DIR... --eval DIR... --out {os.fspath(path)}`"
        ) from None
    pids = set()
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        if not EXCLUDABLE.fullmatch(line):
            raise UserError(
                f'{path}: line {number} "{line[:60]}" is not an identity; write one "dataset:raw id" a line, '
                f"without spaces, and start comments with #"
            )
        pids.add(line)
    return frozenset(pids)
