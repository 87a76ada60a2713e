"""Coverage of one tree's words by another's, counted by hand and on scenes without people."""

import json
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards.world.vocabulary import coverage_of, tree_words, words_of


def _pairs(root: Path, *texts: str) -> Path:
    (root / "00000").mkdir(parents=True)
    for number, text in enumerate(texts):
        (root / "00000" / f"{number:09d}.txt").write_text(text, encoding="utf-8")
    return root


def _cuhk(root: Path, *texts: str) -> Path:
    root.mkdir()
    (root / "reid_raw.json").write_text(json.dumps([{"captions": list(texts)}]))
    return root


def test_words() -> None:
    assert words_of("A red T-shirt, and a man's hat.") == ["a", "red", "t-shirt", "and", "a", "man", "s", "hat"]


def test_coverage_by_hand(tmp_path: Path) -> None:
    corpus = _pairs(tmp_path / "a", "a red hat.", "a red car")
    found = coverage_of(corpus, _cuhk(tmp_path / "b", "A hat and a scarf", "a red hat and"))
    assert (found.words, found.occurrences) == (5, 9)
    assert found.missing == {"and": 2, "scarf": 1}
    assert found.word_share == pytest.approx(60) and found.occurrence_share == pytest.approx(100 * 6 / 9)
    assert found.rarest == ("hat", 1)


def test_nothing_shared(tmp_path: Path) -> None:
    found = coverage_of(_pairs(tmp_path / "a", "boat"), _cuhk(tmp_path / "b", "hat"))
    assert found.word_share == 0 and found.rarest == ("", 0)


def test_trees_without_captions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no captions"):
        tree_words(tmp_path)
    texts = _pairs(tmp_path / "a", " ...")
    with pytest.raises(UserError, match="holds no captions"):
        tree_words(texts)
    next(texts.rglob("*.txt")).write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"\.txt: not UTF-8 text"):
        tree_words(texts)
    (tmp_path / "reid_raw.json").write_text("[{}]")
    with pytest.raises(UserError, match=r"reid_raw\.json: cannot be read"):
        tree_words(tmp_path)
