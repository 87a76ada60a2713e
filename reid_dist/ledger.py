"""What a rank trained on, step by step: the proof that a run that was killed and resumed saw each sample as planned."""

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from reid_dist.distributed import rank, world_size
from reid_dist.stages.contract import Batch


class Ledger:
    """Appends one JSON line for each optimizer step to `folder/rank-00000.jsonl`; every rank its own file.

    A line of its own says where a run began or went on, `{"start": step, "world_size": W}`: lines of that step and
    later ones that stand before it are of steps that were lost, and made again. Each line is in the file before the
    next step begins; only a power cut can lose some.

    Args:
        folder: made when missing.
        start: steps done before this run.
    """

    def __init__(self, folder: Path, start: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{rank():05d}.jsonl"
        began = {"start": start, "world_size": world_size()}
        # Also in the files of ranks that are there no longer.
        for old in sorted(folder.glob("rank-*.jsonl"))[rank() :: world_size()]:
            if old != path and int(old.stem.removeprefix("rank-")) >= world_size():
                _end_last_line(old)
                with old.open("a") as file:
                    file.write(json.dumps(began) + "\n")
        _end_last_line(path)
        self._file = path.open("a", buffering=1)
        self._write(began)

    def add(self, step: int, micro_batches: Sequence[Batch], losses: Sequence[Tensor], updated: bool) -> None:
        """Writes a step (0-based): its samples, a CRC of their images' bytes, its losses, and whether it counted."""
        line = {
            "step": step,
            "samples": [batch["sample_id_B"].tolist() for batch in micro_batches],
            "crc32": [_crc32(batch["image_BCHW"]) for batch in micro_batches],
            "losses": [float(loss).hex() for loss in losses],
            "updated": updated,
        }
        self._write(line)

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


def read_ledger(path: Path) -> Iterator[dict[str, Any]]:
    """The steps of one rank that count, in order: of a step that was made again the last line.

    A last line that a kill has cut is of a step that was made again, or of none.
    """
    steps: dict[int, dict[str, Any]] = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "start" in line:
            steps = {step: kept for step, kept in steps.items() if step < line["start"]}
        else:
            steps[line["step"]] = line
    yield from (steps[step] for step in sorted(steps))


def _end_last_line(path: Path) -> None:
    if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")


def _crc32(image_BCHW: Tensor) -> int:
    return zlib.crc32(image_BCHW.cpu().contiguous().numpy().data)
