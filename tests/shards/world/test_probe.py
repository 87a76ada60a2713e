"""How hard a world is without learning: colour histograms, a ridge regression to words, and the oracle above them.

    python tests/shards/world/test_probe.py --level standard [--hardness .6 …]

prints the row of docs/world.md. The test asks for the order of the readers on a small world.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reid_dist.evaluation.baselines import BaselineData, ImageSet, closed_form_baselines
from shards.world.__main__ import _parser, _spec
from shards.world.export import export
from shards.world.oracle import ceilings
from shards.world.spec import ExportSpec, World

SIZE = (32, 64)  # width, height


def _images(paths: list[Path], people: list[int], cameras: list[int], captions: list[list[str]]) -> ImageSet:
    pixels = []
    for path in paths:
        with Image.open(path) as image:
            pixels.append(torch.from_numpy(np.array(image.resize(SIZE, Image.Resampling.BICUBIC))))
    return ImageSet(torch.stack(pixels), torch.tensor(people), torch.tensor(cameras), captions)


def _captioned(root: Path, split: str) -> ImageSet:
    entries = [entry for entry in json.loads((root / "reid_raw.json").read_text()) if entry["split"] == split]
    shots = json.loads((root / "world.json").read_text())["shots"]
    cameras = [shots[entry["file_path"]][0] for entry in entries]
    paths = [root / "imgs" / entry["file_path"] for entry in entries]
    return _images(paths, [entry["id"] for entry in entries], cameras, [entry["captions"] for entry in entries])


def _role(root: Path, folder: str) -> ImageSet:
    paths = [path for path in sorted((root / folder).iterdir()) if not path.name.startswith("-1")]
    people = [int(path.name.split("_")[0]) for path in paths]
    cameras = [int(path.name.split("_c")[1].split("s")[0]) - 1 for path in paths]
    return _images(paths, people, cameras, [[] for _ in paths])


def probe(world: World, ids: int, test_ids: int, images: int) -> dict[str, dict[str, dict[str, float] | None]]:
    """Return every reader's metrics in percent, by reader and task."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for form in ("cuhk_pedes", "market1501"):
            export(ExportSpec(form, world, ids, test_ids, 0, images, 0.4), root / form, say=lambda _: None)
        cuhk, market = root / "cuhk_pedes", root / "market1501"
        data = BaselineData(
            identity_train=_role(market, "bounding_box_train"),
            query=_role(market, "query"),
            gallery=_role(market, "bounding_box_test"),
            caption_train=_captioned(cuhk, "train"),
            caption_gallery=_captioned(cuhk, "test"),
        )
        oracle = ceilings(cuhk, market)
        return {**closed_form_baselines(data), "oracle": {task: oracle[task] for task in ("t2i", "i2i")}}  # type: ignore[dict-item]


def test_learners_lie_between_chance_and_the_oracle() -> None:
    found = probe(World(0, 0.35, 1, 0.7, 0.0), 60, 40, 5)

    def score(reader: str, task: str) -> float:
        row = found[reader][task]
        assert row is not None
        return row["mAP"]

    assert score("chance", "i2i") < score("raw_histogram", "i2i") < score("histogram", "i2i") < score("oracle", "i2i")
    assert 1.5 * score("chance", "t2i") < score("ridge", "t2i") < score("oracle", "t2i") - 10


if __name__ == "__main__":
    spec = _spec(_parser().parse_args(["export", "cuhk_pedes", "--out", ".", *sys.argv[1:]]))
    rows = probe(spec.world, spec.ids, spec.test_ids, spec.images)
    for reader, task in (
        ("raw_histogram", "i2i"),
        ("histogram", "i2i"),
        ("ridge", "t2i"),
        ("oracle", "i2i"),
        ("oracle", "t2i"),
    ):
        row = rows[reader][task] or {}
        print(f"{reader:>14} {task} R@1 {row['R1']:5.1f} mAP {row['mAP']:5.1f}")
