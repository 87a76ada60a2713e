"""The raw formats of people as their authors write them: trees, keys and names, quirks included."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shards.world.export import export
from shards.world.spec import QUERIES_PER_IDENTITY, ExportSpec, World

IDS, TEST_IDS, VAL_IDS, IMAGES = 6, 4, 2, 5


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("formats")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            spec = ExportSpec(name, World(5, 0.35, 1, 0.7, 0.0), IDS, TEST_IDS, VAL_IDS, IMAGES, 0.4)
            export(spec, folder / name, say=lambda line: None)
        return folder / name

    return make


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _files(root: Path, pattern: str) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.glob(pattern)}


def test_cuhk_pedes_has_both_annotations(tree: Callable[[str], Path]) -> None:
    split, unsplit = (_json(tree("cuhk_pedes") / name) for name in ("reid_raw.json", "caption_all.json"))
    assert {entry["id"] for entry in split} == set(range(1, IDS + TEST_IDS + VAL_IDS + 1))
    assert [set(entry) for entry in unsplit] == [{"id", "file_path", "captions"}] * len(split)
    assert all({**entry, **other} == entry for entry, other in zip(split, unsplit, strict=True))


def test_icfg_pedes(tree: Callable[[str], Path]) -> None:
    entries = _json(tree("icfg_pedes") / "ICFG-PEDES.json")
    assert len(entries) == (IDS + TEST_IDS) * IMAGES and {entry["split"] for entry in entries} == {"train", "test"}
    for entry in entries:
        assert set(entry) == {"split", "captions", "file_path", "processed_tokens", "id"}
        assert len(entry["captions"]) == 1
        assert re.fullmatch(r"(train|test)/\d{4}/\d{4}_\d{3}_\d{2}_0303morning_\d{4}_\d(_ex)?\.jpg", entry["file_path"])
    assert min(entry["id"] for entry in entries) == 0
    assert _files(tree("icfg_pedes") / "imgs", "*/*/*") == {entry["file_path"] for entry in entries}


def test_rstp_reid(tree: Callable[[str], Path]) -> None:
    entries = _json(tree("rstp_reid") / "data_captions.json")
    assert {entry["split"] for entry in entries} == {"train", "val", "test"}
    for entry in entries:
        assert set(entry) == {"id", "img_path", "captions", "split"} and len(entry["captions"]) == 2
        assert re.fullmatch(r"\d{4}_c[1-6]_\d{4}\.jpg", entry["img_path"])
        assert int(entry["img_path"][:4]) == entry["id"]
    assert min(entry["id"] for entry in entries) == 0
    assert _files(tree("rstp_reid") / "imgs", "**/*") == {entry["img_path"] for entry in entries}


def test_ufine6926(tree: Callable[[str], Path]) -> None:
    (annotation,) = (path for path in tree("ufine6926").glob("*.json") if path.name != "world.json")
    entries = _json(annotation)
    assert [entry["file_path"] for entry in entries] == [f"images/{n}.jpg" for n in range(1, len(entries) + 1)]
    assert all(set(entry) == {"split", "id", "file_path", "captions"} for entry in entries)
    assert all(len(entry["captions"]) == 2 for entry in entries)
    mentions = _json(tree("ufine6926") / "world.json")["mentions"]
    assert all(len(mentions[entry["file_path"]]) == 2 for entry in entries)


def test_msmt17(tree: Callable[[str], Path]) -> None:
    root = tree("msmt17")
    lists = {
        name: (root / f"list_{name}.txt").read_text().splitlines() for name in ("train", "val", "query", "gallery")
    }
    for lines in lists.values():
        for line in lines:
            assert re.fullmatch(r"(\d{4})/\1_\d{3}_0[1-6]_0303morning_\d{4}_\d(_ex)?\.jpg \d+", line)
            assert int(line[:4]) == int(line.split()[1])
    people = {name: {line.split()[1] for line in lines} for name, lines in lists.items()}
    assert people["train"] == people["val"] == {str(n) for n in range(IDS)}
    assert people["query"] == people["gallery"] == {str(n) for n in range(TEST_IDS)}
    assert not set(lists["train"]) & set(lists["val"])
    assert _files(root / "train", "*/*") == {line.split()[0] for line in lists["train"] + lists["val"]}
    assert _files(root / "test", "*/*") == {line.split()[0] for line in lists["query"] + lists["gallery"]}


def test_cuhk03_np(tree: Callable[[str], Path]) -> None:
    root = tree("cuhk03_np")
    labelled, detected = (_files(root / variant, "*/*") for variant in ("labeled", "detected"))
    assert len(labelled) == (IDS + TEST_IDS) * IMAGES
    # Persons 1 and 6 lack an image in the detected boxes.
    assert detected < labelled and len(labelled - detected) == 2
    assert not list(root.rglob("*.jpg"))
    for name in detected:
        assert re.fullmatch(r"(bounding_box_train|bounding_box_test|query)/[1-3]_\d{3}_[12]_\d{2}\.png", name)
        with Image.open(root / "labeled" / name) as whole, Image.open(root / "detected" / name) as cut:
            assert whole.format == cut.format == "PNG"
            assert whole.width == cut.width and whole.height > cut.height
    people = {name.split("/")[1][:5] for name in labelled}
    assert len(people) == IDS + TEST_IDS > len({person[2:] for person in people})
    assert sum(name.startswith("query/") for name in labelled) == TEST_IDS * QUERIES_PER_IDENTITY


def test_luperson(tree: Callable[[str], Path]) -> None:
    lmdb = pytest.importorskip("lmdb")
    root = tree("luperson")
    files = _files(root / "images", "*/*/*")
    assert len(files) == IDS * IMAGES
    assert [path.name for path in (root / "lmdb").iterdir()] == ["data.mdb"]
    environment = lmdb.open(str(root / "lmdb"), readonly=True, lock=False)
    with environment.begin() as transaction:
        entries = {key.decode(): value for key, value in transaction.cursor()}
    environment.close()
    assert entries == {name: (root / "images" / name).read_bytes() for name in files}
    assert (root / "lmdb" / "data.mdb").stat().st_size < 1_000_000


def test_folder(tree: Callable[[str], Path]) -> None:
    root = tree("folder")
    people = {
        split: {name.split("/")[0] for name in _files(root / split, "*/*")} for split in ("train", "val", "query")
    }
    assert {split: len(names) for split, names in people.items()} == {"train": IDS, "val": VAL_IDS, "query": TEST_IDS}
    assert {name.split("/")[0] for name in _files(root / "gallery", "*/*")} == people["query"]


@pytest.mark.parametrize(
    "name",
    ["cuhk_pedes", "icfg_pedes", "rstp_reid", "ufine6926", "market1501", "msmt17", "cuhk03_np", "luperson", "folder"],
)
def test_world_file_names_every_picture(name: str, tree: Callable[[str], Path]) -> None:
    world = _json(tree(name) / "world.json")
    pictures = {path.relative_to(tree(name)).as_posix() for path in tree(name).rglob("*.[jp][pn]g")}
    assert len(world["shots"]) == len(pictures)
    assert all(any(picture.endswith(path) for picture in pictures) for path in world["shots"])
    assert all(
        len(shot) == 3 and 0 <= shot[0] < 6 and shot[2] in ("front", "side", "back") for shot in world["shots"].values()
    )
    described = {"cuhk_pedes", "icfg_pedes", "rstp_reid", "ufine6926"}
    assert set(world["mentions"]) == (set(world["shots"]) if name in described else set())
    splits = {"luperson": {"train"}}.get(name, {"train", "test"})
    splits |= {"val"} if name in ("cuhk_pedes", "rstp_reid", "folder") else set()
    assert {card["split"] for card in world["identities"].values()} == splits
