"""Bad samples and broken tars in a stream: named, counted, replaced where that is allowed; steps stay equal."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reid_dist.data.stream.loader import StreamLoader, StreamSampling
from reid_dist.data.stream.samples import StreamSamples
from reid_dist.data.stream.source import StreamSource
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.data.training_samples import Batch
from reid_dist.data.transforms import Augment
from reid_dist.errors import UserError
from tests.data.stream_files import write_set
from tests.hostile_tars import join, jpeg, member, pairs, png_bomb, record

TOKENIZER = WordTokenizer(["picture", "caption", *map(str, range(300))], 8, 512)
SIZE = (16, 8)

# More workers than this machine has cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def _samples(*folders: Path | str, augment: Augment | None = None, **settings: Any) -> StreamSamples:
    return StreamSamples([StreamSource(folder) for folder in folders], SIZE, TOKENIZER, augment, **settings)


def _ids(steps: Iterator[list[Batch]]) -> list[int]:
    return [each for step in steps for batch in step for each in batch["sample_id_B"].tolist()]


def _tar(tmp_path: Path, *members: bytes) -> Path:
    """Six good pairs with something between them."""
    good = pairs(6, "img2dataset")
    path = tmp_path / "00000.tar"
    path.write_bytes(join([*good[:6], *members, *good[6:]]))
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([member("bad.jpg", b"\xff\xd8\xff no"), member("bad.txt", b"x")], "sample bad: the image does not decode"),
        ([member("bad.png", png_bomb()), member("bad.txt", b"x")], "sample bad: 100000000 pixels, more than the cap"),
        ([member("bad.jpg", jpeg(1)), member("bad.txt", b" \n")], "sample bad: it has no caption"),
        ([member("bad.jpg", jpeg(1)), member("bad.txt", b"\xff\xfe")], "sample bad: its .txt is not UTF-8 text"),
        ([member("bad.jpg", jpeg(1)), member("bad.json", b"{")], "sample bad: its .json is not JSON"),
        ([member("bad.jpg", jpeg(1)), member("bad.json", b"[" * 60_000)], "sample bad: its .json is not JSON"),
        (
            [member("bad.jpg", jpeg(1)), member("bad.json", b'{"caption": 3}')],
            '"caption" of its .json is int, not text',
        ),
        ([member("bad.jpg", jpeg(1)), member("bad.json", b'{"caption": null}')], "sample bad: it has no caption"),
        ([member("bad.jpg", jpeg(1)), member("bad.json", b"[]")], "sample bad: it has no caption"),
        ([member("bad.jpg", jpeg(1))], "sample bad: half a sample"),
        ([member("../bad.jpg", jpeg(1)), member("../bad.txt", b"x")], "is no name of a sample's file"),
    ],
)
def test_bad_samples_stop_the_run_or_are_counted(tmp_path: Path, members: list[bytes], message: str) -> None:
    samples = _samples(_tar(tmp_path, *members))
    for workers in (0, 1) if message.endswith("decode") else (0,):
        with pytest.raises(UserError) as caught:
            _ids(StreamLoader(samples, StreamSampling(7), workers=workers).steps(0, 1))
        assert message in str(caught.value) and "00000.tar" in str(caught.value) and "\n" not in str(caught.value)
    loader = StreamLoader(samples, StreamSampling(6), max_bad_fraction=0.5)
    assert len(set(_ids(loader.steps(0, 1)))) == 6
    count = loader.bad_samples.count
    assert 0 < count <= 2 and message in " ".join(loader.bad_samples.messages)
    position = loader.position()
    assert (position["seen"], position["bad"]) == (6 + count, count)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": "one string"}, "captions: Input should be a valid array"),
        ({"captions": [3]}, "captions.0: Input should be a valid string"),
        ({"pid": "elsewhere:1"}, 'does not start with "one:"'),
        ({"captions": []}, "it has no caption"),
    ],
)
def test_records_of_a_set_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Records that the index vouches for, but that no writer of ours makes."""
    from tests.data import stream_files

    def spoiled(number: int, image: bytes, name: str, **facts: Any) -> bytes:
        return record(number, image, name, **(facts | (changes if number == 1 else {})))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_files, "record", spoiled)
        folder = write_set(tmp_path / "one", [3])
    with pytest.raises(UserError) as caught:
        _ids(StreamLoader(_samples(folder), StreamSampling(3)).steps(0, 1))
    assert message in str(caught.value) and "one-000000.tar, sample s000001: " in str(caught.value)


@pytest.mark.parametrize("what", ["image", "json"])
def test_a_flipped_bit_is_found(tmp_path: Path, what: str) -> None:
    folder = write_set(tmp_path / "one", [3])
    source = StreamSource(folder)
    assert source.shards is not None
    row = source.shards.index[1]
    path = folder / "one-000000.tar"
    data = bytearray(path.read_bytes())
    data[row[f"{what}_offset"] + row[f"{what}_size"] // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(
        UserError, match=r"one-000000.tar, sample s000001: the (image|JSON record) is damaged \(its sha"
    ):
        _ids(StreamLoader(_samples(folder), StreamSampling(3)).steps(0, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tar_that_vanishes_mid_epoch(tmp_path: Path, workers: int) -> None:
    folder = write_set(tmp_path / "one", [40] * 8)
    samples = _samples(folder)
    for fraction in (0.0, 0.4):
        loader = StreamLoader(samples, StreamSampling(8, shuffle_buffer=4), workers=workers, max_bad_fraction=fraction)
        steps = loader.steps(0, 45)
        next(steps)
        share = samples.tars[loader._plan.share(0, 0, 0)[-1]]
        gone = Path(share.tar.location)
        if gone.exists():
            gone.rename(tmp_path / "gone")
        if not fraction:
            with pytest.raises(UserError, match=rf"{gone.name}: cannot be read \(No such file or directory\)"):
                list(steps)
        else:
            assert len(list(steps)) == 44
            assert loader.bad_samples.count >= 40 and gone.name in loader.bad_samples.messages[0]


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "one", [40, 40], spoil=tuple(range(0, 80, 3)))
    loader = StreamLoader(_samples(folder), StreamSampling(8), max_bad_fraction=0.05)
    with pytest.raises(UserError, match=r"samples read are bad, more than data.max_bad_fraction 0.05 allows: .*s0000"):
        _ids(loader.steps(0, 100))
    everything = write_set(tmp_path / "all", [40, 40], spoil=tuple(range(80)))
    with pytest.raises(UserError, match=r"more than data\.max_bad_fraction 0\.9 allows"):
        _ids(StreamLoader(_samples(everything), StreamSampling(8), max_bad_fraction=0.9).steps(0, 100))


def test_equal_steps_whatever_is_bad_on_one_rank(tmp_path: Path) -> None:
    samples = _samples(write_set(tmp_path / "one", [20, 20, 2, 1], spoil=(3, 4, 5, 30)))
    for rank in range(2):
        loader = StreamLoader(samples, StreamSampling(8), rank, 2, max_bad_fraction=0.2)
        batches = [batch for step in loader.steps(0, 40) for batch in step]
        assert len(batches) == 40 and {len(batch["pid_B"]) for batch in batches} == {4}
