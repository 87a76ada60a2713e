"""Search in an index against comparing everything in float64; what is damaged is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from reid_dist.errors import UserError
from reid_dist.files import aside
from reid_dist.search import index as index_module
from reid_dist.search import lists
from reid_dist.search.change import delete
from reid_dist.search.entries import Filter
from reid_dist.search.index import PhotoIndex, unknown
from tests.search.vectors import clustered, described, exact, passing, write

FILTERS = [None, Filter(), Filter(person="person 3"), Filter("person 1", "camera 2"), Filter(person="nobody")]


@pytest.mark.parametrize(("count", "features"), [(1, 3), (2, 5), (257, 33)])
def test_the_best_are_those_of_comparing_everything(count: int, features: int, tmp_path: Path) -> None:
    vector_ND = clustered(count, features, people=9)
    index = write(tmp_path / "photos.index", vector_ND)
    queries = np.random.default_rng(1).standard_normal((5, features)).astype(np.float32) * 7
    queries[0] = vector_ND[min(10, count - 1)]
    for where in FILTERS:
        rows = passing(described(count), where)
        for query_D in queries:
            for k in (1, 10, 1000):
                hits = index.search(query_D, k, where)
                best, scores = exact(vector_ND, query_D, k, rows)
                # In fp32 the order of near equals may differ; what is at each rank scores as the best there does.
                np.testing.assert_allclose([hit.score for hit in hits], scores, atol=1e-6)
                true = [exact(vector_ND, query_D, 1, [hit.row])[1][0] for hit in hits]
                np.testing.assert_allclose(true, scores, atol=1e-6)
                assert len({hit.row for hit in hits}) == len(hits) and {hit.row for hit in hits} <= set(rows)
                assert all(hit.entry == index.entries[hit.row] for hit in hits)
                assert k > 1 or not best or hits[0].row == best[0]


@pytest.mark.parametrize("few", [0, 20_000])
def test_inverted_lists_find_what_comparing_everything_finds(
    few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "FLAT_LIMIT", 1000)
    monkeypatch.setattr(index_module, "_FEW", few)  # with 0, filters go through the lists too
    vector_ND = clustered(3000, 24, people=150)
    index = write(tmp_path / "photos.index", vector_ND)
    assert index.manifest["lists"]["centres"] == 256 and "lists.faiss" in index.manifest["files"]
    queries = vector_ND[::60].astype(np.float32) + 0.05 * np.random.default_rng(2).standard_normal((50, 24)).astype("f")
    for where in (None, Filter(camera="camera 1")):
        rows = passing(described(3000), where)
        found = right = 0
        for query_D in queries:
            hits = {hit.row for hit in index.search(query_D, 10, where)}
            best = set(exact(vector_ND, query_D, 10, rows)[0])
            assert hits <= set(rows)
            found, right = found + len(best), right + len(best & hits)
        assert right / found > 0.97, where


def test_a_query_that_no_model_gives_is_refused(tmp_path: Path) -> None:
    index = write(tmp_path / "photos.index", clustered(5, 4, people=2))
    for wrong in ([np.nan, 0, 0, 1], [np.inf, 0, 0, 0], [0, 0, 0, 0]):
        with pytest.raises(UserError, match="nan or inf"):
            index.search(np.array(wrong, dtype=np.float32), 3)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        index.search(np.ones(5, dtype=np.float32), 3)
    with pytest.raises(ValueError, match="above 0"):
        index.search(np.ones(4, dtype=np.float32), 0)


def test_an_empty_index_finds_nothing(tmp_path: Path) -> None:
    index = write(tmp_path / "photos.index", clustered(0, 4, people=2))
    assert index.search(np.ones(4, dtype=np.float32), 3) == [] == index.search(np.ones(4), 3, Filter(person="x"))


def test_every_flipped_bit_is_noticed_before_anything_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "FLAT_LIMIT", 100)
    folder = tmp_path / "photos.index"
    write(folder, clustered(600, 8, people=20))
    files = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
    assert len(files) == 5
    for path in files:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=rf"{path.name}: does not match its hash"):
            PhotoIndex.open(folder)
        path.unlink()
        with pytest.raises(UserError, match=rf"{path.name}: cannot be read"):
            PhotoIndex.open(folder)
        path.write_bytes(data)
    PhotoIndex.open(folder)


def test_a_manifest_that_lists_fewer_or_foreign_files_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "photos.index"
    write(folder, clustered(6, 4, people=2))
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    without = {name: digest for name, digest in good["files"].items() if name != "vectors.npy"}
    for change, message in (
        ({"files": without}, "lists other files"),
        ({"files": {**good["files"], "../secret": "0" * 64}}, "lists other files"),
        ({"format_version": 2}, "format_version 2; this program reads 1"),
        ({"model": None}, "damaged"),
        ({"model": {**good["model"], "features": 5}}, "not the vectors of this index"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=message):
            PhotoIndex.open(folder)
    for text in ("", "[]", "{", '"x"'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json: damaged"):
            PhotoIndex.open(folder)
    with pytest.raises(UserError, match="no index; make one"):
        PhotoIndex.open(tmp_path / "other")


def test_an_open_index_knows_when_it_is_out_of_date(tmp_path: Path) -> None:
    folder = tmp_path / "photos.index"
    index = write(folder, clustered(6, 4, people=2))
    assert index.current
    write(folder, clustered(5, 4, people=2))
    assert not index.current and PhotoIndex.open(folder).current
    os.rename(folder, tmp_path / "elsewhere")
    assert not index.current


@pytest.mark.parametrize("limit", [10, 1000])
@pytest.mark.parametrize("moment", ["read_manifest", "_check_files", "Entries"])
def test_an_index_that_changes_while_it_is_opened_is_opened_again(
    moment: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "FLAT_LIMIT", limit)
    monkeypatch.setattr(index_module, "_PAUSE", 0.0)
    folder, vector_ND, real = tmp_path / "photos.index", clustered(50, 4, people=2), getattr(index_module, moment)
    write(folder, vector_ND)

    def and_then_it_changes(*arguments: object) -> object:
        found = real(*arguments)
        monkeypatch.setattr(index_module, moment, real)
        delete(folder, Filter(person="person 1"))
        return found

    monkeypatch.setattr(index_module, moment, and_then_it_changes)
    index = PhotoIndex.open(folder)
    assert index.manifest["photographs"] == len(index.entries) == len(index.vectors_ND) == 43 and index.current
    # What is open stays what it is, the lists too.
    delete(folder, Filter(person="person 2"))
    assert {hit.row for hit in index.search(vector_ND[0].astype(np.float32), 43)} == set(range(43))
    assert not index.current


def test_between_the_two_renames_of_a_change_opening_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "photos.index"
    write(folder, clustered(6, 4, people=2))
    folder.rename(aside(folder))
    monkeypatch.setattr(index_module.time, "sleep", lambda _: aside(folder).rename(folder))
    assert len(PhotoIndex.open(folder).entries) == 6


def test_an_index_that_never_rests_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "photos.index"
    write(folder, clustered(6, 4, people=2))
    monkeypatch.setattr(index_module, "_PAUSE", 0.0)
    monkeypatch.setattr(PhotoIndex, "current", False)
    with pytest.raises(UserError, match="another process is changing it"):
        PhotoIndex.open(folder)


def test_unknown_is_below_the_threshold_and_none_without_one(tmp_path: Path) -> None:
    index = write(tmp_path / "photos.index", clustered(6, 4, people=2))
    hits = index.search(index.vectors_ND[0].astype(np.float32), 2)
    best = hits[0].score
    assert [unknown(hits, threshold) for threshold in (None, best, best + 1e-6)] == [None, False, True]
    assert unknown([], None) is None and unknown([], 0.5) is False


def test_thresholds_are_of_one_kind_and_weight(tmp_path: Path) -> None:
    index = write(tmp_path / "photos.index", clustered(6, 4, people=2))
    assert index.threshold("text") is None
    index.manifest["thresholds"] = {"text": {"score": 0.25, "weight": None}, "both": {"score": 0.5, "weight": 0.5}}
    assert index.threshold("text", 0.3) == 0.25 and index.threshold("image") is None
    assert index.threshold("both") == 0.5 and index.threshold("both", 0.3) is None
