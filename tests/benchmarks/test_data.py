"""The benchmark of the loader: its crops, its pipelines and its rows."""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.benchmark import main
from reid_dist.benchmarks import data, pipelines
from reid_dist.benchmarks.data import Crops, Settings
from reid_dist.data.reader import ShardSet
from reid_dist.data.transforms import decode_image
from reid_dist.errors import UserError

ROOT = Path(__file__).parents[2]
SETTINGS = Settings(workers=1, seconds=0.02, rounds=2, batch_size=16)


@pytest.fixture(scope="module")
def market(tiny_world: Path) -> Path:
    return tiny_world / "market1501"


@pytest.fixture
def crops(market: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Crops:
    monkeypatch.setattr(data, "_LEAST_IMAGES", 200)
    return data.prepare(ShardSet(market), tmp_path, SETTINGS)


def test_crops_have_one_form_and_the_same_content_everywhere(crops: Crops, market: Path) -> None:
    source, shards = ShardSet(market), ShardSet(crops.shards)
    files = [path.read_bytes() for path in sorted(crops.files.iterdir())]
    assert files == crops.images == [shards.image_bytes(row) for row in range(len(shards))]
    assert len(files) == 200 and len(shards.manifest.shards) >= 4
    assert {Image.open(io.BytesIO(image)).size for image in files} == {(128, 256)}
    for row in (0, 5, 199):
        original = decode_image(source.image_bytes(row % len(source)), (256, 128), "x").astype(int)
        assert np.abs(decode_image(files[row], (256, 128), "x") - original).mean() < 6
    assert 0 < crops.resized <= 200


def test_crops_that_fit_are_taken_as_they_are(crops: Crops, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    repeated = data.prepare(ShardSet(crops.shards), again, SETTINGS)
    assert repeated.images == crops.images and repeated.resized == 0


@pytest.mark.parametrize("size", [(256, 128), (64, 32)])
def test_all_pipelines_deliver_the_same_pixels(crops: Crops, size: tuple[int, int]) -> None:
    expected = {decode_image(image, size, "x").tobytes() for image in crops.images}
    ours = next(pipelines.ours(crops.shards, size, 16, 1)._batches)[0]["image_BCHW"]
    others = [
        next(pipelines.plain_webdataset(crops.shards, size, 16, 1)._batches)[0],
        next(pipelines.image_folder(crops.files, size, 16, 1)._batches),
    ]
    assert {image.permute(1, 2, 0).numpy().tobytes() for image in ours} <= expected
    reference = np.stack([np.frombuffer(image, np.uint8) for image in expected]).astype(np.int16)
    for batch in others:  # without scaling inside the decoder: near, not equal
        assert tuple(batch.shape) == (16, 3, *size)
        flat = batch.permute(0, 2, 3, 1).reshape(16, -1).numpy().astype(np.int16)
        distance = np.abs(flat[:, None] - reference[None]).mean(axis=2).min(axis=1)
        assert distance.max() < (2 if size == (256, 128) else 12)


def test_rows(crops: Crops) -> None:
    rows = data.measure(crops, SETTINGS)
    assert [(row["pipeline"], row["size"]) for row in rows] == [
        (name, size) for size in ("256x128", "64x32") for name in ("ours", "bare", "webdataset", "imagefolder")
    ]
    for row in rows:
        assert 0 < row["least"] <= row["samples_per_s"] <= row["greatest"] and row["workers"] == 1
        assert (row["share_of_bare"] == 1) == (row["pipeline"] == "bare") or row["share_of_bare"] > 0
    text = data.table(rows)
    assert len(text.splitlines()) == 9 and "imagefolder" in text


def test_a_measurement_is_repeatable_after_a_rest(crops: Crops) -> None:
    bare = pipelines.Bare(crops.images, (64, 32), 16, 2)
    assert bare.measure(0.05) > 0 and bare.measure(0.05) > 0
    bare.close()
    assert not any(process.is_alive() for process in bare._processes)


def test_an_empty_set_is_refused(market: Path, tmp_path: Path) -> None:
    empty = ShardSet(market)
    empty.index = empty.index[:0]
    with pytest.raises(UserError, match="holds no images"):
        data.prepare(empty, tmp_path, SETTINGS)


def test_command(market: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "data.json"
    command = [sys.executable, "launch/benchmark.py", "data", "--shards", str(market), "--json", str(out)]
    command += ["--workers", "2", "--seconds", "0.05", "--rounds", "1", "--batch-size", "32"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    written = json.loads(out.read_text())
    assert len(written["rows"]) == 8 and {"pipeline", "size", "samples_per_s", "workers"} <= set(written["rows"][0])
    assert written["decoder"] and written["machine"]["packages"]["torch"] and written["settings"]["batch_size"] == 32
    assert f"written: {out}" in result.stdout


def test_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--shards", str(tmp_path / "none"), "--json", str(tmp_path / "x.json")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "no such shard folder" in said
    assert len(said.splitlines()) == 1 and not (tmp_path / "x.json").exists()
    with pytest.raises(SystemExit) as ended:
        main(["nothing"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "--workers 0: must be above 0"),
        (["--seconds", "nan"], "--seconds nan: must be above 0"),
        (["--seconds", "inf"], "--seconds inf: must be above 0"),
        (["--json", "/"], "--json /: is a folder"),
    ],
)
def test_wrong_options(options: list[str], message: str) -> None:
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    with pytest.raises(UserError, match=message):
        data.run(parser.parse_args(["--shards", "none", "--json", "x.json", *options]))
