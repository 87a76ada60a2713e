"""The folder of an export: whole or not there, and nothing of anyone else's is lost."""

import json
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from reid_dist.export.folder import MARKER, check_target, listed_files, new_folder
from reid_dist.files import content_sha256


def write(target: Path, content: str = "weights") -> None:
    check_target(target, target.with_name("source"))
    with new_folder(target, {"format": "test"}) as folder:
        (folder / "weights").write_text(content)


def test_the_list_names_every_file_with_its_hash(tmp_path: Path) -> None:
    write(tmp_path / "new" / "out")
    out = tmp_path / "new" / "out"
    told = json.loads((out / MARKER).read_text())
    assert told["format"] == "test" and {path.name for path in out.iterdir()} == {"weights", MARKER}
    assert told["files"] == {"weights": content_sha256(out / "weights")} == listed_files(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_earlier_export_and_an_empty_folder_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    (tmp_path / ".out.partial").mkdir()  # of an export that was killed
    (tmp_path / ".out.partial" / "rest").write_text("")
    write(tmp_path / "out", "other")
    assert (tmp_path / "out" / "weights").read_text() == "other"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"weights", MARKER}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_fails_leaves_the_earlier_export_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", {}) as folder:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "weights").read_text() == "weights"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["photo.jpg", "folder"])
def test_foreign_files_are_never_replaced(name: str, tmp_path: Path) -> None:
    write(tmp_path / "out")
    path = tmp_path / "out" / name
    path.mkdir() if name == "folder" else path.write_bytes(b"mine")
    with pytest.raises(UserError, match=rf"--out .*: holds {name}, which is no export of ours; name another folder"):
        write(tmp_path / "out", "other")
    (tmp_path / "out" / MARKER).write_text("{damaged")
    with pytest.raises(UserError, match="which is no export of ours"):
        write(tmp_path / "out", "other")
    assert path.exists() and (tmp_path / "out" / "weights").read_text() == "weights"


def test_places_that_cannot_be_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "run" / "t2i" / "export"
    source.mkdir(parents=True)
    for target in (source, tmp_path / "run", tmp_path / "run" / "t2i" / ".." / "t2i" / "export"):
        with pytest.raises(UserError, match="holds the model that is to be exported"):
            check_target(target, source)
    check_target(tmp_path / "run" / "onnx", source)
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(UserError, match="file is a file; name a folder"):
            check_target(target, source)
