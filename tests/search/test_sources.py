"""What a source holds: folders with metadata and EXIF, shard sets, lists of frames; wrong ones in one line."""

from pathlib import Path

import numpy as np
import pytest

from reid_dist.errors import UserError
from reid_dist.search.encoding import encode_entries, read_chunk
from reid_dist.search.pictures import entry_picture
from reid_dist.search.sources import list_source
from reid_dist.trained import TrainedModel
from tests.search.conftest import picture, write_photos, write_shards


def test_a_folder_is_listed_in_one_order_with_what_the_metadata_say(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "album", people=3, shots=2)
    (photos / "notes.txt").write_text("not a picture")
    (photos / "p0" / "IMG_1.HEIC").write_bytes(b"")
    with (photos / "metadata.csv").open("a") as file:
        file.write("p7/gone.png,Ann,,\n./p2/1.png,,door,2024\n")
    listing = list_source(str(photos))
    assert [entry.file for entry in listing.entries] == sorted(str(path) for path in photos.rglob("*.png"))
    assert (listing.entries[0].person, listing.entries[0].camera) == ("person-0", "camera-0")
    last = listing.entries[-1]
    assert (last.person, last.camera, last.date) == (None, "door", "2024")
    assert "1 .heic" in listing.notes[0] and "names 1 files that are not there" in listing.notes[1]
    assert list_source(str(photos / "p0" / "..")).entries == listing.entries
    before = listing.entries[3].version
    picture(3, 3).save(photos / "p1" / "1.png")
    assert list_source(str(photos)).entries[3].version != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,person\na.png,Ann\n", "columns name, person; needs file"),
        ("file,colour\na.png,red\n", "columns file, colour"),
        ("file,date\na.png,31.5.2024\n", r'line 2: date "31\.5\.2024": not a date'),
        ("file,date\na.png,2024,more\n", "line 2: more values"),
        ("file,date\n,2024\n", "line 2: no file"),
        ("file\na.png\n./a.png\n", "named twice"),
        ('file\n"a.png\n', "not CSV"),
        ('file,"person\n', "line 1: not CSV"),
        ("", "needs file"),
    ],
)
def test_wrong_metadata_are_told_with_their_line(text: str, message: str, tmp_path: Path) -> None:
    picture(0, 0).save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=rf"metadata\.csv.*{message}"):
        list_source(str(tmp_path))


def test_frames_are_relative_to_their_list(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "frames", people=1, shots=3)
    (tmp_path / "list.txt").write_text("frames/p0/2.png\n\nframes/p0/0.png\nframes/p0/2.png\n")
    found = list_source(str(tmp_path / "list.txt")).entries
    assert [entry.file for entry in found] == [str(photos / "p0" / "2.png"), str(photos / "p0" / "0.png")]
    (tmp_path / "list.csv").write_text("time,file,camera\n1.5,frames/p0/1.png,gate\n")
    (entry,) = list_source(str(tmp_path / "list.csv")).entries
    assert (entry.time, entry.camera, entry.person) == (1.5, "gate", None)
    for text, message in (
        *((f"time,file\n{time},frames/p0/1.png\n", f'"{time}" is no number') for time in ("soon", "nan", "-inf")),
        ("file\nnone.png\n", "no such file"),
    ):
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            list_source(str(tmp_path / "list.csv"))


def test_shard_sets_are_indexed_as_evaluation_reads_them(search_model: TrainedModel, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", people=2, shots=3, captions=[])
    entries = list_source(str(shards)).entries
    assert [(entry.person, entry.camera) for entry in entries[:4]] == [
        *(("toy:100", camera) for camera in (None, "0", "1")),
        ("toy:101", None),
    ]
    assert entries[4].file == f"{shards}::000004"
    assert np.array_equal(np.asarray(entry_picture(entries[4], 64)), np.asarray(picture(101, 4)))
    (chunk,) = (read_chunk(path) for path in encode_entries([search_model], entries, tmp_path / "work"))
    assert chunk is not None
    expected = search_model.encode_image([picture(100 + row // 3, row) for row in range(6)]).numpy()
    np.testing.assert_allclose(chunk.vectors_BD, expected, atol=1e-3)
    other = write_shards(tmp_path / "other", people=1, shots=3, captions=["a person"])
    (shards / "toy-000000.tar").write_bytes((other / "toy-000000.tar").read_bytes())
    for name in ("manifest.json", "index.npy"):
        (shards / name).write_bytes((other / name).read_bytes())
    with pytest.raises(UserError, match="not in the shard set any more"):
        entry_picture(entries[4], 64)


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "IMG.HEIC").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds no image \(\.jpg.*1 \.heic"):
        list_source(str(tmp_path))
    with pytest.raises(UserError, match="no such folder or list"):
        list_source(str(tmp_path / "none"))
    with pytest.raises(UserError, match="is not on this machine"):
        list_source("https://example.org/shards")
    (tmp_path / "video.mp4").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        list_source(str(tmp_path / "video.mp4"))
