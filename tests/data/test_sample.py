"""The shard contract."""

import pytest
from pydantic import ValidationError

from reid_dist.data.sample import INDEX_DTYPE, KEY_PATTERN, ROLES, SPLITS, Manifest, Sample

VALID = {
    "dataset": "market1501",
    "pid": "market1501:0002",
    "camid": 0,
    "split": "train",
    "role": "train",
    "captions": ["a man"],
    "source": "bounding_box_train/0002_c1s1_000451_03.jpg",
    "width": 64,
    "height": 128,
    "sha256": "0" * 64,
}


def test_sample_survives_json() -> None:
    sample = Sample.model_validate(VALID)
    assert Sample.model_validate_json(sample.model_dump_json()) == sample
    assert sample.v == 1


@pytest.mark.parametrize(
    "change",
    [
        {"pid": "0002"},
        {"pid": "other:0002"},
        {"split": "dev"},
        {"role": "probe"},
        {"camid": -2},
        {"sha256": "x"},
        {"surprise": 1},
        {"dataset": "a b"},
        {"width": 0},
    ],
)
def test_sample_refuses(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Sample.model_validate({**VALID, **change})


def test_names_and_index_positions_are_fixed() -> None:
    # The index stores positions: another order would silently relabel every written set.
    assert SPLITS == ("train", "val", "test")
    assert ROLES == ("train", "query", "gallery", "distractor", "junk")
    assert INDEX_DTYPE.itemsize == 58


@pytest.mark.parametrize("key", ["", "a.b", "../x", "a/b", "x" * 101, "ä"])
def test_keys(key: str) -> None:
    assert KEY_PATTERN.fullmatch("Cam_a-01")
    assert not KEY_PATTERN.fullmatch(key)


@pytest.mark.parametrize("name", ["../x.tar", "/x.tar", "x.zip", "a/b.tar"])
def test_manifest_refuses_shard_names_outside_the_folder(name: str) -> None:
    shard = {"name": name, "sha256": "0" * 64, "bytes": 1, "samples": 1}
    with pytest.raises(ValidationError):
        Manifest.model_validate({"dataset": "x", "shards": [shard], "identities": [], "splits": {}})
