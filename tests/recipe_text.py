"""A recipe to change in tests, and what loading says of it."""

from pathlib import Path

import pytest

from reid_dist.errors import UserError
from reid_dist.recipe_file import load_config

RECIPE = """\
# a comment
output_dir: runs/test
model: {architecture: ViT-B-16, image_size: [256, 128]}
data:
  root: shards
  global_batch_size: 32
  augment: {flip: 0.25, erase: 0.5}
optimizer: {lr: 1e-5, warmup_steps: 10}
evaluation: {t2i: [cuhk_pedes]}
stages:
  - name: pretrain
    steps: 100
    data: {train: [generic], augment: {erase: 0.0}}
  - name: i2i
    steps: 50
    data: {train: [market1501], sampler: identity}
    optimizer: {lr: 3.0e-4}
    loss: {triplet_margin: 0.5}
  - name: second
    kind: t2i
    steps: 20
    data: {train: [cuhk_pedes]}
    freeze: [visual]
"""


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the one error that loading must give."""
    with pytest.raises(UserError) as refusal:
        load_config(path, overrides)
    lines = str(refusal.value).splitlines()
    assert all("pydantic" not in line and line.strip() for line in lines)
    return lines


def changed(path: Path, old: str, new: str) -> Path:
    assert old in RECIPE
    path.write_text(RECIPE.replace(old, new))
    return path
