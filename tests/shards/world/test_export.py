"""Exports: formats, determinism, reuse, refusal, and nothing left behind by an interruption."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from PIL import Image

from reid_dist.errors import UserError
from shards.world import export as export_module
from shards.world.__main__ import KNOBS, main
from shards.world.export import export
from shards.world.formats import EXPORTERS, img2dataset
from shards.world.formats.img2dataset import other_world
from shards.world.spec import LEVELS, ExportSpec, World
from shards.world.vocabulary import coverage_of

ROOT = Path(__file__).parents[3]
WORLD = World(0, 0.35, 1, 0.7, 0.0)


def _spec(form: str, ids: int = 6, world: World = WORLD, test_ids: int = 8, val_ids: int = 0) -> ExportSpec:
    return ExportSpec(form, world, ids, test_ids, val_ids, 8, 0.4)


def _digest(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def cuhk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "cuhk"
    export(_spec("cuhk_pedes", val_ids=2), out)
    return out


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "market"
    export(_spec("market1501"), out)
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "pairs"
    export(_spec("img2dataset", ids=700), out)
    return out


def test_cuhk_pedes_schema(cuhk: Path) -> None:
    entries = json.loads((cuhk / "reid_raw.json").read_text())
    assert len(entries) == 16 * 8
    for entry in entries:
        assert set(entry) == {"split", "captions", "file_path", "processed_tokens", "id"}
        assert len(entry["captions"]) == len(entry["processed_tokens"]) == 2
        with Image.open(cuhk / "imgs" / entry["file_path"]) as image:
            assert 56 <= image.height <= 256 and image.width * 2 == image.height
    assert {entry["id"] for entry in entries if entry["split"] == "train"} == set(range(1, 7))
    assert {entry["id"] for entry in entries if entry["split"] == "test"} == set(range(7, 15))
    assert {entry["id"] for entry in entries if entry["split"] == "val"} == {15, 16}


def test_world_file_logs_every_caption(cuhk: Path) -> None:
    world = json.loads((cuhk / "world.json").read_text())
    entries = json.loads((cuhk / "reid_raw.json").read_text())
    assert set(world["mentions"]) == {entry["file_path"] for entry in entries}
    assert all(len(logs) == 2 for logs in world["mentions"].values())
    families: dict[tuple[str, int], set[str]] = {}
    for card in world["identities"].values():
        families.setdefault((card["split"], card["family"]), set()).add(card["split"])
        assert len(card["attributes"]) == 22
    assert len(families) == 8
    assert world["parameters"]["world"]["hardness"] == 0.35


def test_market_names_and_roles(market: Path) -> None:
    pattern = re.compile(r"(-1|\d{4})_c([1-6])s\d_\d{6}_\d{2}\.jpg")
    names = {folder: sorted(path.name for path in (market / folder).iterdir()) for folder in
             ("bounding_box_train", "bounding_box_test", "query")}  # fmt: skip
    found = {folder: [pattern.fullmatch(name) for name in listed] for folder, listed in names.items()}
    assert all(match for matches in found.values() for match in matches)
    assert len(names["bounding_box_train"]) == 48 and len(names["query"]) == 24
    gallery = [match[1] for match in found["bounding_box_test"] if match]
    assert gallery.count("0000") == 8 and gallery.count("-1") == 4 and len(gallery) == 8 * 5 + 12
    for person in range(7, 15):
        cameras = [match[2] for match in found["query"] if match and int(match[1]) == person]
        assert len(set(cameras)) == 3
        own = [match[2] for match in found["bounding_box_test"] if match and int(match[1]) == person]
        assert all(set(own) - {camera} for camera in cameras)


def test_a_person_looks_the_same_in_both_trees(cuhk: Path, market: Path) -> None:
    shots = json.loads((cuhk / "world.json").read_text())["shots"]
    other = json.loads((market / "world.json").read_text())["shots"]
    by_shot = {
        (int(path.split("/p")[1].split("_")[0]), *shot): (cuhk / "imgs" / path).read_bytes()
        for path, shot in shots.items()
    }
    same = 0
    for path, shot in other.items():
        number = int(path.split("/")[1].split("_")[0])
        if number > 0:
            assert (market / path).read_bytes() == by_shot[(number, *shot)]
            same += 1
    assert same == 14 * 8


def test_img2dataset_layout(pairs: Path) -> None:
    keys = sorted(path.stem for path in (pairs / "00000").glob("*.jpg"))
    assert keys == [f"{number:09d}" for number in range(700)]
    meta = json.loads((pairs / "00000" / "000000003.json").read_text())
    wanted = "caption url key status error_message width height original_width original_height exif sha256"
    assert set(meta) == set(wanted.split())
    assert meta["caption"] == (pairs / "00000" / "000000003.txt").read_text()
    data = (pairs / "00000" / "000000003.jpg").read_bytes()
    assert meta["sha256"] == hashlib.sha256(data).hexdigest()
    assert json.loads((pairs / "00000_stats.json").read_text())["successes"] == 700
    world = json.loads((pairs / "world.json").read_text())
    assert 0.33 < world["person_pairs"] / world["pairs"] < 0.47


def test_rows_beyond_a_shard_get_the_next_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(img2dataset, "SHARD_SIZE", 4)
    export(_spec("img2dataset", ids=6), tmp_path / "out")
    assert (tmp_path / "out" / "00001" / "000010001.jpg").is_file()
    assert json.loads((tmp_path / "out" / "00001_stats.json").read_text())["count"] == 2


def test_generic_corpus_covers_the_caption_vocabulary(cuhk: Path, pairs: Path) -> None:
    found = coverage_of(pairs, cuhk)
    assert found.word_share >= 90 and found.occurrence_share >= 99, found.missing
    assert 110 <= found.words <= 165


def test_person_pairs_come_from_another_world() -> None:
    other = other_world(WORLD)
    assert other.seed != WORLD.seed and other_world(World(1, 0.35, 1, 0.7, 0.0)).seed != other.seed
    assert other.identity("train", 0).attributes != WORLD.identity("train", 0).attributes


@pytest.mark.parametrize("form", ["cuhk_pedes", "market1501", "img2dataset"])
def test_workers_do_not_change_a_tree(form: str, tmp_path: Path) -> None:
    spec = _spec(form, ids=20, test_ids=0)
    export(spec, tmp_path / "one", workers=1)
    export(spec, tmp_path / "two", workers=2)
    assert _digest(tmp_path / "one") == _digest(tmp_path / "two")


def test_same_parameters_are_kept_and_others_refused(cuhk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (cuhk / "world.json").stat().st_mtime_ns
    assert export(_spec("cuhk_pedes", val_ids=2), cuhk) is False
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--out .*other parameters \(ids\)"):
        export(_spec("cuhk_pedes", ids=7, val_ids=2), cuhk)
    with pytest.raises(UserError, match=r"--out .*format"):
        export(_spec("market1501", val_ids=2), cuhk)
    assert (cuhk / "world.json").stat().st_mtime_ns == before


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="--out"):
        export(_spec("cuhk_pedes"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_an_exception_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(jobs: list[object], workers: int) -> Iterator[list[dict[str, object]]]:
        yield export_module._work(jobs[0])  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "_records", broken)
    with pytest.raises(KeyboardInterrupt):
        export(_spec("cuhk_pedes"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("workers", "number"), [("1", signal.SIGTERM), ("2", signal.SIGTERM), ("2", signal.SIGINT)])
def test_termination_leaves_nothing(workers: str, number: signal.Signals, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "shards.world",
        "export",
        "market1501",
        "--out",
        str(tmp_path / "out"),
        "--ids",
        "5000",
    ]
    process = subprocess.Popen([*command, "--workers", workers], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".out.partial-*/*/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 128 + number and error == "error: interrupted; run the same command again\n"
    assert list(tmp_path.iterdir()) == []


def test_a_killed_worker_ends_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = BaseProcess.start

    def start_and_kill(process: BaseProcess) -> None:
        start(process)
        process.kill()

    monkeypatch.setattr(BaseProcess, "start", start_and_kill)
    with pytest.raises(OSError, match="a worker process ended with exit code -9"):
        export(_spec("cuhk_pedes", ids=40), tmp_path / "out", workers=2)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_export_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-999999999").mkdir()
    export(_spec("img2dataset", ids=3), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("form", list(EXPORTERS))
def test_every_format_can_be_exported_twice_the_same(form: str, tmp_path: Path) -> None:
    spec = ExportSpec(form, replace(WORLD, instance=0.5), 3, 2, 1, 3, 0.4)
    for out in (tmp_path / "one", tmp_path / "two"):
        export(spec, out)
        assert json.loads((out / "world.json").read_text())["parameters"]["format"] == form
    assert _digest(tmp_path / "one") == _digest(tmp_path / "two")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--hardness", "-1"], "--hardness"),
        (["--coverage", "1.5"], "--coverage"),
        (["--images", "1"], "--images"),
        (["--level", "nightmare"], "--level"),
        (["--ids", "0"], "--ids"),
        (["--ids", "many"], "--ids"),
        (["--workers", "0"], "--workers"),
        (["--hardness", "nan"], "--hardness"),
        (["--instance", "1.1"], "--instance"),
        (["--cameras", "1"], "--cameras"),
        (["--cameras", "51"], "--cameras"),
        (["--unseen-cameras", "1"], "--unseen-cameras"),
        (["--unseen-cameras", "6"], "--unseen-cameras"),
        (["--held-out", "6"], "--held-out"),
        (["--style", "verse"], "--style"),
    ],
)
def test_wrong_values_give_one_line_and_exit_2(
    flags: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "cuhk_pedes", "--out", str(tmp_path / "out"), "--ids", "2", "--seed", "0", *flags]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_knobs_reach_the_world_by_name(tmp_path: Path) -> None:
    flags = "--hardness .1 --siblings 2 --coverage .9 --wrong .3 --instance .5 --cameras 9 --unseen-cameras 2"
    flags += " --held-out 4 --style list --ids 2 --test-ids 1 --images 2 --seed 8"
    assert main(["export", "cuhk_pedes", "--out", str(tmp_path / "out"), *flags.split()]) == 0
    stored = json.loads((tmp_path / "out" / "world.json").read_text())["parameters"]
    assert World(**stored["world"]) == World(8, 0.1, 2, 0.9, 0.3, 0.5, 9, 2, 4, "list", "list")
    assert (stored["ids"], stored["test_ids"], stored["images"]) == (2, 1, 2)


def test_every_knob_and_level_is_documented() -> None:
    text = (ROOT / "docs" / "world.md").read_text()
    assert [name for name in KNOBS if f"`--{name.replace('_', '-')}`" not in text] == []
    for name, level in LEVELS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
        values = [float(cell) for cell in row.split("|")[2:6]]
        assert values == [level["hardness"], level["siblings"], level["coverage"], level["wrong"]], name


def test_more_cameras_than_file_names_can_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--out", str(tmp_path / "out"), "--ids", "1", "--test-ids", "0", "--images", "2", "--cameras", "15"]
    assert main(["export", "market1501", *command]) == 2
    assert "--cameras 15: must be between 2 and 9 for market1501" in capsys.readouterr().err
    assert main(["export", "msmt17", *command]) == 0


def test_a_full_disk_is_no_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["export", "cuhk_pedes", "--out", str(tmp_path / "out"), "--ids", "1", "--test-ids", "0"]) == 1
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_speed_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["speed", "--images", "17", "--level", "claims"]) == 0
    found = re.match(r"(\d+) images/s of wall clock, (\d+) images/s of processor time", capsys.readouterr().out)
    assert found and int(found[2]) > 20
    assert main(["speed", "--images", "0"]) == 2


def test_unknown_format_and_missing_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "nuscenes", "--out", str(tmp_path), "--ids", "2", "--seed", "0"]) == 2
    assert main(["oracle", str(tmp_path), str(tmp_path)]) == 2
    assert main(["vocabulary", str(tmp_path), str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_oracle_and_vocabulary_commands(cuhk: Path, market: Path, pairs: Path, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert main(["oracle", str(cuhk), str(market), "--json", str(tmp_path / "oracle.json")]) == 0
    result = json.loads((tmp_path / "oracle.json").read_text())
    assert set(result) == {"t2i", "i2i"} and result["t2i"]["queries"] == 8 * 8 * 2
    assert 50 < result["t2i"]["R1"] < 100 and result["i2i"]["R1"] > 99
    capsys.readouterr()
    assert main(["vocabulary", str(pairs), str(cuhk)]) == 0
    assert "%" in capsys.readouterr().out


def test_levels() -> None:
    assert LEVELS["quickstart"] == {"hardness": 0.35, "siblings": 1, "coverage": 0.7, "wrong": 0.0}


ONE_PICTURE = """
import hashlib, json, sys
from shards.world.spec import World
card, shot, parameters = json.loads(sys.argv[1])
world = World(**parameters)
identity = world.identity(card["split"], card["key"] % 10_000_000)
picture = world.picture(identity, shot[0], shot[1])
print(hashlib.sha256(picture.jpeg()).hexdigest())
print(json.dumps([caption.text for caption in world.captions(identity, shot[0], shot[1], picture)]))
"""


@pytest.mark.parametrize("instance", [0.0, 0.7])
def test_a_single_picture_made_alone_equals_the_exported_one(instance: float, tmp_path: Path) -> None:
    spec = _spec("cuhk_pedes", world=replace(WORLD, instance=instance), test_ids=3, ids=3)
    export(spec, tmp_path / "out")
    tree = json.loads((tmp_path / "out" / "world.json").read_text())
    entry = json.loads((tmp_path / "out" / "reid_raw.json").read_text())[-5]
    path = entry["file_path"]
    order = [tree["identities"][str(entry["id"])], tree["shots"][path], tree["parameters"]["world"]]
    command = [sys.executable, "-c", ONE_PICTURE, json.dumps(order)]
    made = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    assert made[0] == hashlib.sha256((tmp_path / "out" / "imgs" / path).read_bytes()).hexdigest()
    assert json.loads(made[1]) == entry["captions"]
