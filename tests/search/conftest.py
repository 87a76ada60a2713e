"""A tiny model with its export, and photographs of nobody: noise on one colour for each person."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reid_dist.checkpoint.portable import save_export
from reid_dist.config import ModelConfig
from reid_dist.data.sample import INDEX_DTYPE, ROLES, SPLITS, Sample, content_digest
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.trained import TrainedModel, load

LOCK = ".photos.index.reid_dist-lock"

SIZE = (32, 16)
WORDS = ["a", "person", "red", "blue", "coat"]
COLOURS = [(200, 40, 40), (40, 60, 200), (40, 170, 60), (230, 220, 60), (120, 60, 150), (20, 20, 20)]
ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"row_conv": {"widths": [8, 16], "groups": 2, "rows": 4}},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}


def make_export(folder: Path, seed: int = 0, dual_token: bool = False) -> Path:
    """A run's folder with the export of a random encoder."""
    folder.mkdir(parents=True)
    architecture = folder / "source.json"
    architecture.write_text(json.dumps(ARCHITECTURE))
    (folder / "words.txt").write_text("\n".join(WORDS) + "\n")
    config = ModelConfig.model_validate(
        {
            "architecture": str(architecture),
            "image_size": SIZE,
            "vocabulary": str(folder / "words.txt"),
            "dual_token": dual_token,
        }
    )
    torch.manual_seed(seed)
    encoder = build_dual_encoder(config)
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    save_export(folder / "export", state, config, WORDS, {"stage": "t2i"})
    return folder


def picture(person: int, shot: int, size: tuple[int, int] = (20, 40)) -> Image.Image:
    """A picture (width, height): stripes of the person's colour under the noise of the shot."""
    rng = np.random.default_rng([person, shot])
    colour = np.array(COLOURS[person % len(COLOURS)])
    stripe = (np.arange(size[1]) // (3 + person) % 2)[:, None, None] * 60
    pixels = colour + stripe + rng.integers(-25, 25, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_photos(folder: Path, people: int, shots: int) -> Path:
    """`p<person>/<shot>.png` and a metadata.csv that knows of all but the last person."""
    lines = ["file,person,camera,date"]
    for person in range(people):
        (folder / f"p{person}").mkdir(parents=True)
        for shot in range(shots):
            picture(person, shot).save(folder / f"p{person}" / f"{shot}.png")
            if person < people - 1:
                lines.append(f"p{person}/{shot}.png,person-{person},camera-{shot % 2},2024-0{1 + person}-1{shot}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_shards(
    folder: Path, people: int, shots: int, captions: list[str], split: str = "val", told: int = 10**6
) -> Path:
    """A shard set of people 100, 101 ... in one tar; the first `told` images have the captions."""
    folder.mkdir(parents=True)
    index = np.zeros(people * shots, INDEX_DTYPE)
    identities = [f"toy:{100 + person}" for person in range(people)]
    with tarfile.open(folder / "toy-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in range(len(index)):
            buffer = io.BytesIO()
            picture(100 + row // shots, row).save(buffer, "PNG")
            image, own = buffer.getvalue(), captions if row < told else []
            sample = Sample(
                dataset="toy", pid=identities[row // shots], camid=row % 3 - 1, split=split, role="gallery",
                captions=own, source=f"{row}.png", width=20, height=40, sha256="0" * 64,
            )  # fmt: skip
            record = sample.model_dump_json().encode()
            places = [_add(tar, f"{row:06d}.{kind}", data) for kind, data in (("jpg", image), ("json", record))]
            index[row] = (
                *(0, places[0], len(image), places[1], len(record), content_digest(image), content_digest(record)),
                *(row // shots, row % 3 - 1, SPLITS.index(split), ROLES.index("gallery"), len(own)),
            )
    size = (folder / "toy-000000.tar").stat().st_size
    shard = {"name": "toy-000000.tar", "sha256": "0" * 64, "bytes": size, "samples": len(index)}
    manifest = {"format_version": 1, "dataset": "toy", "shards": [shard], "identities": identities, "splits": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    np.save(folder / "index.npy", index)
    return folder


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - (len(data) + 511) // 512 * 512


@pytest.fixture(scope="session", name="search_run")
def _search_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_export(tmp_path_factory.mktemp("search") / "run")


@pytest.fixture(scope="session", name="search_model")
def _search_model(search_run: Path) -> TrainedModel:
    return load(search_run, "cpu")


@pytest.fixture(scope="session", name="photos")
def _photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "album", people=5, shots=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def around(folder: Path) -> dict[str, bytes]:
    """Every file in the folder that the index lies in."""
    return {str(path): path.read_bytes() for path in sorted(folder.parent.rglob("*")) if path.is_file()}
