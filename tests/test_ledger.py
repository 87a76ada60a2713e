"""What a rank trained on: lines of steps that were lost and made again do not count, on any number of ranks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from reid_dist import ledger as module
from reid_dist.ledger import Ledger, read_ledger


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch):
    def be(rank: int, world_size: int) -> None:
        monkeypatch.setattr(module, "rank", lambda: rank)
        monkeypatch.setattr(module, "world_size", lambda: world_size)

    return be


def batch(step: int) -> dict[str, Tensor]:
    image = torch.full((2, 3, 4, 2), step, dtype=torch.uint8)
    return {"image_BCHW": image, "sample_id_B": torch.tensor([step, step + 100])}


def write(folder: Path, start: int, stop: int, loss: float = 0.1) -> None:
    ledger = Ledger(folder, start)
    for step in range(start, stop):
        ledger.add(step, [batch(step)], [torch.tensor(loss + step)], True)
    ledger.close()


def steps(folder: Path, rank: int = 0) -> list[int]:
    return [line["step"] for line in read_ledger(folder / f"rank-{rank:05d}.jsonl")]


def test_a_line_says_what_and_how(tmp_path: Path) -> None:
    write(tmp_path, 3, 4, 1 / 3)
    (line,) = read_ledger(tmp_path / "rank-00000.jsonl")
    assert line["samples"] == [[3, 103]] and line["updated"]
    assert float.fromhex(line["losses"][0]) == float(torch.tensor(1 / 3 + 3))
    other = tmp_path / "other"
    changed = batch(3)
    changed["image_BCHW"][1, 2, 3, 1] += 1
    ledger = Ledger(other, 3)
    ledger.add(3, [changed], [torch.tensor(0.0)], False)
    ledger.close()
    (found,) = read_ledger(other / "rank-00000.jsonl")
    assert found["crc32"] != line["crc32"] and not found["updated"]


def test_steps_that_are_made_again_replace_those_that_were_lost(tmp_path: Path) -> None:
    write(tmp_path, 0, 7, 0.5)
    write(tmp_path, 4, 6)  # killed after step 6, saved after step 3, and then killed again
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert float.fromhex(list(read_ledger(tmp_path / "rank-00000.jsonl"))[4]["losses"][0]) == pytest.approx(4.1)


@pytest.mark.parametrize("cut", [2, 5, 40])
def test_a_line_that_a_kill_has_cut_is_no_step(cut: int, tmp_path: Path) -> None:
    write(tmp_path, 0, 3)
    path = tmp_path / "rank-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps(tmp_path) == [0, 1]
    write(tmp_path, 2, 4)
    assert steps(tmp_path) == [0, 1, 2, 3]


def test_ranks_that_are_there_no_longer_lose_their_lost_steps_too(tmp_path: Path, world) -> None:
    for rank in range(3):
        world(rank, 3)
        write(tmp_path, 0, 6)
    world(0, 1)
    write(tmp_path, 4, 8)
    assert steps(tmp_path) == list(range(8))
    assert steps(tmp_path, 1) == steps(tmp_path, 2) == [0, 1, 2, 3]
