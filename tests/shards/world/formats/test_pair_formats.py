"""The raw formats of pairs: their schemas as the data sets have them, their quirks, and equal bytes on every export."""

import csv
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shards.world.export import export
from shards.world.formats import webperson
from shards.world.formats.pairs import generic_pair, other_world, person_pair
from shards.world.spec import LEVELS, ExportSpec, World

QUICKSTART = World(3, **LEVELS["quickstart"])  # type: ignore[arg-type]


def spec_of(form: str, ids: int = 30, world: World = QUICKSTART) -> ExportSpec:
    return ExportSpec(form, world, ids, 6, 4, 3, 0.4)


def tree(form: str, out: Path, ids: int = 30) -> Path:
    export(spec_of(form, ids), out, say=lambda line: None)
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def digest(root: Path) -> str:
    """Of names, sentences and sizes; JPEG bytes depend on the encoder, pixels are pinned in test_golden.py."""
    found = hashlib.sha256()
    for path in sorted(root.glob("0*/*.jpg")):
        with Image.open(path) as image:
            facts = f"{path.name} {image.size} {path.with_suffix('.txt').read_text()}\n"
        found.update(facts.encode())
    return found.hexdigest()


def test_img2dataset_is_that_of_the_first_release(tmp_path: Path) -> None:
    # Made by the code of commit 0ca2938: published quickstart runs start from these files.
    pinned = "ed8edad3d24f33f034a78226fa5fa8dca7b1157ccf6be1f3526c42d1e71067fc"
    assert digest(tree("img2dataset", tmp_path / "out", 12)) == pinned


@pytest.mark.parametrize("form", ["synth_pedes", "mals", "luperson_mllm", "webperson", "coco", "flickr30k", "wit"])
def test_equal_bytes_on_every_export(form: str, tmp_path: Path) -> None:
    trees = [tree(form, tmp_path / name, 8) for name in ("one", "two")]
    files = [sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file()) for root in trees]
    assert files[0] == files[1]
    assert all((trees[0] / file).read_bytes() == (trees[1] / file).read_bytes() for file in files[0])


def test_people_of_pairs() -> None:
    spec = spec_of("mals")
    assert len({person_pair(spec, number).identity.key for number in range(20)}) == 20
    assert person_pair(spec, 3).identity == QUICKSTART.identity("train", 3)
    pairs = [generic_pair(spec, number) for number in range(60)]
    assert {len(pair.captions) for pair in pairs if pair.person} == {2}
    assert 10 < sum(pair.person for pair in pairs) < 38
    assert all(Image.open(io.BytesIO(pair.data)).size == pair.size for pair in pairs)


def test_the_other_world_keeps_every_knob_but_the_seed() -> None:
    world = World(5, 0.5, 2, 0.6, 0.1, instance=0.5, cameras=3)
    other = other_world(world)
    assert other.seed != 5 and other.parameters() == {**world.parameters(), "seed": other.seed}


def test_synth_pedes_schema(tmp_path: Path) -> None:
    root = tree("synth_pedes", tmp_path / "out")
    entries = read(root / "synthpedes_dataset.json")
    assert len(entries) == 30 * 3 and {entry["id"] for entry in entries} == set(range(1, 31))
    for entry in entries:
        assert set(entry) == {"id", "file_path", "attributes", "captions", "prompt_caption"}
        part, number, _ = entry["file_path"].split("/")
        assert int(number) == entry["id"] and 1 <= int(part.removeprefix("Part")) <= 11
        assert len(entry["attributes"]) == len(entry["prompt_caption"]) == 1 and len(entry["captions"]) == 2
        assert len(entry["attributes"][0].split(",")) == 6
    assert set(read(root / "world.json")["identities"]) == {str(number) for number in range(1, 31)}


def test_mals_schema(tmp_path: Path) -> None:
    entries = read(tree("mals", tmp_path / "out") / "gene_attrs" / "g_c_g_a_0_attrs.json")
    assert [entry["image_id"] for entry in entries] == [f"c_g_a_0_{number}" for number in range(30)]
    for number, entry in enumerate(entries):
        assert set(entry) == {"image", "caption", "image_id", "label"}
        assert entry["image"] == f"gene_crop/c_g_a_0/{number}.jpg" and isinstance(entry["caption"], str)
        assert len(entry["label"]) == 27 and set(entry["label"]) <= {1, 0, -1}


