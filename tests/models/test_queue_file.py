"""A queue on disk: every world size and size reads it back exactly, and damage is refused."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reid_dist.distributed import rank
from reid_dist.errors import UserError
from reid_dist.files import aside
from reid_dist.kernels.contrastive import EMPTY
from reid_dist.models.queue import FeatureQueue

D = 3


def make_rows(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, count, D, generator=generator)
    return image, text, torch.randint(50, (count,), generator=generator)


def filled(size: int, rows: int, sharded: bool = False, dtype: torch.dtype = torch.float32, **how: str) -> FeatureQueue:
    """The same rows whatever the number of ranks: rank 0 brings them all."""
    queue = FeatureQueue(size, D, 200, sharded=sharded, dtype=dtype, **how)  # type: ignore[arg-type]
    queue.commit([queue.gather(*make_rows(rows if rank() == 0 else 0, 1))])
    return queue


def _save(folder: Path, size: int, rows: int, sharded: bool, init: str) -> int:
    queue = filled(size, rows, sharded, init=init)
    queue.save(folder, step=7)
    return int(queue.digest())


def _load(folder: Path, size: int) -> list[int]:
    """Digests of a replicated and of a sharded queue."""
    digests = []
    for sharded in (False, True):
        queue = FeatureQueue(size, D, 5, sharded=sharded)
        queue.commit([queue.gather(*make_rows(3, 9))])  # what was there goes
        record = queue.load(folder)
        assert (record.step, record.features, record.dtype) == (7, D, "float32")
        queue.check_agreement()
        digests.append(int(queue.digest()))
    return digests


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("init", "rows"), [("empty", 0), ("random_as_published", 9), ("empty", 100)])
def test_saved_on_four_ranks_and_loaded_on_any(
    init: str, sharded: bool, rows: int, tmp_path: Path, run_ranks: Callable
) -> None:
    (digest,) = set(run_ranks(4, _save, tmp_path / "queue", 37, rows, sharded, init))
    files = sorted(path.name for path in (tmp_path / "queue").iterdir())
    assert len(files) == (5 if sharded else 2) and files[0] == "queue.json"
    assert [path.name for path in tmp_path.iterdir()] == ["queue"]
    for ranks in (1, 2, 3):
        assert run_ranks(ranks, _load, tmp_path / "queue", 37) == [[digest] * 2] * ranks


def test_shards_without_a_slot_are_saved_and_read(tmp_path: Path, run_ranks: Callable) -> None:
    """Two slots on four ranks."""
    (digest,) = set(run_ranks(4, _save, tmp_path / "queue", 2, 9, True, "empty"))
    for ranks in (1, 3):
        assert run_ranks(ranks, _load, tmp_path / "queue", 2) == [[digest] * 2] * ranks


@pytest.mark.parametrize("init", ["empty", "random_as_published"])
@pytest.mark.parametrize("size", [1, 5, 11, 12, 40])
@pytest.mark.parametrize("rows", [0, 3, 11, 30])
def test_a_queue_of_another_size_gets_the_newest_rows(size: int, rows: int, init: str, tmp_path: Path) -> None:
    """Into a smaller or equal one: as if it had been this size all along. Into a larger one: what there was."""
    old = filled(11, rows, init=init)
    old.save(tmp_path / "queue", 1)
    queue = FeatureQueue(size, D, 5)
    queue.load(tmp_path / "queue")
    images, _, ids = make_rows(rows, 1)
    kept = {int(n): row for row, n in enumerate(queue.ring.sequence_X[:size]) if queue.ring.ids_X[row] != EMPTY}
    start = FeatureQueue(11, D, 1, init="random_as_published")
    first = -11 if init == "random_as_published" else 0
    assert set(kept) == set(range(max(first, rows - min(size, 11)), rows))
    for number, row in kept.items():
        assert row == number % size
        if number >= 0:
            assert int(queue.ring.ids_X[row]) == int(ids[number])
            assert queue.ring.image_XD[row].equal(images[number])
        else:
            assert queue.ring.image_XD[row].equal(start.ring.image_XD[number % 11])
    assert bool(queue.ring.in_sequence()) and int(queue.ring.next) == rows


def test_a_loaded_queue_goes_on_as_the_one_that_was_saved(tmp_path: Path) -> None:
    queue, other = filled(11, 8), FeatureQueue(11, D, 200)
    queue.save(tmp_path / "queue", 1)
    other.load(tmp_path / "queue")
    for q in (queue, other):
        q.commit([q.gather(*make_rows(9, 3))])
    assert int(queue.digest()) == int(other.digest())


def test_current_keys_are_counted_after_a_load_too(tmp_path: Path) -> None:
    """The load empties the storage, also where the last call's current keys were."""
    queue = filled(11, 8)
    queue.save(tmp_path / "queue", 1)
    current = [queue.gather(*make_rows(3, 3))]
    anchors, ids, scale = torch.ones(2, D), torch.tensor([60, 61]), torch.zeros(())
    before = queue.lse(anchors, "image", ids, scale, current=current)
    queue.load(tmp_path / "queue")
    assert queue.lse(anchors, "image", ids, scale, current=current).equal(before)


