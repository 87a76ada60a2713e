"""Writing a whole tree: parallel, deterministic, and complete or absent."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from reid_dist.errors import UserError
from shards.workers import Progress, run_jobs
from shards.world.formats import EXPORTERS
from shards.world.formats.base import Record
from shards.world.spec import ExportSpec

WORLD_FILE = "world.json"
WORLD_VERSION = 1
_CHUNK = 16
_Job = tuple[ExportSpec, Path, list[tuple[Any, ...]]]


def _work(job: _Job) -> list[Record]:
    spec, root, units = job
    write = EXPORTERS[spec.format].write
    return [record for unit in units for record in write(spec, root, unit)]


def _work_numbered(job: tuple[int, _Job], _progress: Progress) -> tuple[int, list[Record]]:
    return job[0], _work(job[1])


def _records(jobs: list[_Job], workers: int) -> Generator[list[Record], None, None]:
    """Yield the records of every job in order, whatever the number of workers."""
    early: dict[int, list[Record]] = {}
    following = 0
    with closing(run_jobs(_work_numbered, enumerate(jobs), min(workers, len(jobs)), lambda _: None)) as results:
        for number, records in results:
            early[number] = records
            while following in early:
                yield early.pop(following)
                following += 1


def _remove_leftovers(out: Path) -> None:
    """Remove partial trees of exports that were killed."""
    for partial in out.parent.glob(f".{out.name}.partial-*"):
        owner = partial.name.rsplit("-", 1)[-1]
        if not owner.isdigit() or not Path(f"/proc/{owner}").exists():
            shutil.rmtree(partial, ignore_errors=True)


def _up_to_date(spec: ExportSpec, out: Path) -> bool:
    """Return whether `out` already holds this export; refuse when it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    stored = out / WORLD_FILE
    if not stored.is_file():
        raise UserError(f"--out {out}: exists and holds no {WORLD_FILE}; name a new or an empty folder")
    try:
        found = json.loads(stored.read_text(encoding="utf-8"))
        parameters, version = found["parameters"], found["version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--out {out}: its {WORLD_FILE} cannot be read; remove the folder or name another") from None
    if parameters == spec.parameters() and version == WORLD_VERSION:
        return True
    wanted = spec.parameters()
    names = [name for name in wanted if parameters.get(name) != wanted[name]] or ["version"]
    raise UserError(
        f"--out {out}: holds an export with other parameters ({', '.join(names)}); remove it or name another folder"
    )


def write_whole(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def export(spec: ExportSpec, out: Path, workers: int = 1, say: Callable[[str], None] = print) -> bool:
    """Write a tree, or keep the one that is there.

    Args:
        spec: What to write.
        out: Folder of the tree; it appears complete or not at all.
        workers: Processes.
        say: Where lines go.

    Returns:
        True if something was written, False if the tree was up to date.

    Raises:
        UserError: `out` holds something else.
        OSError: the disk is full, or a worker was killed.
    """
    if _up_to_date(spec, out):
        say(f"{out}: up to date")
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    exporter = EXPORTERS[spec.format]
    try:
        partial.mkdir()
        units = exporter.units(spec)
        jobs = [(spec, partial, units[start : start + _CHUNK]) for start in range(0, len(units), _CHUNK)]
        with closing(_records(jobs, workers)) as parts:
            bar = tqdm(parts, total=len(jobs), desc=spec.format, disable=not sys.stderr.isatty())
            records = [record for part in bar for record in part]
        extra = exporter.finish(spec, partial, records)
        world = {"version": WORLD_VERSION, "parameters": spec.parameters(), **extra}
        write_whole(partial / WORLD_FILE, json.dumps(world, separators=(",", ":"), sort_keys=True))
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"{out}: {spec.format}, {len(records)} images")
    return True
