"""What was found beside what the authors published, as a table and as the card of the set."""

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from shards.raw import Converter, Counts, RawSample, count_parts

WORLD_NAME = "world.json"

_NONE_FOUND = Counts(0, 0, 0, 0)


def make_card(
    name: str, converter: Converter, variant: str, root: Path, samples: Sequence[RawSample], allow_mismatch: bool
) -> dict[str, Any]:
    """Print found beside published counts, stop when they differ, and return the manifest's card.

    Args:
        name: the converter's.
        converter: the module.
        variant: one of its EXPECTED.
        root: the raw tree.
        samples: all that it holds.
        allow_mismatch: go on when the counts are not the published ones.

    Raises:
        UserError: nothing was found, or counts differ.
    """
    found = count_parts(samples, converter)
    if not found:
        raise UserError(f"{root}: no images found; check --root")
    world = _world(root)
    expected = {} if world is not None else converter.EXPECTED[variant]
    print(count_table(found, expected))
    card = {
        "converter": name,
        "variant": variant,
        "contains": [],
        **converter.CARD,
        "counts": {part: _both(found.get(part), expected.get(part)) for part in dict.fromkeys([*expected, *found])},
    }
    if world is not None:
        print("published counts: do not apply, the tree was exported from the procedural world")
        return {
            **card,
            "title": f"procedural world in the form of {converter.CARD['title']}",
            "licence": "Apache-2.0, as the program that drew it",
            "consent": "drawn by a program; shows no people",
            "source": "shards.world",
            "citation": "",
            "contains": [],
            "matches_published": None,
            "world": world,
        }
    differing = [part for part in expected if not _matches(found.get(part, _NONE_FOUND), expected[part])]
    if differing and not allow_mismatch:
        raise UserError(
            f"{root}: counts of {', '.join(differing)} are not the published ones (table above); "
            f"complete the data set, or pass --allow-mismatch"
        )
    published = any(number is not None for counts in expected.values() for number in astuple(counts))
    return {**card, "matches_published": not differing if published else None}


def count_table(found: dict[str, Counts], expected: dict[str, Counts]) -> str:
    """Found and published counts of each part, one line each; "-" is not published."""
    rows = [["", "identities", "images", "captions", "cameras"]]
    for part in dict.fromkeys([*expected, *found]):
        here, published = found.get(part, _NONE_FOUND), expected.get(part, Counts())
        pairs = zip(astuple(here), astuple(published), strict=True)
        rows.append([part, *(f"{a:,} / " + ("-" if b is None else f"{b:,}") for a, b in pairs)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([f"{lines[0]}   (found / published)", *lines[1:]])


def _both(found: Counts | None, published: Counts | None) -> dict[str, Any]:
    return {"found": asdict(found or _NONE_FOUND), "published": asdict(published or Counts())}


def _matches(found: Counts, expected: Counts) -> bool:
    pairs = zip(astuple(found), astuple(expected), strict=True)
    return all(published is None or here == published for here, published in pairs)


def _world(root: Path) -> dict[str, Any] | None:
    """The parameters of a procedural tree; None for a tree that is not one."""
    path = root / WORLD_NAME
    if not path.is_file():
        return None
    try:
        world = json.loads(path.read_bytes())
        return {"version": world["version"], "parameters": world["parameters"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not a file of the procedural world; export the tree again") from None
