"""Checking shard sets: each kind of damage is found, named and the only thing named; a whole set is whole."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reid_dist.data.sample import INDEX_NAME, MANIFEST_NAME, Manifest, Sample, content_digest
from shards.checking.shard_set import verify_set
from shards.index import ShardWriter
from shards.verify import main
from tests.hostile_tars import BLOCK, END, Payload, join, jpeg, member, png_bomb, record

COUNT, PER_SHARD = 12, 4


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Three shards of four samples; two images of an identity, the last identity is tested."""
    return write_set(tmp_path / "tiny")


def write_set(folder: Path, card: dict[str, Any] | None = None, **changes: Any) -> Path:
    folder.mkdir()
    writer = ShardWriter(folder, "tiny", PER_SHARD * 5 * BLOCK)
    for number in range(COUNT):
        image = jpeg(number)
        split = {"split": "test", "role": "gallery"} if number >= COUNT - 2 else {}
        facts = json.loads(record(number, image, **{**split, **changes}))
        writer.add(f"s{number:03d}", Sample.model_validate(facts), image)
    manifest = writer.finish(card or {})
    assert changes or [shard.samples for shard in manifest.shards] == [PER_SHARD] * 3
    return folder


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def tie(folder: Path, index: np.ndarray | None = None, **changes: Any) -> None:
    """Make the manifest's hashes those of the files, so that nothing but the damage inside is left to find."""
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    if index is not None:
        buffer = io.BytesIO()
        np.save(buffer, index)
        (folder / INDEX_NAME).write_bytes(buffer.getvalue())
    for shard in manifest["shards"]:
        data = (folder / shard["name"]).read_bytes()
        shard.update(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    manifest["index_sha256"] = hashlib.sha256((folder / INDEX_NAME).read_bytes()).hexdigest()
    (folder / MANIFEST_NAME).write_text(Manifest.model_validate({**manifest, **changes}).model_dump_json())


def replace(folder: Path, old: bytes, new: bytes, digest: str = "") -> None:
    """Put a content of the same length into the set, with `digest` (image or json) into the index as well."""
    assert len(old) == len(new)
    (path,) = [path for path in tars(folder) if old in path.read_bytes()]
    path.write_bytes(path.read_bytes().replace(old, new))
    index = np.load(folder / INDEX_NAME)
    if digest:
        index[f"{digest}_digest"][index[f"{digest}_digest"] == content_digest(old)] = content_digest(new)
    tie(folder, index)


def damage(folder: Path, **options: Any) -> list[str]:
    return [": ".join(filter(None, each)) for each in verify_set(folder, **options).damage]


def test_a_whole_set(whole: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    out, vocabulary = tmp_path / "new" / "report.json", tmp_path / "words.txt"
    vocabulary.write_text("picture\n")
    assert main([str(whole), "--json", str(out), "--workers", "2", "--vocabulary", str(vocabulary)]) == 0
    printed = capsys.readouterr().out
    assert "12 samples in 3 shards" in printed and "whole: every hash, count and sample is right" in printed
    assert "DAMAGE" not in printed
    (report,) = json.loads(out.read_text())["sets"]
    assert report["whole"] and report["damage"] == [] and report["samples"] == COUNT
    assert report["splits"] == {
        "train": {"identities": 5, "images": 10, "captions": 10, "cameras": 1},
        "test": {"identities": 1, "images": 2, "captions": 2, "cameras": 1},
    }
    assert report["captions"]["train"]["words_mean"] == 2 and report["cut_captions"] == 0
    assert report["duplicates"] == {"copies": 0, "identities": 0, "splits": 0}
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_every_bit_counts(whole: Path) -> None:
    """A flipped bit at any place of a tar is found; where it lies in a sample, that sample is named."""
    path = tars(whole)[1]
    intact = path.read_bytes()
    for place in np.random.default_rng(1).integers(0, len(intact) * 8, 60).tolist():
        flipped = bytearray(intact)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        found = damage(whole)
        assert found and all(each.startswith(f"shard {path.name}") for each in found)
    path.write_bytes(intact)
    assert damage(whole) == []


def image_damage(folder: Path) -> Iterator[tuple[Path, str]]:
    """Copies of a set, each with one damage to an image, and what is said of it."""
    image = jpeg(5)
    name, place = tars(folder)[1].name, "sample s005"
    middle = len(image) // 2
    flipped = image[:middle] + bytes([image[middle] ^ 16]) + image[middle + 1 :]
    cut = image[:200] + bytes(len(image) - 200)
    bomb = png_bomb()
    for number, (new, digest, what) in enumerate(
        [
            (flipped, "", f"shard {name}, {place}: the image is not the one of the index (changed or damaged)"),
            (flipped, "image", f"shard {name}, {place}: the image's sha256 is not the one in its record"),
            (cut, "image", f"shard {name}, {place}: the image does not decode ("),
            (b"BM" + image[2:], "image", f"shard {name}, {place}: the image does not decode (no JPEG, PNG or WebP)"),
            (jpeg(5, 4, 4), "image", f"shard {name}, {place}: the image has 4 x 4 pixels, its record says 10 x 20"),
            (bomb[: len(image)], "image", f"shard {name}, {place}: the image has 10000 x 10000 pixels, more than the"),
        ]
    ):
        copy = shutil.copytree(folder, folder.with_name(f"image{number}"))
        replace(copy, image, new + bytes(len(image) - len(new)), digest)
        yield copy, what


def test_images(whole: Path) -> None:
    for folder, what in image_damage(whole):
        found = damage(whole.with_name(folder.name))
        assert any(each.startswith(what) for each in found), (what, found)
        assert all("sample s005: " in each for each in found), found


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        (b'"camid":0', b'"camid":7', "its record says camera 7, the index 0"),
        (b'"pid":"tiny:2"', b'"pid":"tiny:9"', "its record says identity tiny:9, the index tiny:2"),
        (b'"split":"train","role":"train"', b'"split":"test" ,"role":"query"', "its record says role query"),
        (b'"captions":["picture 5"]', b'"captions":[         ] ', "says number of captions 0, the index 1"),
        (b'"width":10', b'"width":11', "the image has 10 x 20 pixels, its record says 11 x 20"),
        (b'"sha256":"', b'"sha256":1', "the record is damaged (Invalid JSON"),
        (b'"width":10', b'"width":"1', "the record is damaged (Invalid JSON"),
        (b'"width":10,', b'"width":"",', "the record is damaged ("),
        (b'"width":10,"height":20', b'"width":"5","height":1', "the record is damaged (width: Input should be a valid"),
        (b'"camid":0', b'"camid":-', "the record is damaged (Invalid JSON"),
        (b'"picture 5"', b"\"picture \xff\"", "the record is damaged (Invalid JSON"),
        (b'"picture 5"', b"12345678901", "the record is damaged (captions.0: Input should be a valid string)"),
        (b'"dataset":"tiny"', b'"dataset":"t/ny"', "the record is damaged (dataset: "),
        (b'"v":1', b'"v":2', "the record is damaged (v: "),
        (b'"source"', b'"sourse"', "the record is damaged (source: Field required"),
    ],
)  # fmt: skip
def test_records(whole: Path, old: bytes, new: bytes, what: str) -> None:
    text = Sample.model_validate_json(record(5, jpeg(5))).model_dump_json().encode()
    assert old in text
    changed = text.replace(old, new)[: len(text)].ljust(len(text))
    replace(whole, text, changed, "json")
    found = damage(whole)
    assert any(what in each for each in found), found
    assert all(each.startswith(f"shard {tars(whole)[1].name}, sample s005: ") for each in found)
    # Without the index taking part, the change itself is what is found.
    replace(whole, changed, text)
    assert all("the record is not the one of the index" in each for each in damage(whole))


