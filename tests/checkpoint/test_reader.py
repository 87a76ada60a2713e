"""Reading: any rows on any number of ranks, and nothing that is damaged."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reid_dist.checkpoint import reader
from reid_dist.checkpoint.manifest import MANIFEST_FILE, step_folder
from reid_dist.checkpoint.private import BUFFER, private_sha256
from reid_dist.checkpoint.reader import Checkpoint, open_checkpoint
from reid_dist.distributed import rank, world_size
from reid_dist.errors import UserError
from reid_dist.pieces import Saved, read_whole
from tests.checkpoint import states


@pytest.fixture(scope="module")
def saved(tmp_path_factory, run_ranks: Callable) -> Path:
    """Checkpoints of steps 1 and 2 by two ranks."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_ranks(2, states.save, folder, 1, 2)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_progressions_meet_where_sets_do() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        wanted, held = ((draw.randrange(12), draw.randrange(9), draw.randrange(1, 7)) for _ in range(2))
        own, theirs = (list(range(first, first + count * every, every)) for first, count, every in (wanted, held))
        here, there = reader._common(wanted, held)
        assert [own[k] for k in here] == [theirs[j] for j in there] == sorted({*own} & {*theirs})


def test_all_that_was_saved_is_there(saved: Path) -> None:
    checkpoint = open_checkpoint(step_folder(saved, 2))
    like: Saved = checkpoint
    for (part, name), expected in states.tensors(2).items():
        assert name in like.names(part)
        found = checkpoint.whole(part, name)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert like.names("nothing") == []
    weight = states.tensors(2)["weights", "encoder.conv.weight"]
    assert torch.equal(read_whole(like, "weights", "encoder.conv.weight", (5, 7, 11)), weight)
    manifest = checkpoint.manifest
    assert (manifest.step, manifest.world_size, manifest.samples, manifest.loss) == (2, 2, 32, 98.0)
    assert manifest.versions["torch"] == torch.__version__.split("+")[0] or manifest.versions["torch"]
    assert checkpoint.digests() == manifest.digests
    for owner in (0, 1):
        own = checkpoint.private(owner)
        assert own is not None and own.values == {"position": 2}
        assert own.tensors["rng"].tolist() == list(range(2, 11))
        assert own.tensors[f"{BUFFER}mean"][0] == 2 + torch.tensor(owner / 10)
        assert private_sha256(own) == manifest.private[owner]
    assert checkpoint.private(2) is None


