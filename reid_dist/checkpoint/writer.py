"""Checkpoints of a stage in training, whole or not there: a copy in host memory, then files written beside training.

Every rank writes its rows into a file of its own in a temporary folder, flushes and hashes it; rank 0 looks whether
all rows are there, writes the manifest, renames the folder and then `latest`. Killed anywhere, the last one is whole.
"""

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from reid_dist.checkpoint.agreement import gather_on_rank_0, on_rank_0, together
from reid_dist.checkpoint.digests import as_hex, digests, summed
from reid_dist.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    NOTE,
    FileRecord,
    Manifest,
    Record,
    dump,
    rank_file,
    step_folder,
)
from reid_dist.checkpoint.private import Private
from reid_dist.checkpoint.reader import check_ours
from reid_dist.checkpoint.retention import clean, purge, write_latest
from reid_dist.checkpoint.snapshot import HostMemory, Snapshot, take_snapshot, with_pieces
from reid_dist.checkpoint.tensor_file import write_blocks, write_tensors
from reid_dist.distributed import check_equal_on_ranks, local_device, rank, world_size
from reid_dist.errors import CheckpointError
from reid_dist.files import beside, replace_folder
from reid_dist.pieces import Piece
from reid_dist.revision import commit

_T = TypeVar("_T")
_PATIENCE = timedelta(hours=1)  # of the ranks that have written, for the slowest one
_SPARE = 1 << 20  # bytes, for headers and the manifest
_PACKAGES = ("torch", "deepspeed", "accelerate", "safetensors", "numpy", "open_clip_torch")


@dataclass(frozen=True)
class _Taken:
    """What one rank is about to write; `unchanging` has still to be copied."""

    step: int
    snapshot: Snapshot
    record: Record
    unchanging: list[Piece]


@dataclass(frozen=True)
class _Share:
    """What one rank has written."""

    files: dict[str, FileRecord]
    digests: dict[str, int]
    private: str
    tensors: dict[tuple[str, str], dict[str, Any]]


