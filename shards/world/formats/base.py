"""What every raw format shares: the exporter's three steps, the pictures of a person and the log of an export."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.world.camera import Picture
from shards.world.captions import Caption
from shards.world.identity import Identity
from shards.world.spec import CAPTIONS_PER_IMAGE, QUERIES_PER_IDENTITY, ExportSpec, World

Record = dict[str, Any]


@dataclass(frozen=True)
class Exporter:
    """A raw format.

    Attributes:
        units: The units of work, independent of each other.
        write: Writes the pictures of one unit and returns what the last step needs of them.
        finish: Writes the files about the whole tree from all records; returns what goes into world.json.
        cameras: Most cameras that its file names can tell apart.
    """

    units: Callable[[ExportSpec], list[tuple[Any, ...]]]
    write: Callable[[ExportSpec, Path, tuple[Any, ...]], list[Record]]
    finish: Callable[[ExportSpec, Path, list[Record]], dict[str, Any]]
    cameras: int = 99


def card_of(identity: Identity) -> dict[str, Any]:
    """Return what world.json tells of an identity."""
    return {
        "split": identity.split, "key": identity.key, "family": identity.family, "diff": identity.diff,
        "attributes": dict(identity.attributes),
    }  # fmt: skip


def people_units(spec: ExportSpec, *splits: str) -> list[tuple[Any, ...]]:
    """Return one unit for each identity of these splits (none named: of all): number, split, position in the split."""
    return [tuple(person) for person in spec.people() if not splits or person[1] in splits]


def people_cards(spec: ExportSpec, *splits: str) -> dict[str, Any]:
    """Return the cards of the identities of these splits (none named: of all) by their number in the tree."""
    return {
        str(number): card_of(spec.world.identity(split, index)) for number, split, index in people_units(spec, *splits)
    }


@dataclass(frozen=True)
class Shot:
    """One picture of a person.

    Attributes:
        world: Where it was taken.
        identity: The person.
        position: 0-based place among the person's pictures.
        camera: 0-based camera.
        k: 0-based place among the person's pictures by this camera.
        picture: What the camera shows.
    """

    world: World
    identity: Identity
    position: int
    camera: int
    k: int
    picture: Picture

    def captions(self, count: int = CAPTIONS_PER_IMAGE) -> list[Caption]:
        """Return so many sentences about it; few are the first ones of many."""
        return self.world.captions(self.identity, self.camera, self.k, self.picture, count)

    def record(self, path: str, *captions: Caption) -> Record:
        """Return the record of the picture: its path in the tree, camera, place and view, and what captions mention."""
        log: Record = {"path": path, "shot": [self.camera, self.k, self.picture.view]}
        return {**log, "mentions": [caption.mentions for caption in captions]} if captions else log


def shots_of(spec: ExportSpec, split: str, index: int, images: int | None = None) -> Iterator[Shot]:
    """Yield the pictures of a person; `images` other than those of the export where a number is given."""
    identity = spec.world.identity(split, index)
    for position, (camera, k) in enumerate(spec.world.shots(identity, images or spec.images)):
        yield Shot(spec.world, identity, position, camera, k, spec.world.picture(identity, camera, k))


def is_query(spec: ExportSpec, split: str, shot: Shot) -> bool:
    """Return whether a picture is a query of image retrieval: the first ones of a test person, one at least is not."""
    return split == "test" and shot.position < min(QUERIES_PER_IDENTITY, spec.images - 1)


def put(root: Path, path: str, data: bytes) -> None:
    """Write a file of the tree, with its folders."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def put_json(root: Path, path: str, value: object) -> None:
    """Write a JSON file of the tree."""
    put(root, path, json.dumps(value).encode())


def people_log(cards: dict[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """Return what world.json tells of people: cards by number, for each path its shot and mentions."""
    return {
        "identities": cards,
        "shots": {record["path"]: record["shot"] for record in records},
        "mentions": {record["path"]: record["mentions"] for record in records if "mentions" in record},
    }