def test_luperson_mllm_has_four_captions_and_leaks(tmp_path: Path) -> None:
    root = tree("luperson_mllm", tmp_path / "out")
    files = [read(root / f"{name}.json") for name in ("Ts-qwen", "Td-qwen", "Ts-shikra", "Td-shikra")]
    assert all(file.keys() == files[0].keys() for file in files) and len(files[0]) == 30
    names = {path.name for path in (root / "LUPerson-MLLM").iterdir()}
    assert {key.rpartition("/")[2] for key in files[0]} == names
    assert all(len({file[key] for file in files}) == 4 for key in files[0])
    leaks = [sum("description]" in text for text in file.values()) for file in files]
    assert leaks == [0, 0, 0, 3]


def test_webperson_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(webperson, "FILE_SIZE", 20)
    monkeypatch.setattr(webperson, "GROUP_SIZE", 8)
    root = tree("webperson", tmp_path / "out")
    files = sorted((root / "data").iterdir())
    assert [file.name for file in files] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert [parquet.ParquetFile(file).metadata.num_row_groups for file in files] == [3, 2]
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    assert len(rows) == 30 and set(rows[0]) == {"image", "image_path", "caption1", "caption2"}
    assert Image.open(io.BytesIO(rows[0]["image"]["bytes"])).format == "JPEG"
    assert rows[0]["image"]["path"] is None and len({row["image_path"] for row in rows}) == 30


def test_coco_schemas(tmp_path: Path) -> None:
    root = tree("coco", tmp_path / "out")
    for split, count in (("train", 30), ("val", 4)):
        official = read(root / "annotations" / f"captions_{split}2017.json")
        assert set(official) == {"info", "images", "licenses", "annotations"} and len(official["images"]) == count
        ids = [annotation["id"] for annotation in official["annotations"]]
        assert len(set(ids)) == len(ids)
        for image in official["images"]:
            with Image.open(root / f"{split}2017" / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
    images = read(root / "dataset_coco.json")["images"]
    wanted = {"filepath", "filename", "imgid", "split", "sentids", "sentences", "cocoid"}
    assert all(set(image) == wanted for image in images)
    splits = [image["split"] for image in images]
    assert [splits.count(name) for name in ("train", "restval", "test", "val")] == [23, 7, 6, 4]
    assert {len(image["sentences"]) for image in images} == {1, 5, 6}
    sentences = [sentence for image in images for sentence in image["sentences"]]
    assert [sentence["sentid"] for sentence in sentences] == list(range(len(sentences)))
    assert set(sentences[0]) == {"tokens", "raw", "imgid", "sentid"}


def test_wit_has_both_forms(tmp_path: Path) -> None:
    root = tree("wit", tmp_path / "out", 130)
    generic = spec_of("wit", 130)
    with gzip.open(root / "wit_v1.train.all-00000-of-00001.tsv.gz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows[0]) == 17 and {row["language"] for row in rows} == {"en", "de"}
    there = [row for row in rows if "not-here" not in row["image_url"]]
    assert len(rows) - len(there) == 13
    links = {row["image_url"] for row in there}
    names = {hashlib.sha256(link.encode()).hexdigest() for link in links}
    assert len(links) == 65 and {path.stem for path in (root / "images").rglob("*.jpg")} == names
    assert rows[0]["caption_reference_description"] == generic_pair(generic, 0).captions[0]
    members = {}
    for path in sorted(root.glob("*.tar")):
        with tarfile.open(path) as tar:
            members.update({member.name: tar.extractfile(member).read() for member in tar})  # type: ignore[union-attr]
    assert len(list(root.glob("*.tar"))) == 2 and len(members) == 65 * 3
    pair = generic_pair(generic, 7)
    assert members["000000007.jpg"] == pair.data and members["000000007.txt"].decode() == pair.captions[0]
    assert json.loads(members["000000007.json"])["caption"] == pair.captions[0]
