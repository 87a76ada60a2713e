"""The command: raw tree to shard folder, whole or not at all."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from reid_dist.data.reader import ShardSet
from reid_dist.data.transforms import decode_image
from reid_dist.errors import UserError
from shards.write import main
from shards.writing.files import file_sha256


def _main(name: str, root: Path, out: Path, *more: str) -> int:
    return main([name, "--root", str(root), "--out", str(out), *more])


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir() if path.name != "build.json"}


@pytest.mark.parametrize("name", ["cuhk_pedes", "market1501", "img2dataset"])
def test_trees_become_readable_shards(
    name: str, cuhk: Path, market: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = {"cuhk_pedes": cuhk, "market1501": market, "img2dataset": pairs}[name]
    out = tmp_path / "deep" / "shards"
    assert _main(name, root, out, "--allow-mismatch") == 0
    assert "found / published" in capsys.readouterr().out
    shards = ShardSet(out)
    assert shards.name == name and shards.manifest.card["licence"]
    for row in range(len(shards)):
        sample = shards.sample(row)
        assert decode_image(shards.image_bytes(row), (12, 6), "x").shape == (12, 6, 3)
        assert (sample.width, sample.height) == (6, 12)
        # Pillow's own JFIF files hold no metadata: they go through untouched.
        assert shards.image_bytes(row) == (root / sample.source).read_bytes()
        if name == "img2dataset":
            assert sample.pid == f"img2dataset:{shards.key(row)}"
    assert [path.name for path in out.parent.iterdir()] == ["shards"]


def test_plain_webdataset_opens_them(cuhk: Path, tmp_path: Path) -> None:
    assert _main("cuhk_pedes", cuhk, tmp_path / "a", "--allow-mismatch", "--shard-mb", "0.006") == 0
    shards = ShardSet(tmp_path / "a")
    urls = [str(tmp_path / "a" / shard.name) for shard in shards.manifest.shards]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(urls) > 1 and [item["__key__"] for item in found] == [shards.key(row) for row in range(10)]
    assert all(item["jpg"] == shards.image_bytes(row) for row, item in enumerate(found))
    assert [json.loads(item["json"])["captions"] for item in found] == [
        shards.sample(row).captions for row in range(10)
    ]


def test_same_input_same_bytes(cuhk: Path, tmp_path: Path) -> None:
    for out, seed in [("a", "0"), ("b", "0"), ("c", "1")]:
        assert _main("cuhk_pedes", cuhk, tmp_path / out, "--allow-mismatch", "--seed", seed) == 0
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b") != _hashes(tmp_path / "c")
    order = [ShardSet(tmp_path / "a").sample(row).source for row in range(10)]
    assert order != sorted(order)  # shuffled at write time
    other = ShardSet(tmp_path / "c")
    assert sorted(order) == sorted(other.sample(row).source for row in range(10))
    assert other.identities == ShardSet(tmp_path / "a").identities


def test_small_shards_and_another_name(cuhk: Path, tmp_path: Path) -> None:
    assert (
        _main("cuhk_pedes", cuhk, tmp_path / "a", "--allow-mismatch", "--shard-mb", "0.008", "--dataset", "mine") == 0
    )
    shards = ShardSet(tmp_path / "a")
    assert len(shards.manifest.shards) > 2 and shards.identities[0] == "mine:1"


def test_mismatch_stops_and_says_so(cuhk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("cuhk_pedes", cuhk, tmp_path / "a") == 2
    captured = capsys.readouterr()
    assert "3 / 11,003" in captured.out and "6 / 34,054" in captured.out
    assert captured.err.count("\n") == 1 and "--allow-mismatch" in captured.err
    assert not (tmp_path / "a").exists()
    assert _main("cuhk_pedes", cuhk, tmp_path / "a", "--allow-mismatch") == 0
    assert ShardSet(tmp_path / "a").manifest.card["matches_published"] is False


def test_procedural_trees_are_told_apart(cuhk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cuhk / "world.json").write_text(json.dumps({"version": 1, "parameters": {"seed": 5}, "identities": {}}))
    assert _main("cuhk_pedes", cuhk, tmp_path / "a") == 0
    assert "do not apply" in capsys.readouterr().out
    card = ShardSet(tmp_path / "a").manifest.card
    assert card["matches_published"] is None and card["world"]["parameters"] == {"seed": 5}
    assert "shows no people" in card["consent"]
    (cuhk / "world.json").write_text("[]")
    assert _main("cuhk_pedes", cuhk, tmp_path / "b") == 2


def test_second_call_keeps_what_is_there(market: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a"
    out.mkdir()  # an empty folder is fine
    assert _main("market1501", market, out, "--allow-mismatch") == 0
    before = (out / "manifest.json").stat().st_mtime_ns
    assert _main("market1501", market, out, "--allow-mismatch") == 0
    assert "up to date" in capsys.readouterr().out
    # The root may be written in another way.
    assert _main("market1501", market / ".." / market.name, out, "--allow-mismatch") == 0
    assert (out / "manifest.json").stat().st_mtime_ns == before
    assert _main("market1501", market, out, "--allow-mismatch", "--seed", "1") == 2
    assert "differs: seed" in capsys.readouterr().err
    os.utime(next((market / "query").glob("*.jpg")), (1, 1))
    assert _main("market1501", market, out, "--allow-mismatch") == 2
    assert "differs: raw files" in capsys.readouterr().err


def test_foreign_or_damaged_folders_are_left_alone(
    market: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    assert _main("market1501", market, out, "--allow-mismatch") == 2
    assert "holds no shard set of this program" in capsys.readouterr().err and (out / "thesis.tex").exists()
    (out / "thesis.tex").unlink()
    assert _main("market1501", market, out, "--allow-mismatch") == 0
    tar = next(out.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1])
    assert _main("market1501", market, out, "--allow-mismatch") == 2
    assert "another size" in capsys.readouterr().err
    assert _main("market1501", market, market / "shards", "--allow-mismatch") == 2
    assert "lies inside --root" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["markt1501"], "did you mean market1501?"),
        (["CUHK-PEDES"], "did you mean cuhk_pedes?"),
        (["zzz"], "There are: cuhk_pedes, "),
        (["dukemtmc"], "without the consent"),
        (["Occluded_Duke"], "without the consent"),
        (["market1501", "--shard-mb", "0"], "--shard-mb must be above 0"),
        (["market1501", "--shard-mb", "nan"], "--shard-mb nan: must be above 0"),
        (["market1501", "--shard-mb", "inf"], "--shard-mb inf: must be above 0"),
        (["market1501", "--dataset", "a b"], "--dataset 'a b'"),
        (["market1501", "--variant", "v3"], "--variant v3: market1501 has standard"),
        (["market1501", "--part", "0/4"], "1 <= i <= n"),
        (["market1501", "--part", "5/4"], "1 <= i <= n"),
        (["market1501", "--workers", "0"], "at least 1 worker"),
        (["market1501", "--max-bad-fraction", "1"], "from 0 to below 1"),
        (["market1501", "--exclude", "/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, market: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--root", str(market), "--out", str(tmp_path / "a")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_missing_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main("market1501", tmp_path / "none", tmp_path / "a") == 2
    assert "none: no such folder" in capsys.readouterr().err


def test_camera_and_junk_reach_the_index(market: Path, tmp_path: Path) -> None:
    assert _main("market1501", market, tmp_path / "a", "--allow-mismatch") == 0
    shards = ShardSet(tmp_path / "a")
    assert len(shards.rows("test", ["junk"])) == len(shards.rows("test", ["distractor"])) == 1
    assert sorted(np.unique(shards.index["camid"]).tolist()) == [0, 1, 2, 3, 4, 5]
    assert shards.manifest.splits["test"].identities == 2


def test_undecodable_image_stops_and_repair_continues(
    market: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = market / "query" / "0001_c1s1_001051_00.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:200])
    options = ("--allow-mismatch", "--shard-mb", "0.004", "--workers", "1")
    assert _main("market1501", market, tmp_path / "a", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {bad}: the image does not decode") and error.count("\n") == 1
    with pytest.raises(UserError, match=r"manifest\.json: missing"):
        ShardSet(tmp_path / "a")
    assert not list(tmp_path.rglob("*.partial"))
    # Another file means another set; shards of the old one must not stay in it.
    bad.write_bytes(whole)
    assert _main("market1501", market, tmp_path / "a", *options) == 2
    assert "differs: raw files" in capsys.readouterr().err


def test_bad_images_are_skipped_within_the_bound(
    market: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("0001_c1s1_001051_00.jpg", "1500_c2s1_000301_00.jpg"):
        (market / "query" / name).write_bytes(b"\xff\xd8 no image")
    options = ("--allow-mismatch", "--shard-mb", "0.004")
    assert _main("market1501", market, tmp_path / "a", *options, "--max-bad-fraction", "0.2") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 9 images cannot be used" in error and "query/" in error and "raise the bound" in error
    assert not (tmp_path / "a" / "manifest.json").exists()
    # A wider bound continues with what is there.
    assert _main("market1501", market, tmp_path / "a", *options, "--max-bad-fraction", "0.25", "--workers", "2") == 0
    shards = ShardSet(tmp_path / "a")
    assert len(shards) == 7
    skipped = shards.manifest.card["skipped"]
    assert sorted(line.split(": ")[0] for line in skipped) == [
        "query/0001_c1s1_001051_00.jpg",
        "query/1500_c2s1_000301_00.jpg",
    ]
    assert "does not decode" in skipped[0] and str(market) not in json.dumps(shards.manifest.card)
    # The tree may lie elsewhere; the bytes are the same with other workers.
    moved = market.rename(market.with_name("Moved"))
    assert _main("market1501", moved, tmp_path / "b", *options, "--max-bad-fraction", "0.9", "--workers", "1") == 0
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b")


def test_too_long_captions_count_as_bad(cuhk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = json.loads((cuhk / "reid_raw.json").read_text())
    entries[3]["captions"] = ["x" * 70_000]
    (cuhk / "reid_raw.json").write_text(json.dumps(entries))
    assert _main("cuhk_pedes", cuhk, tmp_path / "a", "--allow-mismatch") == 2
    assert "imgs/cam_a/003.jpg: a record of 70" in capsys.readouterr().err
    assert _main("cuhk_pedes", cuhk, tmp_path / "b", "--allow-mismatch", "--max-bad-fraction", "0.1") == 0
    assert len(ShardSet(tmp_path / "b")) == 9


def test_exclusion_of_people_and_images(cuhk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = (cuhk / "imgs/cam_a/004.jpg").read_bytes()
    listed = f"# on request\nmine:1\nsha256:{hashlib.sha256(raw).hexdigest()}\nother:2\n"
    (tmp_path / "exclude.txt").write_text(listed)
    options = ("--allow-mismatch", "--dataset", "mine", "--shard-mb", "0.005")
    assert _main("cuhk_pedes", cuhk, tmp_path / "a", *options, "--exclude", str(tmp_path / "exclude.txt")) == 0
    assert "10 / 34" not in capsys.readouterr().out
    shards = ShardSet(tmp_path / "a")
    sources = {shards.sample(row).source[-7:] for row in range(len(shards))}
    assert sources == {f"{number:03d}.jpg" for number in (3, 2, 5, 6, 7, 8, 9)} and "mine:1" not in shards.identities
    card = shards.manifest.card
    # Counts are those of the data set, before anything is left out.
    assert card["excluded"] == 3 and card["counts"]["train"]["found"]["images"] == 6
    assert card["counts"]["train"]["published"] == {
        "identities": 11_003,
        "images": 34_054,
        "captions": 68_126,
        "cameras": None,
    }
    assert _main("cuhk_pedes", cuhk, tmp_path / "a", *options) == 2
    assert "differs: exclusion list" in capsys.readouterr().err
    (tmp_path / "all.txt").write_text("\n".join(f"mine:{pid}" for pid in range(1, 6)))
    assert _main("cuhk_pedes", cuhk, tmp_path / "c", *options, "--exclude", str(tmp_path / "all.txt")) == 2
    assert "leaves nothing of mine" in capsys.readouterr().err


def test_card_says_where_it_comes_from(cuhk: Path, tmp_path: Path) -> None:
    Image.open(cuhk / "imgs/cam_a/002.jpg").save(cuhk / "imgs/cam_a/002.png")
    entries = json.loads((cuhk / "reid_raw.json").read_text())
    entries[2]["file_path"] = "cam_a/002.png"
    (cuhk / "reid_raw.json").write_text(json.dumps(entries))
    assert _main("cuhk_pedes", cuhk, tmp_path / "a", "--allow-mismatch") == 0
    card = ShardSet(tmp_path / "a").manifest.card
    assert (card["converter"], card["variant"], card["matches_published"]) == ("cuhk_pedes", "standard", False)
    assert "market1501" in card["contains"] and card["skipped"] == [] and card["excluded"] == 0
    assert card["images"] == {"copied": 9, "encoded": 1, "quality": 95}


def test_order_by_identity_keeps_people_together(market: Path, tmp_path: Path) -> None:
    options = ("--allow-mismatch", "--order", "identity", "--seed")
    runs = []
    for seed in range(8):
        assert _main("market1501", market, tmp_path / str(seed), *options, str(seed)) == 0
        shards = ShardSet(tmp_path / str(seed))
        pids = shards.index["pid"]
        assert 1 + np.count_nonzero(np.diff(pids)) == len(shards.identities)
        runs.append(tuple(pids[np.sort(np.unique(pids, return_index=True)[1])].tolist()))
    assert len(set(runs)) > 4  # identities are shuffled


def test_full_disk_is_exit_1(
    market: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert _main("market1501", market, tmp_path / "a", "--allow-mismatch", "--workers", "1") == 1
    assert "No space left" in capsys.readouterr().err and not list(tmp_path.rglob("*.partial"))
    assert _main("market1501", market, tmp_path / "a", "--allow-mismatch") == 0
