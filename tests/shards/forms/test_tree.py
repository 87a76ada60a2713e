"""Which files of a folder are images."""

from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards.forms.tree import images_below, images_in, is_image


@pytest.mark.parametrize("name", ["a.jpg", "A.JPEG", "b.png", "c.webp", "0001.jpg.jpg", "a b.Png"])
def test_images(name: str) -> None:
    assert is_image(name)


@pytest.mark.parametrize("name", ["Thumbs.db", "._a.jpg", ".jpg", ".hidden.png", "a.jpg.part", "a.bmp", "jpg", ""])
def test_other_files(name: str) -> None:
    assert not is_image(name)


def test_sorted_and_bounded_to_the_folder(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> None:
    for name in ["b.jpg", "B.jpg", "a.png", "10.jpg", "9.jpg", "sub/0.jpg", ".git/x.jpg", "folder.jpg/y.jpg"]:
        draw_at(tmp_path / name, 1)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert [path.name for path in images_in(tmp_path, "")] == ["10.jpg", "9.jpg", "B.jpg", "a.png", "b.jpg"]
    below = [path.relative_to(tmp_path).as_posix() for path in images_below(tmp_path, "")]
    assert below == ["10.jpg", "9.jpg", "B.jpg", "a.png", "b.jpg", "folder.jpg/y.jpg", "sub/0.jpg"]


@pytest.mark.parametrize("listing", [images_in, images_below])
def test_nothing_there(tmp_path: Path, listing: Callable[[Path, str], list[Path]]) -> None:
    with pytest.raises(UserError, match="none: missing; look elsewhere"):
        listing(tmp_path / "none", "look elsewhere")
    with pytest.raises(UserError, match="holds no images"):
        listing(tmp_path, "look elsewhere")
