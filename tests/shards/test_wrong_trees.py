"""Every converter on trees of other data sets and on annotations with damage: samples or one clear line, no crash."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from reid_dist.data.sample import Role, Split
from reid_dist.errors import UserError
from shards.raw import RawSample
from shards.world.export import export
from shards.world.formats import EXPORTERS
from shards.world.spec import ExportSpec, World
from shards.write import CONVERTERS

TEXT = {".json", ".txt", ".csv", ".jsonl", ".tsv"}
ODD: list[Any] = [
    None,
    True,
    -1,
    1.5,
    10**30,
    "",
    "..",
    "../../etc/passwd",
    "a\0b",
    "\ud800",
    [],
    {},
    [[]],
    "7",
    "é" * 300,
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("wrong")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            spec = ExportSpec(name, World(8, 0.35, 1, 0.7, 0.0), 3, 2, 1, 2, 0.4)
            export(spec, folder / name, say=lambda line: None)
        return folder / name

    return make


def _read(name: str, root: Path) -> list[RawSample]:
    """The samples; what was refused gives none, when it was refused as it should be."""
    converter = CONVERTERS[name]
    samples: list[RawSample] = []
    for variant in converter.EXPECTED:
        try:
            samples += converter.samples(root, variant)
        except UserError as error:
            assert "\n" not in str(error) and root.name in str(error)
    for sample in samples:
        assert sample.split in get_args(Split) and sample.role in get_args(Role)
        assert isinstance(sample.camid, int) and -1 <= sample.camid < 2**31
        assert sample.pid is None or isinstance(sample.pid, str)
        assert ".." not in Path(sample.source).parts and not sample.source.startswith("/")
        assert sample.image.size > 0
        "".join([sample.source, sample.pid or "", *sample.captions]).encode()
        assert all(caption.strip() for caption in sample.captions)
        assert converter.part(sample)
    return samples


@pytest.mark.parametrize("name", list(CONVERTERS))
def test_trees_of_other_sets(name: str, tree: Callable[[str], Path], tmp_path: Path) -> None:
    assert _read(name, tree(name))
    for other in EXPORTERS:
        _read(name, tree(other))
    assert _read(name, tmp_path) == []


def _texts(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.suffix in TEXT and path.name != "world.json")


@pytest.mark.parametrize("name", [name for name in EXPORTERS if name not in ("market1501", "cuhk03_np", "folder")])
def test_damaged_text(name: str, tree: Callable[[str], Path], tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tree(name), root)
    rng = random.Random(name)
    texts = _texts(root)
    for _ in range(25 if texts else 0):
        path = rng.choice(texts)
        whole = path.read_bytes()
        place = rng.randrange(len(whole) + 1)
        kind = rng.randrange(3)
        inserted = (
            rng.randbytes(3) if kind == 0 else rng.choice([b'"', b",", b"[", b"}", b"\n", b"\t", b"\\ud800", b"-"])
        )
        path.write_bytes(whole[:place] if kind == 2 else whole[:place] + inserted + whole[place + (kind == 1) :])
        _read(name, root)
        path.write_bytes(whole)


def _mutated(value: Any, rng: random.Random) -> Any:
    """The value with one of its parts replaced, removed or added."""
    if isinstance(value, list) and value and rng.random() < 0.9:
        number = rng.randrange(len(value))
        return [*value[:number], _mutated(value[number], rng), *value[number + 1 :]]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {other: value[other] for other in value if other != key}
        return {**value, key: _mutated(value[key], rng)}
    return rng.choice(ODD)


@pytest.mark.parametrize("name", ["cuhk_pedes", "icfg_pedes", "rstp_reid", "ufine6926", "synth_pedes", "mals", "coco"])
def test_json_of_other_types(name: str, tree: Callable[[str], Path], tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tree(name), root)
    rng = random.Random(name)
    texts = [path for path in _texts(root) if path.suffix == ".json"]
    for _ in range(60):
        path = rng.choice(texts)
        whole = path.read_text()
        path.write_text(json.dumps(_mutated(json.loads(whole), rng)))
        _read(name, root)
        path.write_text(whole)
