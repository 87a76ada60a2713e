"""What the people of a shard set look like, told to the set: `attributes.json` beside its manifest."""

import json
from pathlib import Path
from typing import Any

from reid_dist.data.reader import ShardSet
from reid_dist.data.sample import ATTRIBUTES_NAME, SPLITS, Attributes
from reid_dist.errors import UserError
from shards.world.export import WORLD_FILE, write_whole
from shards.world.identity import effective

# What a format calls person number n of the world, less n.
_OFFSETS = {"cuhk_pedes": 0, "ufine6926": 0, "market1501": 0, "icfg_pedes": -1, "rstp_reid": -1}


def write_attributes(raw: Path, folder: Path) -> int:
    """Write the file for a shard set that was made of a tree of the world; distractors and junk are left out.

    Args:
        raw: The tree.
        folder: The shard set.

    Returns:
        Number of people.

    Raises:
        UserError: The tree is no tree, of a format that does not number its people, or not that of the set.
    """
    tree = _tree(raw)
    shards = ShardSet(folder)
    offset = _OFFSETS[tree["parameters"]["format"]]
    cards = {int(number) + offset: card for number, card in tree["identities"].items()}
    known = {}
    for position, code in sorted({(int(row["pid"]), int(row["split"])) for row in shards.index}):
        pid, split = shards.identities[position], SPLITS[code]
        digits = pid.partition(":")[2]
        card = cards.get(int(digits)) if digits.isdecimal() else None
        if card is not None and card["split"] != split:
            raise UserError(f"{folder}: {pid} is in split {split}, but not in {raw}; name the tree of this set")
        if card is not None:
            known[pid] = effective(card["attributes"])
    if not known:
        raise UserError(f"{folder}: none of its people is in {raw}; name the tree that the set was made of")
    write_whole(folder / ATTRIBUTES_NAME, json.dumps(Attributes(attributes=known).model_dump(), sort_keys=True) + "\n")
    return len(known)


def _tree(raw: Path) -> dict[str, Any]:
    path = raw / WORLD_FILE
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = tree["parameters"]["format"]
        complete = all({"split", "attributes"} <= card.keys() for card in tree["identities"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: cannot be read; name a tree written by `python -m shards.world export`") from None
    if found not in _OFFSETS or not complete:
        raise UserError(f"{path}: a {found} tree does not number its people; those that do: {', '.join(_OFFSETS)}")
    return tree
