"""Paths and keys from outside."""

from pathlib import Path

import pytest

from reid_dist.data.sample import KEY_PATTERN
from reid_dist.errors import UserError
from shards.raw import inside, sample_key


@pytest.mark.parametrize("name", ["a.jpg", "cam_a/001 .jpg", "a/./b.jpg", "ä/b..jpg"])
def test_paths_inside(name: str) -> None:
    assert inside(Path("/raw"), name, "x").is_relative_to("/raw")


@pytest.mark.parametrize(
    "name", ["", ".", "/etc/passwd", "../x.jpg", "a/../../x.jpg", "a/..", "a\\..\\x", "a\0.jpg", "a\n.jpg"]
)
def test_paths_outside(name: str) -> None:
    with pytest.raises(UserError, match=r"json: entry 3: .* is not a path inside /raw") as caught:
        inside(Path("/raw"), name, "json: entry 3")
    assert "\n" not in str(caught.value)


def test_keys_are_valid_and_distinct() -> None:
    taken: set[str] = set()
    sources = [
        "imgs/cam_a/001.jpg",
        "imgs/cam.a/001.jpg",
        "x/" + "y" * 200 + ".jpg",
        "ä.jpg.jpg",
        "../../etc.jpg",
    ]
    keys = [sample_key(source, taken) for source in sources]
    assert keys[0] == "imgs_cam_a_001" and keys[1].startswith("imgs_cam_a_001-")
    assert len(set(keys)) == len(keys) == len(taken)
    assert all(KEY_PATTERN.fullmatch(key) and len(key) <= 95 for key in keys)
    with pytest.raises(UserError, match="named twice"):
        sample_key(sources[1], taken)
