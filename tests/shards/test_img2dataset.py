"""Image-text pairs in img2dataset's file layout."""

from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards import img2dataset


def test_samples(pairs: Path) -> None:
    samples = list(img2dataset.samples(pairs))
    assert [(sample.source, sample.captions) for sample in samples] == [
        ("00000/000000000.jpg", ("scene 0",)),
        ("00000/000000002.jpg", ("scene 1",)),  # from the .json
        ("00001/000010000.jpg", ("scene 2",)),
    ]
    assert {(sample.pid, sample.split, sample.role, sample.camid) for sample in samples} == {
        (None, "train", "train", -1)
    }


def test_missing_caption(pairs: Path) -> None:
    (pairs / "00000/000000000.txt").write_text("  \n")
    (pairs / "00000/000000000.json").unlink()
    with pytest.raises(UserError, match=r"000000000\.jpg: no caption"):
        list(img2dataset.samples(pairs))


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".json", b"{", "not JSON of img2dataset"),
        (".json", b'{"caption": 5}', "not JSON of img2dataset"),
        (".json", b'{"x": "' + bytes(70_000) + b'"}', "more than 65536 bytes"),
        (".txt", b"\xff\xfe", "not UTF-8"),
        (".txt", b"a" * 70_000, "more than 65536 bytes"),
    ],
)
def test_hostile_neighbours(pairs: Path, suffix: str, content: bytes, message: str) -> None:
    (pairs / f"00000/000000000{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(img2dataset.samples(pairs))


def test_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        list(img2dataset.samples(tmp_path / "none"))
    with pytest.raises(UserError, match="holds no images"):
        list(img2dataset.samples(tmp_path))
