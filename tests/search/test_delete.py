"""Deleting: of what is deleted no byte stays, whatever was killed before."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError
from reid_dist.files import aside
from reid_dist.search import encoding, lists, store
from reid_dist.search.change import add, delete
from reid_dist.search.entries import Entry, Filter
from reid_dist.search.index import PhotoIndex
from reid_dist.search.sources import list_source
from reid_dist.trained import TrainedModel
from tests.search.conftest import LOCK, around, contents, write_shards
from tests.search.vectors import clustered, described, write


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH", 3)
    monkeypatch.setattr(encoding, "CHUNK", 6)


@pytest.fixture(params=["flat", "lists"])
def many(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PhotoIndex:
    if request.param == "lists":
        monkeypatch.setattr(lists, "FLAT_LIMIT", 400)
    vector_ND = clustered(900, 32, people=60)
    entries = described(900)
    entries[77] = Entry("/photos/secret-file.jpg", "secret-version", "secret-person", "secret-camera", "1987-06-05")
    (tmp_path / "at").mkdir()
    return write(tmp_path / "at" / "photos.index", vector_ND, entries)


@pytest.mark.parametrize(
    ("where", "files"),
    [
        (Filter(person="secret-person"), []),
        (Filter(camera="secret-camera"), []),
        (Filter(since="1987", until="1987-06"), []),
        (Filter(), ["/photos/secret-file.jpg"]),
    ],
)
def test_of_what_is_deleted_no_byte_stays(where: Filter, files: list[str], many: PhotoIndex) -> None:
    folder, half_D = many.folder, np.array(many.vectors_ND[77])
    full_D = half_D.astype(np.float32)
    secrets = [half_D.tobytes(), full_D.tobytes(), half_D.tobytes()[:12], full_D.tobytes()[:12], b"secret", b"1987"]
    # What a killed indexing and a killed deletion left holds it too.
    store.work_folder(folder).mkdir()
    (store.work_folder(folder) / "chunk.npz").write_bytes(half_D.tobytes())
    shutil.copytree(folder, aside(folder))
    shutil.copytree(folder, store._partial(folder))
    assert all(any(secret in data for data in around(folder).values()) for secret in (secrets[0], b"secret"))
    gone = delete(folder, where, files)
    assert [entry.person for entry in gone] == ["secret-person"]
    left = around(folder)
    assert not [(name, secret) for name, data in left.items() for secret in secrets if secret in data]
    index = PhotoIndex.open(folder)
    assert len(index.entries) == 899 and all("secret" not in entry.file for entry in index.entries)
    # Not only no byte: the files are those of an index that never held it. So no code of it is left, which does not lie
    # byte by byte in the lists, and no centre that it drew to itself.
    never = write(folder.parent / "never.index", np.delete(many.vectors_ND, 77, axis=0), list(index.entries))
    assert contents(never.folder) == contents(folder)


def test_deleting_is_by_all_conditions_and_what_matches_nothing_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "photos.index"
    write(folder, clustered(30, 4, people=3))
    before = contents(folder)
    for where, files in ((Filter(person="person 99"), []), (Filter(camera="camera 0"), ["/photos/1.jpg"])):
        with pytest.raises(UserError, match="nothing deleted, no photograph is what was said"):
            delete(folder, where, files)
    with pytest.raises(UserError, match="says not what"):
        delete(folder, Filter())
    assert len(delete(folder, Filter(person="person 1"), dry=True)) == 5 and contents(folder) == before
    assert {entry.file for entry in delete(folder, Filter("person 1", "camera 1"))} == {
        "/photos/1.jpg",
        "/photos/22.jpg",
    }
    assert len(delete(folder, Filter(), missing=True)) == 28  # no such file is anywhere
    assert PhotoIndex.open(folder).search(np.ones(4), 3) == []


def test_killed_between_the_two_renames_the_former_index_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "photos.index"
    write(folder, clustered(30, 4, people=3))
    before = contents(folder)
    folder.rename(aside(folder))
    shutil.copytree(aside(folder), store._partial(folder))
    with pytest.raises(UserError, match=r"no index.*was killed, rename .*\.photos\.index\.reid_dist-old back"):
        PhotoIndex.open(folder)
    with store.changing(folder):
        assert contents(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "photos.index"]


def test_what_cannot_be_removed_is_an_error_and_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "photos.index"
    write(folder, clustered(30, 4, people=3))
    real = shutil.rmtree

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if ignore_errors:
            return
        if path == aside(folder):
            raise PermissionError(f"{path}: not permitted")
        real(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(PermissionError, match="-old: not permitted"):
        delete(folder, Filter(person="person 1"))
    monkeypatch.undo()
    with store.changing(folder):
        assert not aside(folder).exists()


@pytest.mark.parametrize("indexed", [True, False])
def test_what_an_unfinished_indexing_encoded_is_deleted_whatever_matches(
    indexed: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos.index"
    if indexed:
        write(folder, clustered(30, 4, people=3))
    work = store.work_folder(folder)
    work.mkdir()
    (work / "chunk.npz").write_bytes(b"secret")
    message = "nothing deleted" if indexed else "no index; make one"
    for dry in (True, False):
        with pytest.raises(UserError, match=message):
            delete(folder, Filter(), ["/photos/secret.jpg"], dry=dry)
        assert work.exists() == dry
        assert f"had encoded {'would be' if dry else 'was'} removed" in capfd.readouterr().err
    assert not [name for name, data in around(folder).items() if b"secret" in data]


def test_photographs_that_left_their_shard_set_are_missing(search_model: TrainedModel, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", people=2, shots=3, captions=[])
    folder = tmp_path / "photos.index"
    add([search_model], list_source(str(shards)), folder)
    with pytest.raises(UserError, match="nothing deleted"):
        delete(folder, Filter(), missing=True)
    fewer = write_shards(tmp_path / "fewer", people=1, shots=3, captions=[])
    for file in fewer.iterdir():
        (shards / file.name).write_bytes(file.read_bytes())
    assert len(ShardSet(shards)) == 3
    gone = delete(folder, Filter(), missing=True)
    assert [entry.person for entry in gone] == ["toy:101"] * 3 and len(PhotoIndex.open(folder).entries) == 3
    (shards / "index.npy").unlink()
    with pytest.raises(UserError, match=r"index\.npy: missing"):  # damaged is not gone
        delete(folder, Filter(), missing=True)
    (shards / "manifest.json").unlink()
    assert len(delete(folder, Filter(), missing=True)) == 3
