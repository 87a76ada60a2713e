"""Search in an index against comparing everything in float64; what is damaged is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from reid_dist.errors import UserError
from reid_dist.search import index as index_module
from reid_dist.search import lists
from reid_dist.search.entries import Filter
from reid_dist.search.index import PhotoIndex
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


def test_thresholds_are_of_one_kind_and_weight(tmp_path: Path) -> None:
    index = write(tmp_path / "photos.index", clustered(6, 4, people=2))
    assert index.threshold("text") is None
    index.manifest["thresholds"] = {"text": {"score": 0.25, "weight": None}, "both": {"score": 0.5, "weight": 0.5}}
    assert index.threshold("text", 0.3) == 0.25 and index.threshold("image") is None
    assert index.threshold("both") == 0.5 and index.threshold("both", 0.3) is None
