"""Which checkpoint a run goes on from: decided by rank 0, seen by all."""

from pathlib import Path
from typing import Literal

from reid_dist.checkpoint.agreement import on_rank_0, together
from reid_dist.checkpoint.manifest import MANIFEST_FILE
from reid_dist.checkpoint.reader import open_checkpoint
from reid_dist.checkpoint.retention import LATEST_FILE, clean, saved_steps
from reid_dist.distributed import rank
from reid_dist.errors import UserError

Resume = Literal["auto", "must", "never"]


def choose(folder: Path, resume: Resume | Path, fallback: bool = False) -> Path | None:
    """The checkpoint to go on from; None to begin anew. Collective.

    Files are verified when it is opened; only a fallback looks through them here.

    Args:
        folder: of the stage's checkpoints; what killed saves have left in it is removed.
        resume: `auto`: the latest, if there is one; `must`: there has to be one; `never`: begin anew; or the folder of
            a step, or one with steps in it.
        fallback: of damaged checkpoints the newest good one is taken instead; rank 0 prints which, and why.

    Raises:
        UserError: with the same words on every rank: there is none where there must be, or `latest` names none.
    """
    if resume == "never":
        return None
    if isinstance(resume, str):
        chosen = on_rank_0(lambda: _choose_own(folder, resume == "must", fallback))
    else:
        chosen = on_rank_0(lambda: latest_checkpoint(resume, True, fallback))
    if chosen is not None and fallback:
        chosen = _newest_good(chosen)
    if chosen is not None:
        found = chosen
        together(lambda: _see(found))
    return chosen


def latest_checkpoint(folder: Path, must: bool = False, fallback: bool = False) -> Path | None:
    """The checkpoint that a run would go on from, its files unseen; None where there is none.

    Args:
        folder: of a stage's checkpoints, or of one.
        must: refuse where there is none.
        fallback: where `latest` names none take the last.

    Raises:
        UserError: there is none, or `latest` names none.
    """
    if (folder / MANIFEST_FILE).is_file():
        return folder
    saved = saved_steps(folder)
    latest = folder / LATEST_FILE
    if not latest.is_file():
        if not saved and must:
            raise UserError(f"{folder}: no checkpoint there; leave out --resume to begin anew")
        return list(saved.values())[-1] if saved else None
    name = latest.read_bytes().decode(errors="replace").strip()
    if name in {path.name for path in saved.values()}:
        return folder / name
    if fallback and saved:
        return list(saved.values())[-1]
    raise UserError(f"{latest}: {_wrong(folder, name)}; {_ways_out(saved)}")


def _choose_own(folder: Path, must: bool, fallback: bool) -> Path | None:
    if folder.is_dir():  # not another's: a run may be saving there
        clean(folder)
    return latest_checkpoint(folder, must, fallback)


def _wrong(folder: Path, name: str) -> str:
    if not name:
        return "empty"
    return f"names {name[:80]!r}, which {'has no manifest' if (folder / name).is_dir() else 'is not there'}"


def _ways_out(saved: dict[int, Path]) -> str:
    if not saved:
        return "no other checkpoint is there; restore it, or remove the folder to begin anew"
    return "restore it, or give --fallback to go on from the newest good checkpoint"


def _see(path: Path) -> None:
    if not (path / MANIFEST_FILE).is_file():
        raise UserError(f"{path}: rank {rank()} does not see it; all ranks must share the folder")


def _newest_good(first: Path) -> Path:
    """The first choice, or where that is damaged the newest other checkpoint that is not. Collective."""
    others = on_rank_0(lambda: [path for path in reversed(saved_steps(first.parent).values()) if path != first])
    problems: list[str] = []
    for path in [first, *others]:
        try:
            open_checkpoint(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if problems and rank() == 0:
            print(f"checkpoint: goes on from {path}, because {'; '.join(problems)}", flush=True)
        return path
    raise UserError(f"{first.parent}: no good checkpoint left; {problems[0]}")
