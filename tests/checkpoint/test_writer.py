"""Saving: whole, beside training, and with one line on every rank where it does not work."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reid_dist.checkpoint import writer as writer_module
from reid_dist.checkpoint.manifest import step_folder
from reid_dist.checkpoint.private import Private
from reid_dist.checkpoint.reader import open_checkpoint
from reid_dist.checkpoint.retention import saved_steps
from reid_dist.checkpoint.writer import CheckpointWriter
from reid_dist.distributed import is_lost_peer, rank, world_size
from reid_dist.errors import CheckpointError, DivergenceError
from reid_dist.pieces import Piece
from tests.checkpoint import states


def holds(folder: Path, step: int) -> bool:
    """Whether a checkpoint is good and holds what there was after its step."""
    checkpoint = open_checkpoint(step_folder(folder, step))
    return checkpoint.digests() == checkpoint.manifest.digests and all(
        torch.equal(checkpoint.whole(part, name), x) for (part, name), x in states.tensors(step).items()
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hold_up(name: str, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Lets a function that the writer calls wait for the event."""
    go_on, call = threading.Event(), getattr(writer_module, name)

    def slow(*arguments):
        assert go_on.wait(30)
        return call(*arguments)

    monkeypatch.setattr(writer_module, name, slow)
    return go_on


def test_what_is_unchanging_is_copied_beside_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = hold_up("with_pieces", monkeypatch)
    checkpoints, weight, mean = states.writer(tmp_path), torch.ones(5), torch.ones(3)
    later = [Piece("weights", "a", weight, 5)]
    checkpoints.save(1, [Piece("means", "b", mean, 3)], Private(), states.record(1), unchanging=later)
    mean.zero_()
    waits = threading.Thread(target=checkpoints.wait_for_copy)
    waits.start()
    waits.join(0.2)
    assert waits.is_alive()
    go_on.set()
    waits.join(30)
    assert not waits.is_alive()
    weight.zero_()
    checkpoints.finish()
    checkpoint = open_checkpoint(step_folder(tmp_path, 1))
    assert float(checkpoint.whole("weights", "a").sum()) == 5 and float(checkpoint.whole("means", "b").sum()) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_copies_what_was_there_before_the_save(tmp_path: Path) -> None:
    checkpoints, weight = states.writer(tmp_path), torch.zeros(1 << 24, device="cuda")
    for _ in range(100):
        weight.add_(1)  # still on its way when it is saved
    own = Private({"first": torch.zeros(3)})  # of the host: its memory is not pinned
    checkpoints.save(1, [], own, states.record(1), unchanging=[Piece("weights", "a", weight, len(weight))])
    checkpoints.wait_for_copy()
    weight.zero_()
    checkpoints.finish()
    assert bool((open_checkpoint(step_folder(tmp_path, 1)).whole("weights", "a") == 100).all())


def _saves_of_different_steps(folder: Path) -> str:
    checkpoints = states.writer(folder)
    if rank() == 0:
        checkpoints.save(1, states.pieces(1), states.private(1), states.record(1))
    try:
        checkpoints.check_same()
    except DivergenceError as error:
        return str(error)
    return "the same"


def test_a_last_save_that_one_rank_left_out_is_not_waited_for(tmp_path: Path, run_ranks: Callable) -> None:
    (found, other) = run_ranks(2, _saves_of_different_steps, tmp_path)
    assert found == other and found.startswith("the step of the last save is not the same on all ranks: two ranks")


def test_nobody_waits_for_a_copy_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments):
        raise MemoryError("no host memory")

    monkeypatch.setattr(writer_module, "with_pieces", broken)
    checkpoints = states.writer(tmp_path)
    checkpoints.save(1, [], Private(), states.record(1), unchanging=states.pieces(1))
    checkpoints.wait_for_copy()
    with pytest.raises(CheckpointError, match="no host memory"):
        checkpoints.finish()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_steps_are_saved_and_named(tmp_path: Path, asynchronous: bool) -> None:
    checkpoints = states.writer(tmp_path / "a" / "b", asynchronous=asynchronous)
    for step in (1, 2, 3):
        checkpoints.save(step, states.pieces(step), states.private(step), states.record(step))
        assert asynchronous or names(tmp_path / "a" / "b")[-1] == f"step-0000000{step}"
    checkpoints.finish()
    assert names(tmp_path / "a" / "b") == ["latest", "step-00000002", "step-00000003"]
    assert holds(tmp_path / "a" / "b", 2) and holds(tmp_path / "a" / "b", 3)