class CheckpointWriter:
    """Writes the checkpoints of one stage. Every rank makes one, and calls its methods alike.

    Args:
        folder: for the checkpoints, RUN/<stage>/checkpoints; made here, and cleared of what killed saves left.
        keep: how many of the last ones stay.
        best: the one of the lowest loss stays besides.
        asynchronous: files are written by a thread while training goes on.

    Raises:
        CheckpointError: on every rank: the folder cannot be made or written in.
    """

    def __init__(self, folder: Path, keep: int, best: bool, asynchronous: bool) -> None:
        self._folder, self._keep, self._best, self._asynchronous = folder, keep, best, asynchronous
        # Its own: collectives of the thread and of training must not be taken for each other.
        self._group = _own_group()
        self._memory = HostMemory()
        self._commit = commit()
        self._thread: threading.Thread | None = None
        self._step = 0
        self._copied = threading.Event()
        self._copied.set()
        self._stream, self._ready = _own_stream()
        self._problem: Exception | None = None
        on_rank_0(lambda: _on_disk(lambda: _prepare(folder)), CheckpointError, self._group)

    def save(
        self,
        step: int,
        pieces: Iterable[Piece],
        private: Private,
        record: Mapping[str, Any],
        wait: bool = False,
        unchanging: Iterable[Piece] = (),
    ) -> None:
        """Saves the state as it is now; the caller may change it when this returns, but for what is `unchanging`.

        Waits for the save before it. That the ranks stand at one step, and that the disk has room for all of them, is
        looked at beside training. Collective.

        Args:
            step: optimizer steps done.
            pieces: this rank's share of the state.
            private: what this rank has of its own.
            record: the fields of `Record`.
            wait: return when it is on the disk.
            unchanging: more of its share, which stays as it is until `wait_for_copy` returns; copied beside training.

        Raises:
            CheckpointError: on every rank alike: the save before it was not written, or this one, where it waits.
            RuntimeError: another rank has gone.
        """
        self.finish()
        taken: _Taken | Exception
        try:
            snapshot = take_snapshot(pieces, private, self._memory)
            taken = _Taken(step, snapshot, Record.model_validate(dict(record)), list(unchanging))
            if self._ready is not None:
                self._ready.record()
        except Exception as error:  # the thread tells the other ranks, which wait for this one there
            taken = error
        self._step = step
        self._copied.clear()
        thread = threading.Thread(target=self._run, args=(step, taken), name=f"checkpoint {step}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            self._copied.set()
            raise
        self._thread = thread
        if wait or not self._asynchronous:
            self.finish()

    def wait_for_copy(self) -> None:
        """Returns when what is unchanging in the last save is copied: it may change then."""
        self._copied.wait()

    def finish(self) -> None:
        """Waits for the last save. Collective.

        Raises:
            CheckpointError: on every rank alike: it was not written.
            RuntimeError: another rank has gone.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem

    def check_same(self) -> None:
        """Compares the ranks' last saves; without it one that another rank left out would wait for it. Collective.

        Raises:
            DivergenceError: on every rank alike: they are of different steps.
        """
        check_equal_on_ranks(torch.tensor(self._step, device=local_device()), "the step of the last save")

    def close(self, patience_s: float) -> None:
        """Waits for a save that is under way, at most so long, whatever comes of it: for a run that ends otherwise."""
        if self._thread is not None:
            self._thread.join(patience_s)
        if self._group is not None and (self._thread is None or not self._thread.is_alive()):
            dist.destroy_process_group(self._group)
            self._group = None

    def _finish_copy(self, taken: "_Taken | Exception") -> "_Taken | Exception":
        try:
            if isinstance(taken, Exception):
                return taken
            with self._beside_training():
                whole = replace(taken, snapshot=with_pieces(taken.snapshot, taken.unchanging, self._memory))
            taken.unchanging.clear()  # it may hold copies on the device
            return whole
        except Exception as error:
            return error
        finally:
            self._copied.set()

    @contextlib.contextmanager
    def _beside_training(self) -> Iterator[None]:
        """Inside, copies from a GPU wait for what `save` was called after, and for nothing that comes later."""
        if self._stream is None or self._ready is None:
            yield
            return
        torch.cuda.set_device(self._stream.device)  # a new thread begins with the first one
        self._stream.wait_event(self._ready)
        with torch.cuda.stream(self._stream):
            yield

    def _check_start(self, taken: "_Taken | Exception") -> "_Taken":
        """Looks whether the ranks stand at one step, and whether the disk has room for what all of them hold."""

        def describe() -> tuple[int, int, int]:
            if isinstance(taken, Exception):
                raise taken
            disk = os.statvfs(self._folder)
            return taken.step, taken.snapshot.nbytes, disk.f_bavail * disk.f_frsize

        steps, sizes, free = zip(*together(describe, CheckpointError, self._group), strict=True)
        if len(set(steps)) > 1:
            where = ", ".join(f"rank {steps.index(step)} at {step}" for step in sorted(set(steps)))
            raise CheckpointError(f"{self._folder}: nothing saved, the ranks stand at different steps: {where}")
        needed = sum(sizes) + _SPARE * len(sizes)
        if min(free) < needed:
            raise CheckpointError(
                f"{self._folder}: the checkpoint of step {steps[0]} needs {needed / 1e6:,.1f} MB,"
                f" {min(free) / 1e6:,.1f} MB are free; make room, or choose another output_dir"
            )
        assert isinstance(taken, _Taken)  # else `together` has raised
        return taken

    def _run(self, step: int, found: "_Taken | Exception") -> None:
        """The thread."""
        partial = beside(step_folder(self._folder, step), "partial")

        def fail(words: str) -> CheckpointError:
            return CheckpointError(f"checkpoint of step {step}: {words}")

        written: list[_Share] = []
        try:
            taken = self._check_start(self._finish_copy(found))
            together(lambda: written.append(_on_disk(lambda: _write_share(partial, taken.snapshot))), fail, self._group)
            shares = gather_on_rank_0(written[0], self._group)
            on_rank_0(lambda: _on_disk(lambda: self._complete(step, taken.record, partial, shares)), fail, self._group)
        except CheckpointError as error:  # on every rank: they go on when nothing of it is left
            self._problem = error
            if rank() == 0:  # now: training raises it at the next save only, and may not get there
                print(f"not saved: {error}", flush=True)
            with contextlib.suppress(RuntimeError):  # a peer that has gone since
                on_rank_0(lambda: shutil.rmtree(partial, ignore_errors=True), fail, self._group)
        except Exception as error:  # a peer has gone
            self._problem = error
            if rank() == 0:  # nobody else: rank 0 may have heard of all before that, and be about to rename
                shutil.rmtree(partial, ignore_errors=True)

    def _complete(self, step: int, record: Record, partial: Path, shares: list[_Share]) -> None:
        """Makes a checkpoint of what all ranks have written; on rank 0."""
        files = {name: file for share in shares for name, file in share.files.items()}
        for name, file in files.items():
            if not (partial / name).is_file() or (partial / name).stat().st_size != file.size:
                raise CheckpointError(f"{partial / name}: rank 0 does not see it; all ranks must share the folder")
        manifest = Manifest(
            **record.model_dump(),
            format_version=FORMAT_VERSION,
            note=NOTE,
            step=step,
            world_size=len(shares),
            versions={name: _version(name) for name in _PACKAGES},
            commit=self._commit,
            digests={part: as_hex(value) for part, value in summed(share.digests for share in shares).items()},
            private=[share.private for share in shares],
            files=files,
            tensors=_table(shares),
        )
        try:
            manifest.check_whole()
        except ValueError as error:
            raise CheckpointError(f"the state is not whole: {error}") from error
        write_blocks(partial / MANIFEST_FILE, [dump(manifest)])
        replace_folder(partial, step_folder(self._folder, step))
        write_latest(self._folder, step_folder(self._folder, step).name)
        try:
            purge(self._folder, step, self._keep, self._best)
        except OSError as error:  # this checkpoint is whole
            print(f"checkpoint: old ones could not be removed: {error}", flush=True)


def _own_stream() -> tuple[torch.cuda.Stream | None, torch.cuda.Event | None]:
    if (device := local_device()).type != "cuda":
        return None, None
    return torch.cuda.Stream(device), torch.cuda.Event()  # type: ignore[no-untyped-call]


def _own_group() -> dist.ProcessGroup | None:
    if world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)  # every rank is in it
    return group


def _on_disk(action: Callable[[], _T]) -> _T:
    """Says what to do where the disk refuses.

    Raises:
        CheckpointError: it does.
    """
    try:
        return action()
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}; make room, or choose another output_dir") from error


def _prepare(folder: Path) -> None:
    """Makes the folder, clears it, and looks whether one may write in it."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    clean(folder)
    probe = beside(folder / "probe", "partial")
    try:
        write_blocks(probe, [b"probe"])
        check_ours(probe)  # what cannot be read back later must not be written
    finally:
        probe.unlink(missing_ok=True)


def _write_share(partial: Path, snapshot: Snapshot) -> _Share:
    """Writes this rank's files."""
    partial.mkdir(mode=0o700, exist_ok=True)  # every rank: on a network file system others' folders show late
    tensors = rank_file(rank(), world_size())
    values = tensors.replace(".safetensors", ".json")
    files = {
        tensors: write_tensors(partial / tensors, snapshot.keyed()),
        values: write_blocks(partial / values, [snapshot.values]),
    }
    return _Share(files, digests(snapshot.pieces), snapshot.private, snapshot.table(rank()))


def _table(shares: list[_Share]) -> dict[str, dict[str, dict[str, Any]]]:
    """The tensors that the ranks hold together, as the manifest has them.

    Raises:
        CheckpointError: two ranks describe one tensor differently.
    """
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for share in shares:
        for (part, name), own in share.tensors.items():
            known = table.setdefault(part, {}).setdefault(name, {**own, "pieces": []})
            if {**known, "pieces": own["pieces"]} != own:
                raise CheckpointError(f"{part} {name}: the ranks hold tensors of different dtypes or shapes")
            known["pieces"] += own["pieces"]
    return {part: dict(sorted(found.items())) for part, found in sorted(table.items())}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