def test_bf16_to_fp32_changes_no_value_and_fp32_to_bf16_rounds(tmp_path: Path) -> None:
    exact, rounded = filled(6, 6), filled(6, 6, dtype=torch.bfloat16)
    exact.save(tmp_path / "exact", 1)
    rounded.save(tmp_path / "rounded", 1)
    down, up = FeatureQueue(6, D, 1, dtype=torch.bfloat16), FeatureQueue(6, D, 1)
    assert down.load(tmp_path / "exact").dtype == "float32"
    assert up.load(tmp_path / "rounded").dtype == "bfloat16"
    assert int(down.digest()) == int(rounded.digest())
    assert up.ring.text_XD.equal(rounded.ring.text_XD.float())


def test_the_files_say_what_they_are(tmp_path: Path) -> None:
    filled(6, 4).save(tmp_path / "queue", 3)
    manifest = json.loads((tmp_path / "queue" / "queue.json").read_text())
    assert "personal data" in manifest["note"]
    assert (manifest["size"], manifest["features"], manifest["next_sequence"], manifest["step"]) == (6, D, 4, 3)
    assert list(manifest["shards"][0]) == ["file", "sha256", "rows"]


# Damage


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


SHARD = "shard-00001-of-00003.safetensors"
MANIFEST = "queue.json"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda folder: _flip(folder / SHARD), f"{SHARD}: damaged, its content does not match its hash"),
    "a cut file": (lambda folder: os.truncate(folder / SHARD, 100), f"{SHARD}: damaged"),
    "a missing shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD}: missing; restore it, or remove "),
    "a shard off the list": (lambda folder: _edit(folder / MANIFEST, shards=[]), "does not match its own hash"),
    "a changed number": (lambda folder: _edit(folder / MANIFEST, next_sequence=3), "does not match its own hash"),
    "cut JSON": (lambda folder: os.truncate(folder / MANIFEST, 30), "queue.json: damaged ("),
    "JSON of another kind": (lambda folder: (folder / MANIFEST).write_text("[]"), "format_version is None"),
    "a later format": (lambda folder: _edit(folder / MANIFEST, format_version=2), "is 2; this program reads 1"),
    "binary": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "queue.json: damaged ("),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "there is no saved queue; remove "),
}


def _save_three(folder: Path) -> None:
    filled(7, 30, sharded=True).save(folder, 1)


