"""Queries of a sentence, a picture or both; thresholds; what the commands print and write."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launch.search import COMMANDS, main
from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError
from reid_dist.report.sheet import THUMB_H, THUMB_W
from reid_dist.search.calibrate import calibrate
from reid_dist.search.change import add
from reid_dist.search.index import PhotoIndex
from reid_dist.search.query import combine, kind_of, load_model
from reid_dist.search.show import hit_table
from reid_dist.search.sources import list_source
from reid_dist.trained import TrainedModel
from tests.search.conftest import make_export, picture, write_photos, write_shards

TEXT = "a person in a red coat"


@pytest.fixture(scope="module", name="folder")
def _folder(search_model: TrainedModel, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("query") / "photos.index"
    add([search_model], list_source(str(photos)), folder)
    return folder


def test_a_query_is_the_weighted_sum_of_sentence_and_picture(search_model: TrainedModel, photos: Path) -> None:
    text_D = search_model.encode_text(TEXT)[0]
    image_D = search_model.encode_image(photos / "p1" / "1.png")[0]
    file = photos / "p1" / "1.png"
    for weight in (0.0, 0.3, 0.5, 1.0):
        expected = torch.nn.functional.normalize(weight * text_D + (1 - weight) * image_D, dim=0).numpy()
        np.testing.assert_allclose(combine(search_model, TEXT, file, weight), expected, atol=1e-5)
    np.testing.assert_allclose(combine(search_model, TEXT, weight=0.1), text_D, atol=1e-6)
    np.testing.assert_allclose(combine(search_model, image=Image.open(file), weight=0.9), image_D, atol=1e-6)
    assert [kind_of(TEXT, file), kind_of(TEXT, None), kind_of(None, file)] == ["both", "text", "image"]
    assert combine(search_model, "red " * 1000).shape == (16,)


def test_empty_queries_and_wrong_weights_are_refused(search_model: TrainedModel) -> None:
    for text in (None, "", "  \n"):
        with pytest.raises(UserError, match="empty"):
            combine(search_model, text)
    with pytest.raises(UserError, match=r"weight 1\.5: must be from 0"):
        combine(search_model, TEXT, weight=1.5)


def test_another_model_than_the_index_s_is_refused(folder: Path, search_run: Path, tmp_path: Path) -> None:
    index = PhotoIndex.open(folder)
    assert load_model(index).digest == index.digest == load_model(index, search_run).digest
    with pytest.raises(UserError, match=r"not the model that .* was made with"):
        load_model(index, make_export(tmp_path / "other", seed=1))


def test_a_threshold_keeps_the_share_that_was_asked_for(
    folder: Path, search_model: TrainedModel, tmp_path: Path
) -> None:
    shards = ShardSet(write_shards(tmp_path / "val", people=20, shots=2, captions=[TEXT]))
    for false_accept in (0.05, 0.25):
        found = calibrate(folder, search_model, shards, "val", false_accept)
        assert set(found) == {"image", "text", "both"}
        index = PhotoIndex.open(folder)
        pictures = search_model.encode_image([picture(100 + row // 2, row) for row in range(40)]).numpy()
        best = np.array([index.search(query_D, 1)[0].score for query_D in pictures])
        threshold = index.threshold("image")
        assert threshold is not None
        # As many reach it as were asked for, and one more would be too many.
        assert (best >= threshold).mean() == found["image"].false_accept <= false_accept
        assert (best >= threshold - 2e-7).mean() >= false_accept - 1 / 40
        scores = pictures @ pictures.T
        known = np.mean([scores[row, row ^ 1] >= threshold for row in range(40)])
        assert found["image"].known_found == pytest.approx(known) and found["image"].photographs == 20
    assert index.threshold("both", 0.5) is not None and index.threshold("both", 0.4) is None


def test_a_validation_set_must_be_large_enough_and_of_other_people(
    folder: Path, search_model: TrainedModel, tmp_path: Path
) -> None:
    before = (folder / "manifest.json").read_bytes()
    shards = ShardSet(write_shards(tmp_path / "val", people=10, shots=2, captions=[]))
    with pytest.raises(UserError, match=r"too few for --false-accept 0\.01"):
        calibrate(folder, search_model, shards, "val", 0.01)
    with pytest.raises(UserError, match="must be above 0 and below 1"):
        calibrate(folder, search_model, shards, "val", 0.0)
    own = tmp_path / "own.index"
    add([search_model], list_source(str(tmp_path / "val")), own)
    with pytest.raises(UserError, match="10 of its people are in the index too"):
        calibrate(own, search_model, shards, "val", 0.1)
    assert set(calibrate(folder, search_model, shards, "val", 0.1)) == {"image"}  # no captions
    # 100 pictures suffice for one in a hundred, 40 sentences do not.
    told = ShardSet(write_shards(tmp_path / "told", people=50, shots=2, captions=[TEXT], told=40))
    for false_accept, kinds in ((0.01, {"image"}), (0.03, {"image", "text", "both"})):
        found = calibrate(folder, search_model, told, "val", false_accept)
        assert set(found) == kinds and all(each.queries * false_accept >= 1 for each in found.values())
    (folder / "manifest.json").write_bytes(before)


def test_the_commands_from_indexing_to_deleting(
    search_run: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    index, out, sheet = str(tmp_path / "photos.index"), tmp_path / "hits.json", tmp_path / "hits.png"
    assert main(["index", str(search_run), str(photos), "--out", index]) == 0
    assert "20 photographs: 20 encoded" in capfd.readouterr().out
    shards = write_shards(tmp_path / "val", people=20, shots=2, captions=[TEXT])
    assert main(["calibrate", index, str(shards), "--false-accept", "0.05"]) == 0
    assert capfd.readouterr().out.count("known people found") == 3
    query = ["query", index, "--image", str(photos / "p2" / "3.png")]
    assert main([*query, "--top", "3", "--json", str(out), "--sheet", str(sheet), "--camera", "camera-1"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].split()[1:4] == ["1.000", "person-2", "camera-1"]
    found = json.loads(out.read_text())
    assert [hit["camera"] for hit in found["hits"]] == ["camera-1"] * 3 and found["unknown"] is False
    assert found["query"]["since"] is None and found["hits"][0]["file"] == str(photos / "p2" / "3.png")
    with Image.open(sheet) as drawn:
        assert drawn.width > 400
    assert main([*query, "--text", TEXT, "--weight", "0.2", "--json", "-", "--person", "nobody"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["hits"] == [] and printed["threshold"] is None
    assert main(["delete", index, "--person", "person-2", "--dry-run"]) == 0
    assert main(["delete", index, "--person", "person-2"]) == 0
    assert "4 photographs deleted. The image files are where they were" in capfd.readouterr().out
    assert len(PhotoIndex.open(index).entries) == 16


def test_a_photograph_that_is_gone_is_a_grey_tile(
    search_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    photos, index = write_photos(tmp_path / "album", people=2, shots=2), str(tmp_path / "photos.index")
    assert main(["index", str(search_run), str(photos), "--out", index]) == 0
    (photos / "p0" / "1.png").unlink()
    (photos / "p1" / "0.png").write_bytes(b"no image")
    out, sheet = tmp_path / "hits.json", tmp_path / "hits.png"
    query = ["query", index, "--image", str(photos / "p0" / "0.png"), "--json", str(out), "--sheet", str(sheet)]
    capfd.readouterr()
    assert main(query) == 0
    notes = capfd.readouterr().err.splitlines()
    assert len(json.loads(out.read_text())["hits"]) == 4 and sum(line.startswith("note: ") for line in notes) == 2
    with Image.open(sheet) as drawn:
        grey = (np.asarray(drawn.convert("RGB")) == 160).all(axis=2).sum() / (THUMB_W * THUMB_H)
    assert 2 <= grey < 2.1


def test_one_kind_of_features_is_told(search_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    photos, dual = write_photos(tmp_path / "album", people=1, shots=2), make_export(tmp_path / "dual", dual_token=True)
    for run, told in ((search_run, 0), (dual, 1)):
        assert main(["index", str(run), str(photos), "--out", str(tmp_path / f"{told}.index")]) == 0
        assert capfd.readouterr().err.count("an index holds those for sentences only") == told


@pytest.mark.parametrize(("command", "says"), [("index", "goes on"), ("delete", "left to delete"), ("query", "")])
def test_an_interruption_says_what_became_of_the_index(
    command: str, says: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, command, (lambda _: None, interrupt))
    assert main([command]) == 130
    error = capfd.readouterr().err
    assert error.startswith("error: interrupted") and says in error and ("goes on" in error) == (command == "index")


def test_wrong_input_is_one_line_and_exit_code_2(
    folder: Path, photos: Path, search_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for command, message in (
        (["query", str(folder)], "query: empty"),
        (["query", str(folder), "--text", " "], "sentence is empty"),
        (["query", str(folder), "--text", TEXT, "--top", "0"], "--top 0"),
        (["query", str(folder), "--text", TEXT, "--since", "soon"], 'date "soon"'),
        (["query", str(folder), "--image", str(tmp_path / "none.png")], "cannot be read"),
        (["query", str(tmp_path / "none"), "--text", TEXT], "no index"),
        (["delete", str(folder)], "says not what"),
        (["delete", str(tmp_path / "none"), "--person", "nobody"], "no index"),
        (["delete", str(folder), "--person", "nobody"], "nothing deleted"),
        (["index", str(search_run), str(tmp_path / "empty"), "--out", str(tmp_path / "i")], "holds no image"),
        (["index", str(tmp_path), str(photos), "--out", str(tmp_path / "i")], "no exported model"),
        (["index", str(search_run), str(photos), "--out", str(tmp_path / "i"), "--max-bad-fraction", "2"], "fraction"),
        (["index", str(search_run), str(photos), "--out", str(tmp_path / "i"), "--device", "abacus"], "--device"),
    ):
        assert main(command) == 2, command
        error = capfd.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_names_that_steer_a_terminal_are_shown_and_not_sent(folder: Path) -> None:
    index = PhotoIndex.open(folder)
    hit = index.search(np.ones(16), 1)[0]
    steering = type(hit)(type(hit.entry)("/a\x1b[2J.jpg", "1", "An\nn"), 0.5, 0)
    table = hit_table([steering], threshold=0.75)
    assert "\x1b" not in table and "\\x1b[2J" in table and len(table.splitlines()) == 3
    assert table.splitlines()[-1] == "unknown: the best score 0.500 is below the threshold 0.750"
    assert hit_table([], 0.5) == "no photograph passes the filter"
