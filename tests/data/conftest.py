"""Tiny shard sets made by code, and a server for them."""

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reid_dist.data import remote
from reid_dist.data.sample import Sample
from shards.index import ShardWriter
from tests.data.file_server import Server, serving

Build = Callable[..., Path]


def jpeg(number: int, height: int = 20, width: int = 10) -> bytes:
    """A noise image that depends on its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Make a set with `train` identities of 3 images, then 4 gallery, 2 query and 1 junk image."""

    def make(
        name: str = "tiny",
        train: int = 5,
        captions: int = 2,
        shard_bytes: int = 10_000,
        spoil: int | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        writer = ShardWriter(folder, name, shard_bytes)
        roles = [("train", "train")] * (3 * train) + [("test", "gallery")] * 4 + [("test", "query")] * 2
        for number, (split, role) in enumerate([*roles, ("test", "junk")]):
            image = jpeg(number) if number != spoil else b"\xff\xd8\xff\xe0 not an image"
            sample = Sample.model_validate(
                {
                    "dataset": name,
                    "pid": f"{name}:{-1 if role == 'junk' else number // 3}",
                    "camid": number % 3,
                    "split": split,
                    "role": role,
                    "captions": [f"{name} picture {number} caption {c}" for c in range(captions)],
                    "source": f"{number}.jpg",
                    "width": 10,
                    "height": 20,
                    "sha256": hashlib.sha256(image).hexdigest(),
                }
            )
            writer.add(f"s{number:03d}", sample, image)
        writer.finish({"licence": "none"})
        return folder

    return make


@pytest.fixture
def server(build: Build) -> Iterator[Server]:
    """The tiny set behind http."""
    with serving(build()) as state:
        yield state


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No long waits between attempts."""
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.001)
