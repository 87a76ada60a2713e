"""The loader of streams: what its batches hold, passes, exact resume, bad samples, and broken tars."""

import copy
import json
import pickle
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import webdataset

from reid_dist.data.batch_memory import BatchMemory
from reid_dist.data.exclude import Exclusions
from reid_dist.data.stream.loader import StreamLoader, StreamSampling, _Task, _Worker
from reid_dist.data.stream.position import merge_positions, resume_position
from reid_dist.data.stream.samples import StreamSamples
from reid_dist.data.stream.source import StreamSource
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.data.training_samples import Batch
from reid_dist.data.transforms import Augment, decode_image
from reid_dist.errors import UserError
from shards.index import main as index_main
from tests.data.stream_files import write_set, write_tars
from tests.hostile_tars import jpeg

TOKENIZER = WordTokenizer(["picture", "caption", *map(str, range(300))], 8, 512)
SIZE = (16, 8)

# More workers than this machine has cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def _samples(*folders: Path | str, augment: Augment | None = None, **settings: Any) -> StreamSamples:
    return StreamSamples([StreamSource(folder) for folder in folders], SIZE, TOKENIZER, augment, **settings)


def _join(batches: list[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)


def _ids(steps: Iterator[list[Batch]]) -> list[int]:
    return [each for step in steps for batch in step for each in batch["sample_id_B"].tolist()]


@pytest.mark.parametrize("ours", [True, False])
def test_what_a_batch_holds(tmp_path: Path, ours: bool) -> None:
    folder = (write_set if ours else write_tars)(tmp_path / "one", [5, 4])
    loader = StreamLoader(_samples(folder), StreamSampling(9, shuffle_buffer=4))
    ((batch,),) = loader.steps(0, 1)
    assert loader.num_samples == (9 if ours else None) and loader.num_tars == 2
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        "image_BCHW": ((9, 3, 16, 8), torch.uint8),
        "token_BL": ((9, 8), torch.int64),
        "pid_B": ((9,), torch.int64),
        "camid_B": ((9,), torch.int64),
        "sample_id_B": ((9,), torch.int64),
    }
    assert batch["camid_B"].tolist() == [-1] * 9
    assert sorted(batch["sample_id_B"].tolist()) == [*range(5), *((1 << 32) + n for n in range(4))]
    assert torch.equal(batch["pid_B"], batch["sample_id_B"])
    for row, sample in enumerate(batch["sample_id_B"].tolist()):
        number = (sample >> 32) * 5 + (sample & 0xFFFFFFFF)
        expected = decode_image(jpeg(number), SIZE, "image").transpose(2, 0, 1)
        assert np.array_equal(batch["image_BCHW"][row].numpy(), expected)
        caption = f"picture {number}" + (" caption 0" if ours else "")
        assert torch.equal(batch["token_BL"][row], TOKENIZER([caption])[0])


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 0), (4, 0), (1, 3), (2, 2), (4, 1)])
def test_passes_are_exact_over_ranks_and_workers(tmp_path: Path, world_size: int, workers: int) -> None:
    folder = write_set(tmp_path / "one", [6] * 12)
    samples = _samples(folder)
    # Equal tars and as many of them for everyone: a pass ends at the same step for all.
    sampling = StreamSampling(6 * world_size, shuffle_buffer=7)
    loaders = [StreamLoader(samples, sampling, rank, world_size, workers) for rank in range(world_size)]
    steps = 12 // world_size
    everything = Counter((tar << 32) + n for tar in range(12) for n in range(6))
    for first in (0, steps):
        found = Counter(each for loader in loaders for each in _ids(loader.steps(first, first + steps)))
        assert found == everything
    assert loaders[0].passes(2 * steps) == [2.0]