def blocks(path: Path) -> list[bytes]:
    """The members of a tar of ours as bytes."""
    data, members, position = path.read_bytes(), [], 0
    while data[position]:
        size = int(data[position + 124 : position + 135], 8)
        end = position + BLOCK + -(-size // BLOCK) * BLOCK
        members.append(data[position:end])
        position = end
    return members


MEMBERS: list[tuple[str, Callable[[list[bytes]], list[bytes]], list[str]]] = [
    ("half", lambda m: [m[0], *m[2:]], ["s004: an image without its record"]),
    ("half at the end", lambda m: m[:-1], ["s007: an image without its record"]),
    ("half", lambda m: m[1:], ["s004: a record without its image"]),
    ("interleaved", lambda m: [m[0], m[2], m[1], m[3], *m[4:]], ["s004: an image without", "s005: a record without"]),
    ("swapped", lambda m: [m[1], m[0], *m[2:]], ["s004: a record without its image", "s004: an image without"]),
    ("added", lambda m: [*m, member("a.jpg", jpeg(1)), member("a.json", record(1, jpeg(1)))], ["a: is not in the"]),
    ("duplicate", lambda m: [*m, *m[:2]], ["occurs twice"]),
    ("dot", lambda m: [member("a.b.jpg", jpeg(1)), *m], ["a.b.jpg: is no <key>.jpg or <key>.json"]),
    ("other", lambda m: [*m, member("x.txt", b"words")], ["x.txt: is no <key>.jpg or <key>.json"]),
    ("folder", lambda m: [*m, member("x/y.jpg", jpeg(1))], ["x/y.jpg: is no <key>.jpg or <key>.json"]),
    ("link", lambda m: [*m, member("x.jpg", kind=b"2", link="/etc/passwd")], ["'x.jpg' is a symbolic link"]),
    ("outside", lambda m: [*m, member("../x.jpg", jpeg(1))], ["'../x.jpg' is no name"]),
    ("absolute", lambda m: [*m, member("/x.jpg", jpeg(1))], ["'/x.jpg' is no name"]),
]


@pytest.mark.parametrize(("change", "whats"), [each[1:] for each in MEMBERS], ids=[each[0] for each in MEMBERS])
def test_members(whole: Path, change: Callable[[list[bytes]], list[bytes]], whats: list[str]) -> None:
    path = tars(whole)[1]
    path.write_bytes(join(change(blocks(path))))
    tie(whole)
    found = damage(whole)
    assert all(each.startswith(f"shard {path.name}") for each in found), found
    for what in whats:
        assert any(what in each for each in found), found


def test_what_a_truncated_tar_has_lost_is_counted(whole: Path) -> None:
    path = tars(whole)[1]
    members = blocks(path)
    path.write_bytes(b"".join(members[:5])[:-9])
    tie(whole)
    found = damage(whole)
    assert "truncated" in found[0] and found[1:] == [f"shard {path.name}: 2 of its samples are not there any more"]
    path.write_bytes(b"".join(members))
    tie(whole)
    # Only the mark of the end is missing.
    (found_one,) = damage(whole)
    assert "truncated" in found_one


def test_samples_behind_a_break_are_checked(whole: Path) -> None:
    path = tars(whole)[0]
    members = blocks(path)
    broken = b"x" * BLOCK + members[1][BLOCK:]
    path.write_bytes(join([members[0], broken, *members[2:]]))
    tie(whole)
    (found,) = damage(whole)
    assert "not a tar header" in found
    # A second damage, behind the first.
    path.write_bytes(path.read_bytes().replace(jpeg(2), jpeg(2)[:-9] + bytes(9)))
    tie(whole)
    found = damage(whole)
    assert len(found) > 1 and any(each.startswith(f"shard {path.name}, sample s002: ") for each in found[1:])


@pytest.mark.parametrize("name", [MANIFEST_NAME, INDEX_NAME])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x93NUMPY", b"x" * 300])
def test_side_files(whole: Path, name: str, content: bytes | None, capsys: pytest.CaptureFixture[str]) -> None:
    if content is None:
        (whole / name).unlink()
    else:
        (whole / name).write_bytes(content)
    assert main([str(whole)]) == 1
    printed = capsys.readouterr().out
    assert f"DAMAGE {whole}, {name}: " in printed and "`python -m shards.write NAME --root RAW --out" in printed


def test_an_index_of_objects_is_not_unpickled(whole: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    objects = np.empty(1, dtype=object)
    objects[0] = Payload(mark)
    np.save(whole / INDEX_NAME, objects, allow_pickle=True)
    tie(whole)
    assert any("index.npy: is not readable" in each for each in damage(whole))
    assert not mark.exists()


INDEX: list[tuple[str, Callable[[np.ndarray], Any], str]] = [
    ("pid", lambda i: i["pid"].__setitem__(5, 99), "pid 99 in row 5 (1 such rows) is outside [0, 6)"),
    ("negative pid", lambda i: i["pid"].__setitem__(5, -1), "pid -1 in row 5 (1 such rows) is outside [0, 6)"),
    ("camera", lambda i: i["camid"].__setitem__(5, -2), "camid -2 in row 5"),
    ("split", lambda i: i["split"].__setitem__(5, 3), "split 3 in row 5"),
    ("role", lambda i: i["role"].__setitem__(5, -1), "role -1 in row 5"),
    ("captions", lambda i: i["captions"].__setitem__(5, -1), "captions -1 in row 5"),
    ("shard", lambda i: i["shard"].__setitem__(5, 3), "shard 3 in row 5"),
    ("offset", lambda i: i["image_offset"].__setitem__(5, -5), "image_offset -5 in row 5"),
    ("beyond", lambda i: i["image_offset"].__setitem__(7, 1 << 40), "no image begins at byte 1099511627776"),
    ("size", lambda i: i["image_size"].__setitem__(5, -1), "image_size -1 in row 5"),
    ("records", lambda i: i["json_offset"].__setitem__(5, 512), "s005: the record is not the one of the index"),
    ("order", lambda i: i.__setitem__(slice(4, 6), i[[5, 4]]), "rows are not in the order of the tars"),
]


@pytest.mark.parametrize(("change", "what"), [each[1:] for each in INDEX], ids=[each[0] for each in INDEX])
def test_index(whole: Path, change: Callable[[np.ndarray], Any], what: str) -> None:
    index = np.load(whole / INDEX_NAME)
    change(index)
    tie(whole, index)
    found = damage(whole)
    assert any(what in each for each in found), found


def test_counts_keys_and_strays(whole: Path) -> None:
    manifest = json.loads((whole / MANIFEST_NAME).read_bytes())
    splits = manifest["splits"]
    tie(whole, splits={**splits, "train": {**splits["train"], "captions": 11}})
    (found,) = damage(whole)
    assert found == (
        "manifest.json: says 5 identities, 10 images, 11 captions, 1 cameras in split train, the index holds "
        "5 identities, 10 images, 10 captions, 1 cameras"
    )
    tie(whole, splits=splits, identities=[*manifest["identities"][:-1], manifest["identities"][0]])
    assert "manifest.json: lists an identity twice" in damage(whole)
    tie(whole, identities=manifest["identities"])
    index = np.load(whole / INDEX_NAME)
    tie(whole, index[:-1])
    found = damage(whole)
    assert "index.npy: 11 rows for the 12 samples of manifest.json" in found
    assert f"index.npy: 3 rows for the 4 samples of shard {tars(whole)[2].name}" in found
    assert f"shard {tars(whole)[2].name}, sample s011: is not in the index" in found
    tie(whole, index, splits={"train": splits["train"]})
    assert "says nothing in split test" in damage(whole)[0]
    tie(whole, splits=splits)
    (whole / "tiny-000009.tar").write_bytes(END)
    assert damage(whole) == ["tiny-000009.tar: lies in the folder, but manifest.json does not list it"]
    (whole / "tiny-000009.tar").unlink()
    # The second shard with the keys of the first: every tar is sound, the set is not.
    path = tars(whole)[1]
    path.write_bytes(join([_renamed(each) for each in blocks(path)]))
    tie(whole)
    assert damage(whole) == [f"shard {path.name}: 2 of its keys occur a second time in the set"]


def _renamed(block: bytes) -> bytes:
    """s004 and s005 become s000 and s001."""
    name = block[:100].rstrip(b"\0").decode()
    new = {"s004": "s000", "s005": "s001"}.get(name.partition(".")[0])
    if new is None:
        return block
    size = int(block[124:135], 8)
    return member(f"{new}.{name.partition('.')[2]}", block[BLOCK : BLOCK + size])


def test_all_damages_are_listed_and_some_printed(
    whole: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    index = np.load(whole / INDEX_NAME)
    index["camid"] += 3
    index["captions"] += 1
    tie(whole, index)
    out = tmp_path / "report.json"
    assert main([str(whole), "--json", str(out)]) == 1
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if "DAMAGE" in line]
    (report,) = json.loads(out.read_text())["sets"]
    # Two of each sample, and two splits in the manifest.
    assert len(report["damage"]) == 2 * COUNT + 2 and len(lines) == 20
    assert any("... and 6 more" in line for line in printed) and "  26 damages" in printed
    assert all("sample s0" in line and "copy the file again, or remove the folder" in line for line in lines)


def test_published_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = {"converter": "cuhk_pedes"}
    folder = write_set(tmp_path / "tiny", card)
    assert main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "5 / 11,003" in printed and "10 / 34,054" in printed and "0 / 1,000" in printed
    assert main([str(folder), "--expect"]) == 1
    assert "train: 5 identities, 10 images, 10 captions, 1 cameras, other than published" in capsys.readouterr().out
    drawn = write_set(tmp_path / "drawn", {**card, "world": {"version": 1}})
    assert main([str(drawn), "--expect"]) == 0
    assert "(no published counts)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such shard folder"),
        (["https://user:word@host/set?token=1"], "https://host/set: every byte is read"),
        (["pipe:touch x"], "scheme pipe: is not read"),
        (["SET", "--workers", "0"], "--workers"),
        (["SET", "--context-length", "2"], "--context-length"),
        (["SET", "--vocabulary", "a", "--tokenizer", "b"], "name one of them"),
        (["SET", "--vocabulary", "nowhere.txt"], "nowhere.txt: the vocabulary cannot be read"),
        (["SET", "--tokenizer", "no-such"], "--tokenizer no-such: open_clip has no such architecture"),
        (["SET", "--out", "x"], "--out: belongs to --overlap"),
        (["SET", "--json", "/"], "--json /: is a folder; name a file"),
    ],
)
def test_wrong_usage(whole: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(whole) if each == "SET" else each for each in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
