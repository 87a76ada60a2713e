"""Hostile and broken input for all readers: nothing runs, nothing is lost without a word, messages say what to do."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reid_dist.data.loader import Sampling, TrainLoader
from reid_dist.data.reader import ShardSet
from reid_dist.data.stream.loader import StreamLoader, StreamSampling
from reid_dist.data.stream.samples import StreamSamples
from reid_dist.data.stream.source import StreamSource
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.data.training_samples import TrainingSamples
from reid_dist.errors import UserError
from shards.verify import main as verify_main
from tests.hostile_tars import BAD_SAMPLES, BAD_TARS, BLOCK, KEY, Bad, Ours, bad_tar, join, jpeg, pairs, write_ours

SIZE = (8, 4)
TOKENIZER = WordTokenizer(["picture", "caption"], 8, 16)


def index_loader(folder: Path, batch: int, workers: int = 0, fraction: float = 0.0) -> TrainLoader:
    samples = TrainingSamples([ShardSet(folder)], SIZE, TOKENIZER)
    return TrainLoader(samples, Sampling(batch), workers=workers, max_bad_fraction=fraction)


def stream_loader(location: Path | str, batch: int, workers: int = 0, fraction: float = 0.0) -> StreamLoader:
    samples = StreamSamples([StreamSource(location)], SIZE, TOKENIZER)
    return StreamLoader(samples, StreamSampling(batch, shuffle_buffer=4), workers=workers, max_bad_fraction=fraction)


LOADERS: dict[str, Callable[..., TrainLoader | StreamLoader]] = {"index": index_loader, "stream": stream_loader}


def refused(call: Callable[[], Any], *names: str) -> str:
    """The one line of the UserError that a call must end with."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    for name in names:
        assert name in line, (name, line)
    assert "\n" not in line and "; " in line and len(line) < 2000
    return line


def drain(loader: TrainLoader | StreamLoader, steps: int = 2) -> list[int]:
    return [int(each) for step in loader.steps(0, steps) for batch in step for each in batch["sample_id_B"]]


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("bad", BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_bad_samples(kind: str, bad: Ours, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_ours(tmp_path / "tiny", bad)
    names = ["tiny-000000.tar", "sample s002"]
    if bad in (BAD_SAMPLES["21 MB image"], BAD_SAMPLES["record of 1 MB"]):
        # Seen in the index, before a sample is read.
        names = ["index.npy", "above the cap"]
        refused(lambda: drain(LOADERS[kind](folder, 3)), *names)
    else:
        refused(lambda: drain(LOADERS[kind](folder, 3)), *names)
        refused(lambda: drain(LOADERS[kind](folder, 3, workers=1)), *names)
        loader = LOADERS[kind](folder, 5, fraction=0.5)
        ids = drain(loader, 4)
        assert len(ids) == 20 and loader.bad_samples.count >= 3 and set(ids) == {0, 1, 3, 4, 5}
        assert all("sample s002" in line for line in loader.bad_samples.messages)
    assert verify_main([str(folder), "--vocabulary", "/dev/null"]) == 1
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("where", ["image", "record"])
def test_a_flipped_bit(kind: str, where: str, tmp_path: Path) -> None:
    folder = write_ours(tmp_path / "tiny")
    (path,) = folder.glob("*.tar")
    tar, image = bytearray(path.read_bytes()), jpeg(2)
    start = tar.index(image)
    place = start + len(image) * 3 // 4 if where == "image" else tar.index(b"picture 2")
    tar[place] ^= 1
    path.write_bytes(tar)
    refused(lambda: drain(LOADERS[kind](folder, 3)), "tiny-000000.tar", "sample s002")
    shards = ShardSet(folder)
    refused(lambda: shards.image_bytes(2) if where == "image" else shards.sample(2), "tiny-000000.tar, sample s002")
    loader = LOADERS[kind](folder, 5, fraction=0.5)
    assert set(drain(loader, 4)) == {0, 1, 3, 4, 5} and loader.bad_samples.count >= 3


@pytest.mark.parametrize("bad", BAD_TARS.values(), ids=BAD_TARS)
def test_the_stream_refuses_bad_tars(bad: Bad, tmp_path: Path) -> None:
    folder, mark = tmp_path / "pairs", tmp_path / "executed"
    folder.mkdir()
    (folder / "00000.tar").write_bytes(bad_tar(bad, mark))
    for workers in (0, 1) if bad is BAD_TARS["pickle"] else (0,):
        refused(lambda: drain(stream_loader(folder, 3, workers=workers)), "00000.tar", bad.names)  # noqa: B023
    assert not mark.exists()


def test_the_stream_skips_bad_samples_on_request(tmp_path: Path) -> None:
    """Never a broken tar: nobody knows how much is behind the break."""
    for number, (name, bad) in enumerate(BAD_TARS.items()):
        folder, mark = tmp_path / str(number), tmp_path / "executed"
        folder.mkdir()
        (folder / "00000.tar").write_bytes(bad_tar(bad, mark))
        loader = stream_loader(folder, 4, fraction=0.9)
        if bad.whole is not None:
            refused(lambda: drain(loader, 4), "00000.tar")  # noqa: B023
            continue
        assert len(drain(loader, 2)) == 8 and loader.bad_samples.count, name
        assert all("00000.tar, sample " in line for line in loader.bad_samples.messages), loader.bad_samples.messages
        assert any(KEY in line for line in loader.bad_samples.messages), loader.bad_samples.messages
        assert not mark.exists()


def _tie(folder: Path, index: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, index)
    (folder / "index.npy").write_bytes(buffer.getvalue())
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["shards"]:
        data = (folder / shard["name"]).read_bytes()
        shard.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest["index_sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("pid", [3, 2**31 - 1, -1, -(2**31)])
def test_an_identity_out_of_range(pid: int, tmp_path: Path) -> None:
    folder = write_ours(tmp_path / "tiny")
    index = np.load(folder / "index.npy")
    index["pid"][2] = pid
    _tie(folder, index)
    line = "index.npy: does not fit manifest.json (a row names an identity that is not listed)"
    for open_it in (ShardSet, StreamSource):
        refused(lambda: open_it(folder), line)  # noqa: B023
    assert verify_main([str(folder), "--vocabulary", "/dev/null"]) == 1


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_truncated_tar_of_a_set(kind: str, tied: bool, tmp_path: Path) -> None:
    folder = write_ours(tmp_path / "tiny")
    (path,) = folder.glob("*.tar")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"s004.jpg") + BLOCK + 100])
    if tied:
        _tie(folder, np.load(folder / "index.npy"))
    # By the manifest, or by the index, the tar is too short: the set does not open.
    refused(lambda: drain(LOADERS[kind](folder, 3)), "tiny-000000.tar" if not tied else "index.npy")


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("compress", ["gzip", "bzip2", "xz"])
def test_a_compressed_tar_of_a_set(kind: str, compress: str, tmp_path: Path) -> None:
    folder = write_ours(tmp_path / "tiny")
    (path,) = folder.glob("*.tar")
    whole = BAD_TARS[compress].whole
    assert whole is not None
    # Of the size that the manifest says.
    path.write_bytes(whole(path.read_bytes())[: path.stat().st_size].ljust(path.stat().st_size, b"\0"))
    refused(lambda: drain(LOADERS[kind](folder, 3)), "tiny-000000.tar")