def _save_and_read(folder: Path) -> list[bool]:
    states.save(folder, 1, 2, keep=1)
    return [holds(folder, 2), step_folder(folder, 1).exists()]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_save_together(tmp_path: Path, run_ranks: Callable, ranks: int) -> None:
    assert run_ranks(ranks, _save_and_read, tmp_path) == [[True, False]] * ranks
    assert len(open_checkpoint(step_folder(tmp_path, 2)).manifest.files) == 2 * ranks
    assert names(tmp_path) == ["latest", "step-00000002"]


def test_training_goes_on_while_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = hold_up("write_tensors", monkeypatch)
    checkpoints, weight = states.writer(tmp_path), torch.ones(5)
    checkpoints.save(1, [Piece("weights", "a", weight, 5)], Private(), states.record(1))
    weight.zero_()
    assert not (tmp_path / "latest").exists()
    go_on.set()
    checkpoints.save(2, [Piece("weights", "a", weight, 5)], Private(), states.record(2), wait=True)
    assert (tmp_path / "latest").read_text() == "step-00000002\n"
    assert [float(open_checkpoint(step_folder(tmp_path, step)).whole("weights", "a").sum()) for step in (1, 2)] == [
        5,
        0,
    ]


def test_a_step_is_replaced(tmp_path: Path) -> None:
    states.save(tmp_path, 1)
    first = open_checkpoint(step_folder(tmp_path, 1)).manifest
    checkpoints = states.writer(tmp_path)
    checkpoints.save(1, states.pieces(5), states.private(5), states.record(1), wait=True)
    assert open_checkpoint(step_folder(tmp_path, 1)).manifest.digests != first.digests
    assert names(tmp_path) == ["latest", "step-00000001"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    def note_rename(source: Path, target: Path) -> None:
        rename(source, target)
        done.append(f"rename {Path(target).name}")

    checkpoints = states.writer(tmp_path)
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    checkpoints.save(1, states.pieces(1), states.private(1), states.record(1), wait=True)
    partial = ".step-00000001.reid_dist-partial"
    assert done == [
        "fsync rank-00000-of-00001.safetensors",
        "fsync rank-00000-of-00001.json",
        "fsync manifest.json",
        f"fsync {partial}",
        "rename step-00000001",
        f"fsync {tmp_path.name}",
        "fsync .latest.reid_dist-partial",
        "rename latest",
        f"fsync {tmp_path.name}",
    ]


def test_only_the_owner_enters(tmp_path: Path) -> None:
    states.save(tmp_path / "checkpoints", 1)
    for path in (tmp_path / "checkpoints", step_folder(tmp_path / "checkpoints", 1)):
        assert path.stat().st_mode & 0o777 == 0o700


def _refusals(folder: Path, make_pieces: Callable, steps: tuple[int, ...] = (1, 1)) -> tuple[str, bool]:
    """The words of a save that fails, and whether the next one works."""
    checkpoints = states.writer(folder)
    with pytest.raises(CheckpointError) as raised:
        checkpoints.save(steps[rank()], make_pieces(), states.private(1), states.record(1), wait=True)
    checkpoints.save(2, states.pieces(2), states.private(2), states.record(2), wait=True)
    return str(raised.value), holds(folder, 2)


def _a_row_is_missing() -> list[Piece]:
    return [Piece("weights", "a", torch.ones(2), 5, 2 * rank())]


def _two_dtypes() -> list[Piece]:
    return [Piece("weights", "a", torch.ones(2).to(torch.float32 if rank() else torch.bfloat16), 4, 2 * rank())]


def _nothing() -> list[Piece]:
    return []


@pytest.mark.parametrize(
    ("make_pieces", "steps", "words"),
    [
        (_a_row_is_missing, (1, 1), "weights a: its pieces do not hold 5 rows"),
        (_two_dtypes, (1, 1), "weights a: the ranks hold tensors of different dtypes or shapes"),
        (_nothing, (1, 2), "nothing saved, the ranks stand at different steps: rank 0 at 1, rank 1 at 2"),
    ],
)
def test_what_is_not_whole_is_not_saved(
    tmp_path: Path, run_ranks: Callable, make_pieces: Callable, steps: tuple[int, ...], words: str
) -> None:
    found = run_ranks(2, _refusals, tmp_path, make_pieces, steps)
    assert found[0] == found[1] and found[0][1]
    assert re.search(words, found[0][0])
    assert names(tmp_path) == ["latest", "step-00000002"]


def _one_rank_fails(folder: Path) -> list[str]:
    """Rank 1 cannot write its file of step 2; training hears of it at the next save."""
    states.save(folder, 1)
    write = writer_module.write_tensors

    def refuse(path: Path, tensors: object) -> object:
        if rank() == 1 and "00000002" in str(path):
            raise OSError(5, "Input/output error", str(path))
        return write(path, tensors)  # type: ignore[arg-type]

    writer_module.write_tensors = refuse  # type: ignore[assignment]
    checkpoints = states.writer(folder)
    checkpoints.save(2, states.pieces(2), states.private(2), states.record(2))
    try:
        checkpoints.save(3, states.pieces(3), states.private(3), states.record(3))
    except CheckpointError as error:
        return [str(error), *names(folder)]
    finally:
        checkpoints.finish()
    return []


def test_what_went_wrong_on_one_rank_is_raised_on_all_at_the_next_save(tmp_path: Path, run_ranks: Callable) -> None:
    found = run_ranks(2, _one_rank_fails, tmp_path)
    assert found[0] == found[1]
    assert found[0][0] == (
        f"checkpoint of step 2: {tmp_path}/.step-00000002.reid_dist-partial/rank-00001-of-00002.safetensors:"
        " Input/output error; make room, or choose another output_dir"
    )
    assert found[0][1:] == ["latest", "step-00000001"]
    assert (tmp_path / "latest").read_text() == "step-00000001\n" and holds(tmp_path, 1)


def _a_fault_of_the_program(folder: Path) -> str:
    def broken():
        yield from states.pieces(1)
        if rank() == 1:
            raise KeyError("exp_avg")

    checkpoints = states.writer(folder)
    try:
        checkpoints.save(1, broken(), states.private(1), states.record(1), wait=True)
    except Exception as error:
        return repr(error)
    return "saved"


def test_a_fault_of_the_program_reaches_all_and_shows_where_it_is(
    tmp_path: Path, run_ranks: Callable, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(2, _a_fault_of_the_program, tmp_path) == ["""CheckpointError("KeyError: 'exp_avg'")"""] * 2
    assert "in broken" in capfd.readouterr().err


def _leave(folder: Path, found: Path) -> None:
    """Rank 1 dies while both write step 2."""
    states.save(folder, 1)
    write = writer_module.write_tensors

    def die(*arguments: object) -> object:
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)  # type: ignore[arg-type]

    writer_module.write_tensors = die  # type: ignore[assignment]
    checkpoints = states.writer(folder)
    checkpoints.save(2, states.pieces(2), states.private(2), states.record(2))
    began = time.monotonic()
    try:
        checkpoints.finish()
    except RuntimeError as error:
        found.write_text(f"{is_lost_peer(error)} {time.monotonic() - began < 10}")


def test_a_peer_that_dies_leaves_the_last_checkpoint_whole(tmp_path: Path, run_ranks: Callable) -> None:
    with pytest.raises(EOFError):  # of rank 1, which gives no result
        run_ranks(2, _leave, tmp_path / "checkpoints", tmp_path / "found")
    assert (tmp_path / "found").read_text() == "True True"
    assert names(tmp_path / "checkpoints") == ["latest", "step-00000001"]
    assert saved_steps(tmp_path / "checkpoints").keys() == {1}


def test_what_killed_saves_have_left_is_removed_at_the_start(tmp_path: Path) -> None:
    (tmp_path / ".step-00000002.reid_dist-partial").mkdir()
    (tmp_path / ".step-00000002.reid_dist-partial" / "rank-00007-of-00008.safetensors").write_bytes(b"x")
    CheckpointWriter(tmp_path, 1, False, True)
    assert names(tmp_path) == []
    assert world_size() == 1