def _rows_here(folder: Path) -> bool:
    """Every rank reads what it holds on as many ranks as there are now."""
    checkpoint, whole = open_checkpoint(step_folder(folder, 2)), states.tensors(2)
    for piece in states.pieces(2):
        rows = checkpoint.rows(piece.part, piece.name, piece.first, len(piece.rows_N), piece.every)
        assert rows.dtype == piece.rows_N.dtype and torch.equal(rows, piece.rows_N)
    turns = checkpoint.rows("queue", "image", rank(), 37 // 5, 5)
    return torch.equal(turns, whole["queue", "image"][rank() :: 5][: 37 // 5]) and world_size() > 0


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_reads_its_rows(saved: Path, run_ranks: Callable, ranks: int) -> None:
    assert run_ranks(ranks, _rows_here, saved) == [True] * ranks


def test_rows_that_were_not_saved_are_refused(saved: Path) -> None:
    checkpoint = open_checkpoint(step_folder(saved, 2))
    assert len(checkpoint.rows("queue", "ids", 37, 0)) == 0
    for arguments, words in (
        (("queue", "ids", 30, 8), "37 rows, there is no row 37"),
        (("queue", "ids", 0, 14, 3), "no row 39"),
        (("queue", "other", 0, 1), "queue other was not saved"),
        (("other", "ids", 0, 1), "other ids was not saved"),
    ):
        with pytest.raises(UserError, match=words):
            checkpoint.rows(*arguments)


RANK_0, RANK_1 = ("rank-00000-of-00002", "rank-00001-of-00002")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


def _swap(folder: Path) -> None:
    paths = [folder / f"{name}.safetensors" for name in (RANK_0, RANK_1)]
    paths[0].rename(folder / "x")
    paths[1].rename(paths[0])
    (folder / "x").rename(paths[1])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda folder: _cut(folder / f"{RANK_1}.safetensors"), f"{RANK_1}.safetensors: damaged, it has"),
    "flipped": (lambda folder: _flip(folder / f"{RANK_1}.safetensors"), f"{RANK_1}.safetensors: damaged, its content"),
    "flipped values": (lambda folder: _flip(folder / f"{RANK_0}.json"), f"{RANK_0}.json: damaged"),
    "deleted": (lambda folder: (folder / f"{RANK_0}.safetensors").unlink(), f"{RANK_0}.safetensors: missing"),
    "swapped": (_swap, f"{RANK_0}.safetensors: damaged"),
    "emptied": (lambda folder: (folder / f"{RANK_0}.json").write_bytes(b""), f"{RANK_0}.json: damaged, it has 0"),
    "other step's file": (
        lambda folder: shutil.copy(step_folder(folder.parent, 1) / f"{RANK_1}.safetensors", folder),
        f"{RANK_1}.safetensors: damaged, its content",
    ),
    "other step's manifest": (
        lambda folder: shutil.copy(step_folder(folder.parent, 1) / MANIFEST_FILE, folder),
        "of step 1, not of its folder's",
    ),
    "no manifest": (lambda folder: (folder / MANIFEST_FILE).unlink(), "manifest.json: missing"),
    "cut manifest": (lambda folder: _cut(folder / MANIFEST_FILE), "manifest.json: damaged"),
    "flipped manifest": (lambda folder: _flip(folder / MANIFEST_FILE), "manifest.json: "),
    "link": (
        lambda folder: [(folder / f"{RANK_0}.json").rename(folder / "x"), (folder / f"{RANK_0}.json").symlink_to("x")],
        f"{RANK_0}.json: not a regular file",
    ),
    "pipe": (
        lambda folder: [(folder / f"{RANK_0}.json").unlink(), os.mkfifo(folder / f"{RANK_0}.json")],
        f"{RANK_0}.json: not a regular file",
    ),
    "writable": (lambda folder: (folder / f"{RANK_1}.json").chmod(0o662), f"{RANK_1}.json: others may write it"),
    "writable folder": (lambda folder: folder.chmod(0o777), "others may write it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name_before_anything_is_read(
    copied: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = step_folder(copied, 2)
    apply, words = DAMAGES[damage]
    apply(folder)
    monkeypatch.setattr(reader, "safe_open", None)
    with pytest.raises(UserError) as raised:
        open_checkpoint(folder)
    assert words in str(raised.value) and str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
    if "others may" not in words:
        assert "--fallback" in str(raised.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "step-00000001")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_anothers_file_is_refused(copied: Path) -> None:
    path = step_folder(copied, 2) / f"{RANK_0}.json"
    os.chown(path, 12345, 12345)
    with pytest.raises(UserError, match=r"rank-00000-of-00002\.json: owned by user 12345"):
        open_checkpoint(path.parent)


def _words_of_refusal(folder: Path) -> str:
    try:
        open_checkpoint(folder)
    except UserError as error:
        return str(error)
    return "opened"


def test_all_ranks_refuse_with_the_same_words(copied: Path, run_ranks: Callable) -> None:
    folder = step_folder(copied, 2)
    assert run_ranks(2, _words_of_refusal, folder) == ["opened"] * 2
    _flip(folder / f"{RANK_1}.safetensors")  # the last of four files: verified by one rank
    found = run_ranks(3, _words_of_refusal, folder)
    assert len(set(found)) == 1 and f"{RANK_1}.safetensors: damaged" in found[0]


def test_the_checkpoint_names_its_folder(saved: Path) -> None:
    assert isinstance(open_checkpoint(step_folder(saved, 1)), Checkpoint)
    assert open_checkpoint(step_folder(saved, 1)).folder == step_folder(saved, 1)
