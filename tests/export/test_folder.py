"""The folder of an export: whole or not there, and nothing of anyone else's is lost."""

import fcntl
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from reid_dist.errors import UserError
from reid_dist.export.folder import MARKER, check_target, listed_files, new_folder
from reid_dist.files import aside, beside, content_sha256


def write(target: Path, content: str = "weights") -> None:
    with new_folder(target, target.with_name("source"), {"format": "test"}) as folder:
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
    beside(tmp_path / "out", "partial").mkdir()  # of an export that was killed
    (beside(tmp_path / "out", "partial") / "rest").write_text("")
    beside(tmp_path / "out", "lock").write_text("")
    write(tmp_path / "out", "other")
    assert (tmp_path / "out" / "weights").read_text() == "other"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"weights", MARKER}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_fails_leaves_the_earlier_export_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", tmp_path / "source", {}) as folder:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "weights").read_text() == "weights"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_scores_recorded_of_an_export_stay(tmp_path: Path) -> None:
    write(tmp_path / "out")
    record = tmp_path / "out" / "evaluation" / "market.test.t2i.cosine.json"
    record.parent.mkdir()
    record.write_text("scores")
    write(tmp_path / "out", "other")
    assert record.read_text() == "scores" and (tmp_path / "out" / "weights").read_text() == "other"
    assert listed_files(tmp_path / "out").keys() == {"weights"}
    with new_folder(tmp_path / "out", tmp_path / "source", {}) as folder:
        (folder / "weights").write_text("")
        record.with_name("later").write_text("recorded while the export was written")
    assert record.exists() and record.with_name("later").exists()
    (tmp_path / "out").rename(aside(tmp_path / "out"))  # killed between two renames
    write(tmp_path / "out")
    assert record.read_text() == "scores" and [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out" / MARKER).unlink()
    with pytest.raises(UserError, match="holds evaluation, which is no export of ours"):
        write(tmp_path / "out")


def _hold(target: Path, entered: Any, go_on: Any) -> None:
    with new_folder(target, target.with_name("source"), {}) as folder:
        (folder / "weights").write_text("of the first")
        entered.set()
        go_on.wait(10)


def test_two_exports_to_one_folder_do_not_meet(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("fork")
    entered, go_on = processes.Event(), processes.Event()
    first = processes.Process(target=_hold, args=(tmp_path / "out", entered, go_on))
    first.start()
    assert entered.wait(10)
    with pytest.raises(UserError, match="another export is being written there; wait until it has ended"):
        write(tmp_path / "out", "of the second")
    write(tmp_path / "other")
    go_on.set()
    first.join(10)
    assert first.exitcode == 0 and (tmp_path / "out" / "weights").read_text() == "of the first"
    write(tmp_path / "out", "of the second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_lock_whose_owner_has_just_ended_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before its owner removed it: a third process may hold a new one of this name."""
    real, lock = fcntl.flock, beside(tmp_path / "out", "lock")
    for after in (lock.unlink, lambda: (lock.unlink(), lock.write_text(""))):
        monkeypatch.setattr(fcntl, "flock", lambda *given, after=after: (real(*given), after()))
        with pytest.raises(UserError, match="another export is being written there"):
            write(tmp_path / "out")
    assert not (tmp_path / "out").exists() and lock.exists()


def test_what_somebody_puts_there_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(UserError, match="holds mine"), new_folder(tmp_path / "out", tmp_path / "source", {}):
        (tmp_path / "out" / "mine").write_text("")
    assert (tmp_path / "out" / "mine").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


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
    (tmp_path / "endless.file").symlink_to(tmp_path / "endless.file")
    for target in (tmp_path / "file", tmp_path / "file" / "below" / "it", tmp_path / "endless.file"):
        with pytest.raises(UserError, match="file is a file; name a folder"):
            check_target(target, source)
