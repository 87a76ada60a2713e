"""Inverted lists: the same bytes for the same vectors, extended or anew; a full disk is an OSError."""

from pathlib import Path

import numpy as np
import pytest

from reid_dist.errors import UserError
from reid_dist.search import lists
from reid_dist.search.lists import build_lists, extend_lists, may_extend, read_lists
from tests.search.vectors import clustered


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "FLAT_LIMIT", 500)
    monkeypatch.setattr(lists, "_BLOCK", 300)


def test_a_small_gallery_has_none(tmp_path: Path) -> None:
    assert build_lists(clustered(500, 8, people=9), tmp_path / "lists") == {} and not list(tmp_path.iterdir())


def test_the_same_vectors_give_the_same_bytes(tmp_path: Path) -> None:
    vector_ND = clustered(1101, 12, people=30)
    settings = [build_lists(vector_ND, tmp_path / name) for name in "ab"]
    assert settings[0] == settings[1] and settings[0]["trained_on"] == 1101
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    vector_ND[0] = -vector_ND[0]
    build_lists(vector_ND, tmp_path / "c")
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_added_vectors_are_found_beside_the_former(tmp_path: Path) -> None:
    vector_ND = clustered(1000, 12, people=30)
    settings = build_lists(vector_ND[:700], tmp_path / "former")
    assert may_extend(settings, 1000) and not may_extend(settings, 1401) and not may_extend(None, 10)
    assert extend_lists(vector_ND, settings, tmp_path / "former", tmp_path / "all") == settings
    opened = read_lists(tmp_path / "all", settings)
    for row in (0, 699, 700, 999):
        assert row in opened.candidates(vector_ND[row].astype(np.float32), 5, None)
        others = np.setdiff1d(np.arange(1000), [row])
        assert row not in opened.candidates(vector_ND[row].astype(np.float32), 5, others)


def test_as_many_candidates_as_were_asked_for_come_back(tmp_path: Path) -> None:
    """Though the lists that are read at first hold fewer; and with a filter all that pass, where they are fewer."""
    vector_ND = clustered(2000, 12, people=200)
    opened = read_lists(tmp_path / "lists", build_lists(vector_ND, tmp_path / "lists"))
    some = np.arange(0, 2000, 3)
    for query_D in vector_ND[:3].astype(np.float32):
        for k in (1, 1000, 1990, 2000, 5000):
            found = opened.candidates(query_D, k, None)
            assert min(k, 2000) <= len(found) == len(set(found.tolist()))
            found = opened.candidates(query_D, k, some)
            assert min(k, len(some)) <= len(found) and set(found.tolist()) <= set(some.tolist())


def test_a_full_disk_is_an_oserror() -> None:
    with pytest.raises(OSError, match="/dev/full: cannot be written"):
        build_lists(clustered(600, 8, people=9), Path("/dev/full"))


@pytest.mark.parametrize("features", [1, 7, 10])
def test_any_number_of_features_has_codes(features: int, tmp_path: Path) -> None:
    vector_ND = clustered(600, features, people=30)
    settings = build_lists(vector_ND, tmp_path / "lists")
    assert 5 in read_lists(tmp_path / "lists", settings).candidates(vector_ND[5].astype(np.float32), 3, None)


def test_the_extra_is_named_where_faiss_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(UserError, match=r"needs faiss; install the extra: pip install -e '\.\[search\]'"):
        lists.faiss_module()
