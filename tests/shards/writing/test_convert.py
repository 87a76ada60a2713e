"""One shard: images of a group are read together, and nothing of it shows in the tar."""

import io
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reid_dist.data.exclude import NOTHING
from reid_dist.errors import UserError
from shards.raw import RawSample
from shards.writing.convert import Rules, ShardJob, write_shard
from shards.writing.files import file_sha256
from shards.writing.plan import plan_shards


@dataclass(frozen=True)
class _Image:
    """An image that notes when it is read."""

    number: int
    group: str
    log: Path
    size: int = 1_000

    @property
    def name(self) -> str:
        return f"file.parquet row {self.number}"

    def read(self) -> bytes:
        with self.log.open("a") as file:
            file.write(f"{self.number}\n")
        if self.number == 13:
            raise UserError(f"{self.name}: is damaged")
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 4 + self.number, 3), self.number * 4, dtype=np.uint8)).save(buffer, "JPEG")
        return buffer.getvalue()


def _write(folder: Path, grouped: bool, skip_bad: bool = True) -> tuple[list[int], list[str]]:
    """Numbers in the order of reading, and names in the order of the tar."""
    (folder / "partial").mkdir(parents=True)
    log = folder / "log"
    samples = []
    for number in range(40):
        image = _Image(number, f"g{number // 10}" if grouped else "", log)
        samples.append(RawSample(image, str(number), 0, "train", "train", ("a",), f"{number:03d}.jpg"))
    # The plan of groups differs from that without: order as if there were none.
    plain = [RawSample(_Image(each.image.number, "", log), *_rest(each)) for each in samples]
    plan = plan_shards(plain, "x", NOTHING, "shuffled", 0, 10**9)
    order = [int(entry.key) for entry in plan.entries_of(0)]
    by_key = {entry.key: entry for entry in plan_shards(samples, "x", NOTHING, "shuffled", 0, 10**9).entries}
    entries = [by_key[f"{number:03d}"] for number in order]
    done: list[int] = []
    job = ShardJob(Rules(folder, "x", frozenset(), skip_bad), "x-000000.tar", entries)
    part = write_shard(job, done.append)
    assert sum(done) == 40 and part.file.samples == 39 and part.skipped == ["013.jpg: is damaged"]
    with tarfile.open(folder / "x-000000.tar") as tar:
        return [int(line) for line in log.read_text().split()], tar.getnames()


def _rest(sample: RawSample) -> tuple[object, ...]:
    return (sample.pid, sample.camid, sample.split, sample.role, sample.captions, sample.source)


def test_groups_are_read_in_order_and_written_in_the_plan_s(tmp_path: Path) -> None:
    read, names = _write(tmp_path / "grouped", grouped=True)
    assert read == list(range(40))
    read_alone, names_alone = _write(tmp_path / "alone", grouped=False)
    assert read_alone != sorted(read_alone) and names == names_alone
    assert file_sha256(tmp_path / "grouped/x-000000.tar") == file_sha256(tmp_path / "alone/x-000000.tar")


@pytest.mark.parametrize("grouped", [True, False])
def test_an_error_leaves_no_file(grouped: bool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 13: is damaged"):
        _write(tmp_path / "a", grouped, skip_bad=False)
    assert sorted(os.listdir(tmp_path / "a")) == ["log", "partial"] and not os.listdir(tmp_path / "a" / "partial")