def _refusal(folder: Path, features: int = D) -> tuple[str, bool]:
    queue = FeatureQueue(5, features, 4)
    queue.commit([queue.gather(torch.ones(2, features), torch.ones(2, features), torch.zeros(2).int())])
    before = int(queue.digest())
    try:
        queue.load(folder)
    except UserError as error:
        return str(error), int(queue.digest()) == before
    return "", False


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_is_refused_on_every_rank_and_the_queue_stays(damage: str, tmp_path: Path, run_ranks: Callable) -> None:
    run_ranks(3, _save_three, tmp_path / "queue")
    harm, expected = DAMAGE[damage]
    harm(tmp_path / "queue")
    for ranks in (1, 2):
        found = run_ranks(ranks, _refusal, tmp_path / "queue")
        assert len(set(found)) == 1 and found[0][1]
        assert expected in found[0][0] and str(tmp_path / "queue") in found[0][0] and "\n" not in found[0][0]


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_every_shard_is_verified_by_some_rank(shard: int, tmp_path: Path, run_ranks: Callable) -> None:
    run_ranks(3, _save_three, tmp_path / "queue")
    _flip(tmp_path / "queue" / f"shard-{shard:05d}-of-00003.safetensors")
    for ranks in (1, 2):
        for message, unchanged in run_ranks(ranks, _refusal, tmp_path / "queue"):
            assert f"shard-{shard:05d}-of-00003.safetensors: damaged" in message and unchanged


def test_a_manifest_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    filled(4, 4).save(tmp_path / "queue", 1)
    content = json.loads((tmp_path / "queue" / MANIFEST).read_text())
    del content["sha256"]
    content["shards"][0]["file"] = "../elsewhere.safetensors"
    own_hash = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    _edit(tmp_path / "queue" / MANIFEST, shards=content["shards"], sha256=own_hash)
    message, unchanged = _refusal(tmp_path / "queue")
    assert "queue.json: shards.0.file: String should match pattern" in message and unchanged


def test_another_feature_size_is_refused(tmp_path: Path) -> None:
    filled(4, 4).save(tmp_path / "queue", 1)
    message, unchanged = _refusal(tmp_path / "queue", features=8)
    assert "queue.json: keys of 3 features, but the model's have 8; set model to the one that was trained" in message
    assert message.endswith(f"or remove {tmp_path / 'queue'} to start with an empty queue") and unchanged


# Interruption


def test_a_save_replaces_the_one_before_and_what_a_killed_one_left(tmp_path: Path) -> None:
    folder = tmp_path / "queue"
    first, second = filled(5, 3), filled(5, 9)
    for name in ("queue.partial", aside(folder).name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rest").write_text("left over")
    first.save(folder, 1)
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, "shard-00000-of-00001.safetensors"]
    second.save(folder, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["queue"]
    assert first.load(folder).step == 2 and int(first.digest()) == int(second.digest())


def test_nothing_has_the_name_before_all_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, flushed = tmp_path / "queue", []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        assert not folder.exists() or flushed[-1] == tmp_path.name
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    filled(5, 3).save(folder, 1)
    assert flushed == ["shard-00000-of-00001.safetensors", "queue.json", "queue.partial", tmp_path.name]


def test_a_save_killed_between_its_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, queue = tmp_path / "queue", filled(5, 3)
    queue.save(folder, 1)
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            raise KeyboardInterrupt
        return real(path, target)

    for _ in range(2):  # the second one finds what the first one left
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", rename)
            filled(5, 9).save(folder, 2)
        assert not folder.exists()
        other = filled(5, 4)
        assert other.load(folder).step == 1 and int(other.digest()) == int(queue.digest())
    queue.save(folder, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["queue"] and queue.load(folder).step == 3


def test_a_failed_write_leaves_the_old_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "queue"
    queue = filled(5, 3)
    queue.save(folder, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"feature queue: .*No space left on device"):
        queue.save(folder, 2)
    assert queue.load(folder).step == 1


def _save_where_rank_1_cannot(folder: Path) -> tuple[str, bool]:
    queue = filled(6, 3, sharded=True)

    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    if rank() == 1:
        os.fsync = broken
    try:
        queue.save(folder, 1)
    except UserError as error:
        return str(error), folder.exists()
    return "", True


def test_a_rank_that_cannot_write_stops_all(tmp_path: Path, run_ranks: Callable) -> None:
    found = run_ranks(3, _save_where_rank_1_cannot, tmp_path / "queue")
    assert found == [("feature queue: [Errno 5] Input/output error", False)] * 3
