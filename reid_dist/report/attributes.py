"""Attributes of the people of a shard set, where a side file tells them: `attributes.json` beside the manifest.

    {"attributes": {"market1501:0001": {"upper": "coat", "upper_colour": "red"}, ...}}

Keys are identities as samples name them; names and values are free. `python -m shards.world attributes` writes it for
a set of the procedural world; for another set, whoever has annotations can.
"""

from __future__ import annotations

from pydantic import ValidationError

from reid_dist.data.reader import ShardSet
from reid_dist.data.sample import ATTRIBUTES_NAME, Attributes
from reid_dist.errors import UserError

_MAX_BYTES = 1 << 28


def read_attributes(shards: ShardSet) -> dict[str, dict[str, str]]:
    """Attributes by identity; none of a set without the file, or behind a URL.

    Raises:
        UserError: the file is there and cannot be read.
    """
    path = shards.path / ATTRIBUTES_NAME
    if not path.is_file():
        return {}
    remedy = "write it again, or remove it to go without errors per attribute"
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path}: more than {_MAX_BYTES} bytes, the cap for such a file; {remedy}")
        return Attributes.model_validate_json(path.read_bytes()).attributes
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:100]
        raise UserError(f"{path}: not attributes by identity ({place}: {first['msg'][:100]}); {remedy}") from None
