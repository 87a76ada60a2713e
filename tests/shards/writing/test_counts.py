"""Found beside published counts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reid_dist.errors import UserError
from shards.raw import Counts, ImageFile, RawSample
from shards.writing.counts import count_table, make_card


def _converter(expected: dict[str, Counts]) -> Any:
    card = {"title": "Tiny", "licence": "none", "contains": ["market1501"]}
    return SimpleNamespace(CARD=card, EXPECTED={"a": expected, "b": {}}, part=lambda sample: sample.split)


def _samples() -> list[RawSample]:
    rows = [("1", 0, "train"), ("1", 1, "train"), ("2", -1, "train"), (None, 3, "val"), ("9", 4, "test")]
    image = ImageFile(Path("x"), 1)
    return [
        RawSample(image, pid, camera, split, "junk" if pid == "9" else "train", ("c",) * number, str(number))
        for number, (pid, camera, split) in enumerate(rows)
    ]


EXACT = {"train": Counts(2, 3, 3, 2), "val": Counts(1, 1, 3, 1), "test": Counts(0, 1, 4, 1)}


def test_equal_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = make_card("tiny", _converter(EXACT), "a", tmp_path, _samples(), False)
    assert card["matches_published"] is True and card["contains"] == ["market1501"] and card["variant"] == "a"
    assert card["counts"]["val"]["found"] == card["counts"]["val"]["published"]
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["identities", "images", "captions", "cameras", "(found", "/", "published)"]
    assert table[1].split() == ["train", "2", "/", "2", "3", "/", "3", "3", "/", "3", "2", "/", "2"]


@pytest.mark.parametrize("field", ["identities", "images", "captions", "cameras"])
def test_one_different_count_stops(field: str, tmp_path: Path) -> None:
    wrong = {**EXACT, "test": Counts(**{**EXACT["test"].__dict__, field: 7})}
    with pytest.raises(UserError, match="counts of test are not the published ones"):
        make_card("tiny", _converter(wrong), "a", tmp_path, _samples(), False)
    assert make_card("tiny", _converter(wrong), "a", tmp_path, _samples(), True)["matches_published"] is False
    unknown = {**EXACT, "test": Counts(**{**EXACT["test"].__dict__, field: None})}
    assert make_card("tiny", _converter(unknown), "a", tmp_path, _samples(), False)["matches_published"] is True


def test_missing_parts_and_unpublished_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="counts of query are not"):
        make_card("tiny", _converter({**EXACT, "query": Counts(1)}), "a", tmp_path, _samples(), False)
    for expected in ({}, {"train": Counts()}):
        assert make_card("tiny", _converter(expected), "a", tmp_path, _samples(), False)["matches_published"] is None
    assert make_card("tiny", _converter(EXACT), "b", tmp_path, _samples(), False)["matches_published"] is None
    with pytest.raises(UserError, match="no images found"):
        make_card("tiny", _converter(EXACT), "a", tmp_path, [], True)


def test_large_numbers_fit() -> None:
    counts = Counts(4_813_912, 407_332_084, 2_170_337_258, 1_000)
    lines = count_table({"a part with a long name": counts}, {"a part with a long name": counts}).splitlines()
    assert len(lines[0].split("   (")[0]) == len(lines[1]) and "407,332,084 / 407,332,084" in lines[1]
