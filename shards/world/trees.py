"""Raw trees in the data sets' own formats: what each identity or pair writes, and what the tree lists."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.world.draws import Draws
from shards.world.identity import Identity
from shards.world.scenes import make_scene
from shards.world.spec import QUERIES_PER_IDENTITY, ExportSpec, World
from shards.world.vocabulary import words_of

SHARD_SIZE = 10_000
"""Rows per folder of an img2dataset output (its default)."""
_OTHER, _PAIR = 401, 402
Record = dict[str, Any]


@dataclass(frozen=True)
class Exporter:
    """A raw format: the units of work, what one unit writes, and the files about the whole tree."""

    units: Callable[[ExportSpec], list[tuple[Any, ...]]]
    write: Callable[[ExportSpec, Path, tuple[Any, ...]], list[Record]]
    finish: Callable[[ExportSpec, Path, list[Record]], dict[str, Any]]


def _card(identity: Identity) -> dict[str, Any]:
    return {
        "split": identity.split, "key": identity.key, "family": identity.family, "diff": identity.diff,
        "attributes": dict(identity.attributes),
    }  # fmt: skip


def _people_units(spec: ExportSpec) -> list[tuple[Any, ...]]:
    return [tuple(person) for person in spec.people()]


def _people_cards(spec: ExportSpec) -> dict[str, Any]:
    return {str(number): _card(spec.world.identity(split, index)) for number, split, index in spec.people()}


def _write_cuhk(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number, split, index = unit
    identity = spec.world.identity(split, index)
    folder = "train_query" if split == "train" else "test_query"
    records = []
    for position, (camera, k) in enumerate(spec.world.shots(identity, spec.images)):
        picture = spec.world.picture(identity, camera, k)
        captions = spec.world.captions(identity, camera, k, picture)
        path = f"{folder}/p{number}_s{position + 1}.jpg"
        (root / "imgs" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "imgs" / path).write_bytes(picture.jpeg())
        records.append(
            {
                "entry": {
                    "split": split,
                    "captions": [caption.text for caption in captions],
                    "file_path": path,
                    "processed_tokens": [words_of(caption.text) for caption in captions],
                    "id": number,
                },
                "mentions": [caption.mentions for caption in captions],
                "shot": [camera, k, picture.view],
            }
        )
    return records


def _finish_cuhk(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    entries = [record["entry"] for record in records]
    (root / "reid_raw.json").write_text(json.dumps(entries), encoding="utf-8")
    return {
        "identities": _people_cards(spec),
        "mentions": {record["entry"]["file_path"]: record["mentions"] for record in records},
        "shots": {record["entry"]["file_path"]: record["shot"] for record in records},
    }


def _market_units(spec: ExportSpec) -> list[tuple[Any, ...]]:
    people = [tuple(person) for person in spec.people() if person[1] != "val"]
    distractors = [(0, "distractor", index) for index in range(spec.test_ids // 2)]
    junk = [(-1, "junk", index) for index in range(spec.test_ids // 4)]
    return people + distractors + junk


def _market_name(number: int, camera: int, position: int, index: int) -> str:
    """Return a file name such as 0002_c1s1_000451_03.jpg; frame numbers keep names of 0000 and -1 apart."""
    frame = (index * 37 + position * 11) % 1_000_000
    person = "-1" if number < 0 else f"{number:04d}"
    return f"{person}_c{camera + 1}s1_{frame:06d}_{position:02d}.jpg"


def _write_market(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number, split, index = unit
    identity = spec.world.identity(split, index)
    records = []
    images = 2 if number <= 0 else spec.images
    for position, (camera, k) in enumerate(spec.world.shots(identity, images)):
        folder = "bounding_box_train" if split == "train" else "bounding_box_test"
        if split == "test" and position < QUERIES_PER_IDENTITY:
            folder = "query"
        path = f"{folder}/{_market_name(number, camera, position, index)}"
        picture = spec.world.picture(identity, camera, k)
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(picture.jpeg())
        records.append({"path": path, "shot": [camera, k, picture.view], "split": split, "index": index})
    return records


def _finish_market(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    for folder in ("bounding_box_train", "bounding_box_test", "query"):
        (root / folder).mkdir(exist_ok=True)
    cards = {number: card for number, card in _people_cards(spec).items() if card["split"] != "val"}
    strangers = {
        record["path"]: _card(spec.world.identity(record["split"], record["index"]))
        for record in records
        if record["split"] in ("distractor", "junk")
    }
    return {"identities": cards, "strangers": strangers, "shots": {r["path"]: r["shot"] for r in records}}


def other_world(world: World) -> World:
    """Return a world with other cameras and other people, for the person pairs of the generic corpus."""
    seed = int(Draws(world.seed, _OTHER).uniform() * 2**50) + 2**51
    return World(seed, world.hardness, world.siblings, world.coverage, world.wrong)


def _pair_units(spec: ExportSpec) -> list[tuple[Any, ...]]:
    return [(number,) for number in range(spec.ids)]


def _write_pair(spec: ExportSpec, root: Path, unit: tuple[Any, ...]) -> list[Record]:
    number = unit[0]
    draws = Draws(spec.world.seed, _PAIR, number)
    person = draws.chance(spec.person_share)
    if person:
        world = other_world(spec.world)
        identity = world.identity("train", number)
        camera = draws.below(6)
        picture = world.picture(identity, camera, 0)
        caption = world.captions(identity, camera, 0, picture)[0].text
        data, size = picture.jpeg(), picture.image.size
    else:
        scene = make_scene(draws, spec.world.hardness)
        caption, data, size = scene.caption, scene.jpeg(), scene.image.size
    shard, row = divmod(number, SHARD_SIZE)
    key = f"{shard:05d}{row:04d}"
    folder = root / f"{shard:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    meta = {
        "caption": caption, "url": f"https://world.invalid/{key}.jpg", "key": key, "status": "success",
        "error_message": None, "width": size[0], "height": size[1], "original_width": size[0],
        "original_height": size[1], "exif": "{}", "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    (folder / f"{key}.jpg").write_bytes(data)
    (folder / f"{key}.txt").write_text(caption, encoding="utf-8")
    (folder / f"{key}.json").write_text(json.dumps(meta, indent=4), encoding="utf-8")
    return [{"shard": shard, "person": person, "bytes": len(data)}]


def _finish_pairs(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    counts: dict[int, int] = {}
    for record in records:
        counts[record["shard"]] = counts.get(record["shard"], 0) + 1
    for shard, count in counts.items():
        stats = {
            "count": count, "successes": count, "failed_to_download": 0, "failed_to_resize": 0,
            "duration": 0.0, "start_time": 0.0, "end_time": 0.0, "status_dict": {"success": count},
        }  # fmt: skip
        (root / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4), encoding="utf-8")
    people = sum(record["person"] for record in records)
    return {"pairs": len(records), "person_pairs": people, "other_world_seed": other_world(spec.world).seed}


EXPORTERS: dict[str, Exporter] = {
    "cuhk_pedes": Exporter(_people_units, _write_cuhk, _finish_cuhk),
    "market1501": Exporter(_market_units, _write_market, _finish_market),
    "img2dataset": Exporter(_pair_units, _write_pair, _finish_pairs),
}