def test_members_out_of_order_in_a_set(tmp_path: Path) -> None:
    """By index everything is found where it is; the stream and `verify` need the order."""
    folder = write_ours(tmp_path / "tiny")
    (path,) = folder.glob("*.tar")
    tar, index = path.read_bytes(), np.load(folder / "index.npy")
    # Image, record, image, record of samples 1 and 2 become image, image, record, record.
    a, b, c, d = (tar.index(name) for name in (b"s001.json", b"s002.jpg", b"s002.json", b"s003.jpg"))
    path.write_bytes(tar[:a] + tar[b:c] + tar[a:b] + tar[c:d] + tar[d:])
    index["json_offset"][1] += c - b
    index["image_offset"][2] -= b - a
    _tie(folder, index)
    assert sorted(drain(index_loader(folder, 6), 1)) == list(range(6))
    line = refused(lambda: drain(stream_loader(folder, 6), 1), "tiny-000000.tar, sample s00")
    assert "half a sample" in line or "adjacent" in line
    assert verify_main([str(folder), "--vocabulary", "/dev/null"]) == 1


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_mid_epoch(kind: str, workers: int, tmp_path: Path) -> None:
    folder = write_ours(tmp_path / "tiny", count=40, per_tar=10)
    loader = LOADERS[kind](folder, 2, workers=workers)
    steps = loader.steps(0, 20)
    seen = [int(each) for each in next(steps)[0]["pid_B"]]
    for path in sorted(folder.glob("*.tar"))[1:]:
        path.unlink()

    def rest() -> None:
        for step in steps:
            seen.extend(int(each) for each in step[0]["pid_B"])

    try:
        line = refused(rest, "tiny-00000", ".tar")
    except pytest.fail.Exception:
        # A worker may have opened all of them before; then nothing is missing.
        assert workers and len(seen) == 40
    else:
        assert "No such file" in line or "cannot be" in line or "missing" in line


def test_fewer_shards_than_workers(tmp_path: Path) -> None:
    folder = write_ours(tmp_path / "tiny", count=12, per_tar=6)
    # By index it does not matter how samples are spread over tars.
    assert sorted(drain(index_loader(folder, 4, workers=3), 3)) == list(range(12))
    line = refused(lambda: stream_loader(folder, 4, workers=3))
    assert "2 tars" in line and "3" in line
    samples = StreamSamples([StreamSource(folder)], SIZE, TOKENIZER)
    line = refused(lambda: StreamLoader(samples, StreamSampling(4), rank=1, world_size=4, workers=1))
    assert "2 tars" in line and "4" in line


@pytest.mark.parametrize("location", ["pipe:touch executed", "pipe:touch executed;.tar", "ftp://h/x.tar", "file://h/x"])
def test_other_schemes(location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: ShardSet(location), location.partition(":")[0])
    refused(lambda: StreamSource(location), location.partition(":")[0])
    # As the place of a tar, in a manifest that came from elsewhere.
    folder = write_ours(tmp_path / "tiny")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["location"] = location
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(lambda: ShardSet(folder), location.partition(":")[0])
    refused(lambda: StreamSource(folder), location.partition(":")[0])
    assert verify_main([str(folder), "--vocabulary", "/dev/null"]) == 1
    (tmp_path / "list.txt").write_text(location)
    refused(lambda: StreamSource(str(tmp_path / "list.txt")))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a/b.tar", "x.tar.gz", ".hidden.tar", "x\0.tar", ""])
def test_shard_names_that_leave_the_folder(name: str, tmp_path: Path) -> None:
    folder = write_ours(tmp_path / "tiny")
    (tmp_path / "x.tar").write_bytes(join(pairs(1)))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(lambda: ShardSet(folder), "manifest.json: not a valid manifest (shards.0.name")
    assert verify_main([str(folder), "--vocabulary", "/dev/null"]) == 1
