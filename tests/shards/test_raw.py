"""Paths, keys and images from outside."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest

from reid_dist.data.sample import KEY_PATTERN
from reid_dist.errors import UserError
from shards.raw import ImageFile, TarImage, image_file, inside, sample_key


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


def test_image_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"12345")
    image = pickle.loads(pickle.dumps(image_file(path, "list.json: entry 3")))
    assert image == ImageFile(path, 5) and image.read() == b"12345" and (image.name, image.group) == (str(path), "")
    path.unlink()  # between plan and reading
    with pytest.raises(UserError, match=r"a\.jpg: cannot be read \(No such file.*\); restore the file"):
        image.read()


def test_image_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dead.jpg").symlink_to(tmp_path / "none")
    for name in ("pipe.jpg", "folder.jpg", "dead.jpg", "none.jpg"):
        with pytest.raises(UserError, match=rf"list\.json: entry 3: .*{name} does not exist; unpack"):
            image_file(tmp_path / name, "list.json: entry 3")


def test_large_files_are_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.touch()
    os.truncate(path, 30_000_000_000)
    assert len(image_file(path).read()) == 20_000_001
    assert len(TarImage(path, "b.jpg", 512, 29_000_000_000).read()) == 20_000_001


def test_images_in_tars(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("b.jpg")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"12345"))
    image = TarImage(path, "b.jpg", 512, 5)
    assert image.read() == b"12345" and image.name == f"{path}: b.jpg"
    os.truncate(path, 515)
    with pytest.raises(UserError, match=r"a\.tar: b\.jpg: the tar ends inside it; get the file again"):
        image.read()
    path.unlink()
    with pytest.raises(UserError, match=r"a\.tar: cannot be read"):
        image.read()
