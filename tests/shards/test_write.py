"""The command: raw tree to shard folder, whole or not at all."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from reid_dist.data.reader import ShardSet
from reid_dist.data.transforms import decode_image
from shards import write as write_module
from shards.index import file_sha256
from shards.write import main


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
    assert "not a complete shard set" in capsys.readouterr().err and (out / "thesis.tex").exists()
    (out / "thesis.tex").unlink()
    assert _main("market1501", market, out, "--allow-mismatch") == 0
    tar = next(out.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-1])
    assert _main("market1501", market, out, "--allow-mismatch") == 2
    assert "another size" in capsys.readouterr().err
    assert _main("market1501", market, market / "shards", "--allow-mismatch") == 2
    assert "lies inside --root" in capsys.readouterr().err


def test_undecodable_image_leaves_nothing(market: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = market / "query" / "0001_c1s1_001051_00.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    assert _main("market1501", market, tmp_path / "out" / "a", "--allow-mismatch") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {bad}: the image does not decode") and error.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_interrupt_leaves_nothing(market: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(data: bytes, name: str) -> tuple[bytes, int, int]:
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return data, 6, 12

    monkeypatch.setattr(write_module, "clean_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _main("market1501", market, tmp_path / "out" / "a", "--allow-mismatch")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["markt1501"], "did you mean market1501?"),
        (["CUHK-PEDES"], "did you mean cuhk_pedes?"),
        (["zzz"], "There are: cuhk_pedes, market1501, img2dataset"),
        (["dukemtmc"], "without the consent"),
        (["Occluded_Duke"], "without the consent"),
        (["market1501", "--shard-mb", "0"], "--shard-mb must be above 0"),
        (["market1501", "--dataset", "a b"], "--dataset 'a b'"),
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
