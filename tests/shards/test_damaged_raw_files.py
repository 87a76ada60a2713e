"""Bytes changed at random in every file that describes a raw data set: samples or one clear line, never a crash."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from reid_dist.errors import UserError
from shards.world.export import export
from shards.world.spec import ExportSpec, World
from shards.write import CONVERTERS

DESCRIBED_BY = {
    "synth_pedes": "synthpedes_dataset.json",
    "mals": "gene_attrs/*.json",
    "luperson_mllm": "Td-qwen.json",
    "webperson": "data/*.parquet",
    "img2dataset": "00000/000000001.*",
    "coco": "annotations/captions_train2017.json",
    "flickr30k": "dataset_flickr30k.json",
    "wit": "00000.tar",
    "csv": "people.csv",
    "jsonl": "people.jsonl",
}
TRIALS = 60


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("trees")

    def tree(name: str) -> Path:
        if not (folder / name).exists():
            export(ExportSpec(name, World(3, 0.35, 1, 0.7, 0.0), 3, 1, 1, 2, 0.4), folder / name, say=lambda line: None)
        return folder / name

    return tree


def _damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    data = bytearray(whole)
    kind = rng.integers(4)
    start = int(rng.integers(len(data)))
    if kind == 0:  # other bytes
        for position in rng.integers(len(data), size=3):
            data[position] = rng.integers(256)
    elif kind == 1:  # a bit
        data[start] ^= 1 << int(rng.integers(8))
    elif kind == 2:  # the end is missing
        del data[start:]
    else:  # a piece is missing, or stands twice
        piece = data[start : start + int(rng.integers(1, 40))]
        data[start : start + len(piece)] = piece * int(rng.choice([0, 2]))
    return bytes(data)


def _read_all(name: str, variant: str, root: Path) -> None:
    for sample in CONVERTERS[name].samples(root, variant):
        # A hole in the checks would show here: text that cannot be stored, a file outside.
        json.dumps([sample.source, sample.pid, sample.captions], ensure_ascii=False).encode()
        sample.image.read()


@pytest.mark.parametrize("name", list(DESCRIBED_BY))
def test_random_damage(name: str, trees: Callable[[str], Path]) -> None:
    root = trees(name)
    variant = next(iter(CONVERTERS[name].EXPECTED))
    rng = np.random.default_rng(sum(name.encode()))
    refused = 0
    for path in [path for path in sorted(root.glob(DESCRIBED_BY[name])) if path.suffix != ".jpg"]:
        whole = path.read_bytes()
        for _ in range(TRIALS):
            path.write_bytes(_damaged(whole, rng))
            try:
                _read_all(name, variant, root)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 900, error
                assert path.name in str(error) or str(root) in str(error)
        path.write_bytes(whole)
    _read_all(name, variant, root)
    assert refused > TRIALS // 6


@pytest.mark.parametrize("name", ["wit", "coco"])
def test_random_damage_of_the_other_form(name: str, trees: Callable[[str], Path]) -> None:
    root = trees(name)
    path = next(root.glob("*.tsv.gz" if name == "wit" else "dataset_coco.json"))
    whole = path.read_bytes()
    rng = np.random.default_rng(5)
    refused = 0
    for _ in range(TRIALS):
        path.write_bytes(_damaged(whole, rng))
        try:
            _read_all(name, "all" if name == "wit" else "karpathy", root)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 900
    path.write_bytes(whole)
    assert refused > TRIALS // 6
