"""Hash of a file, files that are whole or absent, and folders that take each other's name."""

import hashlib
import json
import math
from pathlib import Path

import pytest

from reid_dist import files
from reid_dist.files import aside, content_sha256, replace_folder, write_json, write_results


def test_the_hash_is_that_of_the_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 700_000)  # more than one block
    assert content_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def make(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_replacement_killed_anywhere_leaves_a_whole_folder(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before or between its renames, or not; and then tried once more."""
    folder, real, left = make(tmp_path / "folder", "old"), Path.rename, [renames]

    def rename(path: Path, target: Path) -> Path:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(path, target)

    partial = make(tmp_path / "partial", "new")
    if renames < 2:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", rename)
            replace_folder(partial, folder)
        assert ((folder if folder.exists() else aside(folder)) / "file").read_text() == "old"
    replace_folder(partial, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and (folder / "file").read_text() == "new"


def test_a_replacement_touches_nothing_of_others_beside_the_folder(tmp_path: Path) -> None:
    make(tmp_path / "folder.old", "mine")
    for text in ("first", "second"):
        replace_folder(make(tmp_path / "partial", text), tmp_path / "folder")
    assert (tmp_path / "folder.old" / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "folder.old"]


def test_results_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "run" / "results.json"
    write_results(path, {"stages": [{"name": "t2i", "t2i": {"R1": 42.5}, "i2i": None}]})
    assert json.loads(path.read_text())["stages"][0]["t2i"]["R1"] == 42.5
    for bad in (math.nan, object()):
        with pytest.raises((ValueError, TypeError)):
            write_results(path, {"stages": bad})
    assert json.loads(path.read_text())["stages"][0]["i2i"] is None
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def killed(path: Path) -> None:
    raise OSError("killed")


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})
    with monkeypatch.context() as broken:
        broken.setattr(files, "flush", killed)
        with pytest.raises(OSError, match="killed"):
            write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