def test_workers_and_ranks_do_not_change_what_a_sample_looks_like(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "one", [6] * 6, captions=3)
    augment = Augment(flip=0.5, pad=2, erase=0.5, jitter=0.2)

    def looks(world_size: int, workers: int) -> dict[int, list[Any]]:
        found = {}
        for rank in range(world_size):
            sampling = StreamSampling(6 * world_size, shuffle_buffer=5)
            loader = StreamLoader(_samples(folder, augment=augment), sampling, rank, world_size, workers)
            for (batch,) in loader.steps(0, 6 // world_size):
                for row, sample in enumerate(batch["sample_id_B"].tolist()):
                    found[sample] = [batch["image_BCHW"][row].tolist(), batch["token_BL"][row].tolist()]
        return found

    alone = looks(1, 0)
    assert len(alone) == 36
    assert looks(2, 0) == alone and looks(1, 2) == alone


def test_workers_leave_the_random_state_alone(tmp_path: Path) -> None:
    samples = _samples(write_set(tmp_path / "one", [4] * 4))
    state = torch.get_rng_state()
    first = [_join(step) for step in StreamLoader(samples, StreamSampling(4, 2), workers=2).steps(0, 3)]
    assert torch.equal(torch.get_rng_state(), state)
    np.random.seed(5)
    torch.manual_seed(5)
    again = [_join(step) for step in StreamLoader(samples, StreamSampling(4, 2), workers=2).steps(0, 3)]
    assert _equal(first, again)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resampled", [False, True])
def test_resume_is_exact_at_every_step(tmp_path: Path, workers: int, resampled: bool) -> None:
    folders = [write_set(tmp_path / "one", [7, 3, 5, 6]), write_tars(tmp_path / "two", [4, 9, 2])]
    samples = _samples(*folders, augment=Augment(pad=2, erase=0.5))
    sampling = StreamSampling(4, 2, seed=3, shuffle_buffer=6, resampled=resampled, weights=(2, 1))
    loader = StreamLoader(samples, sampling, workers=workers)
    steps, positions = [], [loader.position()]
    for step in loader.steps(0, 16):  # four passes over the small source
        steps.append({name: value.clone() for name, value in _join(step).items()})
        positions.append(json.loads(json.dumps(loader.position())))
    for start in range(0, 16, 1 if not workers else 5):
        resumed = StreamLoader(samples, sampling, workers=workers, position=copy.deepcopy(positions[start]))
        assert _equal(steps[start : start + 4], [_join(step) for step in resumed.steps(start, min(16, start + 4))])
        assert resumed.position() == positions[min(16, start + 4)]


def test_a_loop_that_is_left_goes_on_where_it_was(tmp_path: Path) -> None:
    samples = _samples(write_set(tmp_path / "one", [7, 3, 5]))
    straight = [_join(step) for step in StreamLoader(samples, StreamSampling(2)).steps(0, 8)]
    loader, found = StreamLoader(samples, StreamSampling(2), workers=1), []
    for start in (0, 3, 6):
        for step, batches in zip(range(start, 8), loader.steps(start, 8), strict=False):
            found.append({name: value.clone() for name, value in _join(batches).items()})
            if step == start + 2:
                break
    assert _equal(found, straight)
    with pytest.raises(UserError, match="the stream stands at step 8 and cannot start at 3"):
        next(loader.steps(3, 5))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("workers", [(0, 0), (2, 1)])
def test_elastic_resume_loses_nothing(tmp_path: Path, before: int, after: int, workers: tuple[int, int]) -> None:
    samples = _samples(write_set(tmp_path / "one", [5, 8, 3, 6, 7, 4]))
    batch = 6
    loaders = [
        StreamLoader(samples, StreamSampling(batch, shuffle_buffer=4), rank, before, workers[0])
        for rank in range(before)
    ]
    found = Counter(each for loader in loaders for each in _ids(loader.steps(0, 3)))
    positions = [loader.position() for loader in loaders]
    merged, repeats = merge_positions(positions)
    assert all(stream[0]["number"] == 0 for each in positions for stream in each["streams"])
    assert repeats > 0
    for rank in range(after):
        position, told = resume_position(positions, rank, after, workers[1])
        assert (position, told) == (merged, repeats)
        loader = StreamLoader(
            samples, StreamSampling(after, shuffle_buffer=4), rank, after, workers[1], position=position
        )
        left = sum(loader._lanes[0][tar].tar.samples or 0 for tar in loader.position()["streams"][0][0]["share"])
        assert loader.position()["step"] == 3
        found += Counter(_ids(loader.steps(3, 3 + left)))
    assert set(found) == {(tar << 32) + n for tar, count in enumerate([5, 8, 3, 6, 7, 4]) for n in range(count)}
    assert sum(found.values()) - len(found) == repeats


def test_fewer_tars_than_streams_are_refused_with_the_numbers(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "one", [4] * 5)
    samples = _samples(folder)
    with pytest.raises(UserError) as caught:
        StreamLoader(samples, StreamSampling(12), 0, 2, 3)
    assert str(caught.value) == (
        f"{folder}: 5 tars, but 2 ranks x 3 workers = 6 streams need one each; write more, smaller tars (--shard-mb), "
        f"use at most 2 workers (data.workers), or set data.stream.resampled"
    )
    with pytest.raises(UserError, match=r"5 tars, but 6 ranks .* \(--shard-mb\), or set data.stream.resampled"):
        StreamLoader(samples, StreamSampling(12), 0, 6)
    loader = StreamLoader(samples, StreamSampling(12, resampled=True), 5, 6, 2)
    assert len(_ids(loader.steps(0, 30))) == 60


def test_wrong_settings(tmp_path: Path) -> None:
    samples = _samples(write_set(tmp_path / "one", [4] * 5))
    for weights in ((1.0, 2.0), (0.0,), (float("inf"),)):
        with pytest.raises(UserError, match=r"data.weights: .* for 1 sources"):
            StreamLoader(samples, StreamSampling(4, weights=weights))
    with pytest.raises(UserError, match="shuffle_buffer: 0; it holds at least 1"):
        StreamLoader(samples, StreamSampling(4, shuffle_buffer=0))
    with pytest.raises(UserError, match="world size 3; nearest that work: 3 or 6"):
        StreamLoader(samples, StreamSampling(4), 0, 3)
    with pytest.raises(UserError, match="nothing to stream"):
        StreamSamples([], SIZE)
    write_set(tmp_path / "market", [3, 2], captions=0)
    with pytest.raises(UserError, match="market: 5 of 5 training samples have no caption; this stage needs captions"):
        _samples(tmp_path / "market")
    images_only = StreamSamples([StreamSource(tmp_path / "market")], SIZE)
    ((batch,),) = StreamLoader(images_only, StreamSampling(5)).steps(0, 1)
    assert batch["token_BL"].tolist() == [[0]] * 5
    with pytest.raises(UserError, match="pad 8 is not smaller"):
        _samples(tmp_path / "one", augment=Augment(pad=8))


def test_words_are_masked_by_sample(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "one", [6] * 2)

    def masks(buffer: int) -> dict[int, list[int]]:
        sampling = StreamSampling(6, shuffle_buffer=buffer)
        batch = _join(
            [batch for (batch,) in StreamLoader(_samples(folder, mask_probability=0.5), sampling).steps(0, 2)]
        )
        asked = batch["masked_label_BL"] != -100
        assert asked.any(1).all() and torch.equal(batch["token_BL"][asked], batch["masked_label_BL"][asked])
        assert torch.equal(batch["token_BL"][~asked], batch["masked_token_BL"][~asked])
        return dict(zip(batch["sample_id_B"].tolist(), batch["masked_token_BL"].tolist(), strict=True))

    assert masks(1) == masks(5)


def test_plain_webdataset_reads_the_same_set(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "one", [4, 3])
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    theirs = {sample["__key__"]: sample["jpg"] for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert theirs == {f"s{n:06d}": jpeg(n) for n in range(7)}
    # By their names alone, the split of the records would not be looked at.
    with pytest.raises(UserError, match=r"a record of a shard set; in data\.train, name the folder with its manifest"):
        _ids(StreamLoader(_samples(*urls), StreamSampling(7)).steps(0, 1))


class _Ranges(BaseHTTPRequestHandler):
    """Files of a folder with byte ranges; the first requests fail as told."""

    folder: Path
    fail: ClassVar[list[int]] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        file = self.folder / self.path.lstrip("/")
        status, data, extra = 404, b"", {}
        if self.fail and body:
            status = self.fail.pop(0)
        elif file.is_file():
            data, status = file.read_bytes(), 200
            if asked := self.headers.get("Range"):
                first, last = (int(each) for each in asked.removeprefix("bytes=").split("-"))
                extra = {"Content-Range": f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"}
                data, status = data[first : last + 1], 206
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **extra}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """A server over `tmp_path`."""
    _Ranges.folder = tmp_path
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Ranges)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("workers", [0, 1])
def test_remote_tars_give_the_same_as_local_ones(tmp_path: Path, served: str, workers: int) -> None:
    write_set(tmp_path / "one", [5, 4])
    write_tars(tmp_path / "two", [3, 4])
    local = [str(tmp_path / "one"), f"{tmp_path}/two/{{00000..00001}}.tar"]
    remote = [f"{served}/one", f"{served}/two/{{00000..00001}}.tar"]
    sampling = StreamSampling(4, shuffle_buffer=3)
    expected = [_join(step) for step in StreamLoader(_samples(*local), sampling).steps(0, 6)]
    samples = _samples(*remote)
    _Ranges.fail = [503, 500]  # what passes is tried again
    loader = StreamLoader(samples, sampling, workers=workers)
    assert _equal(expected, [_join(step) for step in loader.steps(0, 6)])
    assert loader.position() == StreamLoader(samples, sampling, position=loader.position()).position()
    (tmp_path / "two" / "00001.tar").unlink()
    with pytest.raises(UserError, match=r"http://127.0.0.1:\d+/two/00001.tar: the file is not there \(status 404\)"):
        list(StreamLoader(samples, sampling, workers=workers).steps(0, 6))


def test_a_loader_goes_to_spawned_workers(tmp_path: Path) -> None:
    samples = _samples(write_set(tmp_path / "one", [5, 4]), augment=Augment(pad=2))
    loader = StreamLoader(samples, StreamSampling(3))
    ((expected,),) = loader.steps(0, 1)
    worker = _Worker(StreamLoader(samples, StreamSampling(3)), BatchMemory(3, 3, SIZE))
    made = pickle.loads(pickle.dumps(worker))[_Task(0, 1)]  # the copy has no places
    assert made.place == -1 and _equal([made.batch], [expected])


def test_tars_of_others_are_streamed_through_their_index(tmp_path: Path) -> None:
    """Then samples are counted, exclusions work, and a flipped bit in an image is found."""
    folder = write_tars(tmp_path / "cc3m", [5, 4])
    by_name = StreamLoader(_samples(f"{folder}/{{00000..00001}}.tar"), StreamSampling(9))
    ((expected,),) = by_name.steps(0, 1)
    assert index_main(["build", str(folder), "--out", str(tmp_path / "index"), "--workers", "1"]) == 0
    samples = _samples(tmp_path / "index")
    loader = StreamLoader(samples, StreamSampling(9))
    assert (by_name.num_samples, loader.num_samples) == (None, 9)
    ((batch,),) = loader.steps(0, 1)
    assert _equal([batch], [expected])
    pid = StreamSource(tmp_path / "index").shards.identities[3]  # type: ignore[union-attr]
    assert StreamSource(tmp_path / "index", Exclusions(frozenset({pid}))).samples == 8
    data = bytearray((folder / "00001.tar").read_bytes())
    data[700] ^= 1
    (folder / "00001.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"00001.tar, sample 000000005: the image is damaged"):
        list(loader.steps(1, 3))
