"""Indexing: what is new, what changed, and what interruptions leave."""

import fcntl
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reid_dist.errors import UserError
from reid_dist.search import change, encoding, lists, store
from reid_dist.search.change import add, delete
from reid_dist.search.encoding import read_chunk
from reid_dist.search.entries import Entry, Filter
from reid_dist.search.index import PhotoIndex
from reid_dist.search.sources import list_source
from reid_dist.trained import TrainedModel, load
from tests.search.conftest import LOCK, around, contents, make_export, picture, write_photos
from tests.search.vectors import clustered, write


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH", 3)
    monkeypatch.setattr(encoding, "CHUNK", 6)


def in_child(work: Callable[[], object]) -> int:
    """The wait status of a forked process that runs it: 3 is an OSError."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except OSError:
            os._exit(3)
        except BaseException:
            os._exit(4)
    return os.waitpid(child, 0)[1]


def test_an_index_holds_every_photograph_with_what_is_known_of_it(
    search_model: TrainedModel, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "photos.index"
    added = add([search_model], list_source(str(photos)), folder)
    assert (added.new, added.kept, added.bad) == (20, 0, 0)
    index = PhotoIndex.open(folder)
    assert [Path(entry.file).relative_to(photos).parts for entry in index.entries] == [
        (f"p{person}", f"{shot}.png") for person in range(5) for shot in range(4)
    ]
    entry = index.entries[9]
    assert (entry.person, entry.camera, entry.date) == ("person-2", "camera-1", "2024-03-11")
    assert index.entries[19].person is None
    expected = search_model.encode_image([entry.file for entry in index.entries]).numpy()
    np.testing.assert_allclose(index.vectors_ND, expected, atol=1e-3)
    assert [hit.row for hit in index.search(expected[7], 1)] == [7]
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "photos.index"]


def test_devices_share_the_chunks_and_change_nothing(
    search_model: TrainedModel, search_run: Path, photos: Path, tmp_path: Path
) -> None:
    listing = list_source(str(photos))
    add([search_model], listing, tmp_path / "one")
    add([search_model, load(search_run, "cpu")], listing, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_again_adds_what_is_new_and_brings_the_rest_up_to_date(search_model: TrainedModel, tmp_path: Path) -> None:
    photos, folder = write_photos(tmp_path / "album", people=3, shots=3), tmp_path / "photos.index"
    add([search_model], list_source(str(photos)), folder)
    before = contents(folder)
    assert add([search_model], list_source(str(photos)), folder).new == 0 and contents(folder) == before
    picture(9, 9).save(photos / "a_new.png")
    picture(8, 8).save(photos / "p1" / "1.png")
    os.utime(photos / "p1" / "1.png", (1, 1))
    text = (photos / "metadata.csv").read_text()
    (photos / "metadata.csv").write_text(text.replace("p0/2.png,person-0", "p0/2.png,Zoë"))
    (photos / "p0" / "0.png").unlink()
    added = add([search_model], list_source(str(photos)), folder)
    assert (added.new, added.changed, added.kept) == (2, 1, 8)
    index = PhotoIndex.open(folder)
    by_file = {str(Path(entry.file).relative_to(photos)): row for row, entry in enumerate(index.entries)}
    assert len(by_file) == 10 and "p0/0.png" in by_file  # what is gone from the source stays until it is deleted
    assert index.entries.persons == ["Zoë", "person-0", "person-1"]
    assert index.entries[by_file["p0/2.png"]].person == "Zoë"
    for name in ("p1/1.png", "a_new.png", "p0/2.png"):
        expected = search_model.encode_image(photos / name)[0].numpy()
        np.testing.assert_allclose(index.vectors_ND[by_file[name]], expected, atol=1e-3)


@pytest.mark.parametrize("killed_at", [0, 1, 2, 3, "commit"])
def test_killed_at_any_chunk_and_started_again_gives_exactly_the_same_index(
    killed_at: int | str,
    search_model: TrainedModel,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listing = list_source(str(photos))
    add([search_model], listing, tmp_path / "whole")
    written = encoding._write_chunk
    folder = tmp_path / "photos.index"

    def write_or_die(path: Path, chunk: encoding.Chunk) -> None:
        path.parent.mkdir(exist_ok=True)
        if len(list(path.parent.glob("*.npz"))) == killed_at:
            path.with_suffix(".partial").write_bytes(b"half a chunk")
            os.kill(os.getpid(), signal.SIGKILL)
        written(path, chunk)

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_write_chunk", write_or_die)
        if killed_at == "commit":
            patch.setattr(store, "replace_folder", die)
        status = in_child(lambda: add([search_model], listing, folder))
    assert os.WIFSIGNALED(status) and not folder.exists()
    kept = len(list(store.work_folder(folder).glob("*.npz")))
    assert kept == (4 if killed_at == "commit" else killed_at)
    encoded: list[int] = []
    real = encoding._encode
    monkeypatch.setattr(encoding, "_encode", lambda *args: encoded.append(len(args[2])) or real(*args))
    add([search_model], listing, folder)
    assert sum(encoded) == len(listing.entries) - min(6 * kept, 20)
    assert contents(folder) == contents(tmp_path / "whole")
    assert not store.work_folder(folder).exists() and not store._partial(folder).exists()


def test_a_damaged_chunk_is_made_again(search_model: TrainedModel, photos: Path, tmp_path: Path) -> None:
    entries = list_source(str(photos)).entries
    paths = encoding.encode_entries([search_model], entries, tmp_path)
    good = [path.read_bytes() for path in paths]
    paths[1].write_bytes(good[1][: len(good[1]) // 2])
    paths[2].write_bytes(b"")
    assert read_chunk(paths[1]) is None and read_chunk(paths[2]) is None
    assert encoding.encode_entries([search_model], entries, tmp_path) == paths
    assert all(read_chunk(path) is not None for path in paths)


def test_a_full_disk_changes_nothing_and_a_later_run_goes_on(
    search_model: TrainedModel, photos: Path, tmp_path: Path
) -> None:
    folder = write_photos(tmp_path / "few", people=2, shots=2), tmp_path / "photos.index"
    add([search_model], list_source(str(folder[0])), folder[1])
    before = contents(folder[1])

    def limited(size: int, work: Callable[[], object]) -> int:
        def run() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            work()

        return in_child(run)

    # 1,000 bytes: no chunk can be written. 2,000: chunks can, the entries of the whole index cannot.
    for size in (1000, 2000):
        status = limited(size, lambda: add([search_model], list_source(str(photos)), folder[1]))
        assert os.WEXITSTATUS(status) == 3, size
        assert contents(folder[1]) == before and not store._partial(folder[1]).exists()
        assert not list(tmp_path.rglob("*.partial"))
    assert len(list(store.work_folder(folder[1]).glob("*.npz"))) == 4
    assert add([search_model], list_source(str(photos)), folder[1]).new == 20
    grown = contents(folder[1])
    assert os.WEXITSTATUS(limited(500, lambda: delete(folder[1], Filter(person="person-0")))) == 3
    assert contents(folder[1]) == grown and not store._partial(folder[1]).exists()


def test_two_processes_do_not_change_one_index(tmp_path: Path) -> None:
    folder = tmp_path / "photos.index"
    write(folder, clustered(30, 4, people=3))
    with (tmp_path / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is changing it"):
            delete(folder, Filter(person="person 1"))
    assert len(delete(folder, Filter(person="person 1"))) == 5


def test_another_model_and_another_folder_are_refused(search_model: TrainedModel, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos.index"
    add([search_model], list_source(str(photos)), folder)
    other = load(make_export(tmp_path / "other", seed=1), "cpu")
    with pytest.raises(UserError, match="was made with another model"):
        add([other], list_source(str(photos)), folder)
    with pytest.raises(UserError, match="exists and is no index"):
        add([search_model], list_source(str(photos)), photos)


def test_unreadable_photographs_end_it_or_are_left_out_and_counted(search_model: TrainedModel, tmp_path: Path) -> None:
    photos, folder = write_photos(tmp_path / "album", people=2, shots=5), tmp_path / "photos.index"
    (photos / "p0" / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"p0/2\.png: the image does not decode.*--max-bad-fraction"):
        add([search_model], list_source(str(photos)), folder)
    assert not folder.exists()
    for new, kept in ((9, 0), (0, 9)):  # the same command again says the same of the same source
        added = add([search_model], list_source(str(photos)), folder, max_bad_fraction=0.1)
        assert (added.new, added.kept, added.bad) == (new, kept, 1)
    for file in photos.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="no photograph could be read"):
        add([search_model], list_source(str(photos)), tmp_path / "none.index", max_bad_fraction=1.0)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {LOCK, ".none.index.reid_dist-lock", "album", folder.name}


def test_a_model_that_diverged_leaves_no_index(search_run: Path, photos: Path, tmp_path: Path) -> None:
    model = load(search_run, "cpu")
    next(model.encoder.visual.parameters()).data.fill_(float("nan"))
    with pytest.raises(UserError, match="nan or inf"):
        add([model], list_source(str(photos)), tmp_path / "photos.index")
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_extending_keeps_the_trained_centres(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "FLAT_LIMIT", 400)
    monkeypatch.setattr(change, "encode_entries", lambda *_: [tmp_path / "chunk"])
    vector_ND = clustered(900, 8, people=40)
    new = [Entry(f"/new/{i}.jpg", "1") for i in range(3)]
    monkeypatch.setattr(change, "_chunk", lambda _: (new, vector_ND[:3]))
    folder = tmp_path / "photos.index"
    write(folder, vector_ND)

    class Model:
        digest, features, folder, manifest = "d" * 64, 8, tmp_path, {}

    built = []
    monkeypatch.setattr(store, "build_lists", lambda *_: built.append(1) or {})
    added = add([Model()], change.Listing(new, []), folder)  # type: ignore[list-item]
    index = PhotoIndex.open(folder)
    assert not built and added.kept == 900 and index.manifest["lists"]["trained_on"] == 900
    hits = index.search(vector_ND[1].astype(np.float32), 2)
    assert {hit.row for hit in hits} == {1, 901}


def test_folders_of_others_beside_an_index_stay(search_model: TrainedModel, tmp_path: Path) -> None:
    photos, folder = write_photos(tmp_path / "album", people=2, shots=2), tmp_path / "photos.index"
    for ending in ("old", "partial", "work", "lock"):
        (tmp_path / f"photos.index.{ending}").mkdir()
        (tmp_path / f"photos.index.{ending}" / "diary").write_text("mine")
    add([search_model], list_source(str(photos)), folder)
    picture(7, 7).save(photos / "new.png")
    add([search_model], list_source(str(photos)), folder)
    delete(folder, Filter(person="person-0"))
    assert [path.read_text() for path in sorted(tmp_path.glob("photos.index.*/diary"))] == ["mine"] * 4


def test_a_link_to_an_index_and_a_dot_mean_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    folder, link = tmp_path / "disk" / "photos.index", tmp_path / "link.index"
    vector_ND = clustered(30, 4, people=3)
    write(folder, vector_ND)
    link.symlink_to(folder)
    gone = vector_ND[1].tobytes()
    assert len(delete(link, Filter(person="person 1"))) == 5
    assert link.is_symlink() and sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link.index"]
    assert not [name for name, data in around(folder).items() if gone in data or b"/photos/1.jpg" in data]
    assert len(PhotoIndex.open(link).entries) == len(PhotoIndex.open(folder).entries) == 25
    monkeypatch.chdir(folder)
    assert len(delete(Path(), Filter(person="person 2"))) == 4
    assert len(PhotoIndex.open(folder).entries) == 21
    assert sorted(path.name for path in folder.parent.iterdir()) == [LOCK, "photos.index"]


def test_a_date_that_the_metadata_take_back_is_gone_or_that_of_the_file(
    search_model: TrainedModel, tmp_path: Path
) -> None:
    photos, folder = tmp_path / "album", tmp_path / "photos.index"
    photos.mkdir()
    exif = Image.Exif()
    exif[0x8769] = {0x9003: "2021:07:08 09:10:11"}
    picture(0, 0).save(photos / "dated.jpg", exif=exif)
    picture(1, 1).save(photos / "plain.jpg")
    for given, expected in (
        (("2024", "2024"), ("2024", "2024")),
        (("", ""), ("2021-07-08T09:10:11", None)),
        (("2023", "2023"), ("2023", "2023")),
        (None, ("2021-07-08T09:10:11", None)),
    ):
        (photos / "metadata.csv").unlink(missing_ok=True)
        if given is not None:
            (photos / "metadata.csv").write_text(f"file,date\ndated.jpg,{given[0]}\nplain.jpg,{given[1]}\n")
        add([search_model], list_source(str(photos)), folder)
        assert tuple(entry.date for entry in PhotoIndex.open(folder).entries) == expected, given


def test_where_a_model_moved_is_remembered_when_nothing_is_new(photos: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "photos.index", make_export(tmp_path / "run")
    add([load(run, "cpu")], list_source(str(photos)), folder)
    before = contents(folder)
    run.rename(tmp_path / "moved")
    added = add([load(tmp_path / "moved", "cpu")], list_source(str(photos)), folder)
    index, after = PhotoIndex.open(folder), contents(folder)
    assert added.new == 0 and index.model_path == str(tmp_path / "moved" / "export")
    assert before.pop("manifest.json") != after.pop("manifest.json") and before == after


def test_what_is_no_regular_file_counts_as_unreadable(search_model: TrainedModel, tmp_path: Path) -> None:
    photos, folder = write_photos(tmp_path / "album", people=2, shots=4), tmp_path / "photos.index"
    (photos / "nowhere.jpg").symlink_to("/nowhere.jpg")
    (photos / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(photos / "pipe.webp")
    with pytest.raises(UserError, match=r"nowhere\.jpg: cannot be read \(No such file.*--max-bad-fraction"):
        add([search_model], list_source(str(photos)), folder)
    added = add([search_model], list_source(str(photos)), folder, max_bad_fraction=0.3)
    assert (added.new, added.bad) == (8, 3)
