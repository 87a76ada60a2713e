"""What a stage's loader reads, by its losses and data settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reid_dist.config import RunConfig
from reid_dist.data.loader import TrainLoader
from reid_dist.data.reader import ShardSet
from reid_dist.data.stream.loader import StreamLoader
from reid_dist.data.stream.source import StreamSource
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.errors import UserError
from reid_dist.inputs import Inputs, caption_losses, train_loader
from tests.data.conftest import build  # noqa: F401 (a fixture)

Build = Callable[..., Path]
TOKENIZER = WordTokenizer(["told", "picture", "caption", *map(str, range(50))], 8, 128)


def _loader(
    root: Path, kind: str, loss: dict[str, Any], data: dict[str, Any], ranks: int = 1
) -> TrainLoader | StreamLoader:
    data = {"root": str(root), "global_batch_size": 8, **data}
    stage = {"name": "s", "kind": kind, "steps": 9, "data": data, "loss": loss}
    model = {"architecture": "a", "image_size": [16, 8]}
    config = RunConfig.model_validate({"model": model, "stages": [stage]})
    shards = {f"{root}/{name}": ShardSet(root / name) for name in data["train"]}
    streams = {"s": [StreamSource(location) for location in shards]} if data.get("reader") == "stream" else {}
    return train_loader(config, 0, Inputs(shards, streams, TOKENIZER, {}), 0, ranks)


@pytest.fixture
def root(build: Build) -> Path:  # noqa: F811
    build("bare", captions=0)
    return build("told").parent


MASKS = {"mlm_weight": 1, "mask_probability": 0.9}


@pytest.mark.parametrize(
    ("kind", "loss", "expected"),
    [
        ("pretrain", {}, (True, 0.0, "words")),
        ("t2i", {}, (True, 0.0, "words")),
        ("t2i", {**MASKS, "mask": "tokens"}, (True, 0.9, "tokens")),
        ("t2i", {"mlm_weight": 0.5}, (True, 0.15, "words")),
        ("i2i", {}, (False, 0.0, "words")),
        ("i2i", {"text_weight": 0.5}, (True, 0.0, "words")),
        ("i2i", {"text_weight": 0.5, "text": MASKS}, (True, 0.9, "words")),
        ("identity_prompt", {}, (False, 0.0, "words")),
    ],
)
def test_what_the_losses_need_of_captions(root: Path, kind: str, loss: dict[str, Any], expected: Any) -> None:
    samples = _loader(root, kind, loss, {"train": ["told"]}).samples
    assert (samples.tokenizer is TOKENIZER, samples.mask_probability, samples.mask_form) == expected
    assert samples.tokenizer is not None or not expected[0]


def test_masked_words_reach_the_batches(root: Path) -> None:
    for loss, masked in (({}, False), (MASKS, True)):
        (batch,) = next(_loader(root, "t2i", loss, {"train": ["told"]}).steps(0, 1))
        assert ("masked_token_BL" in batch and "masked_label_BL" in batch) == masked


def test_streams_of_pretraining_are_as_they_were(root: Path) -> None:
    loader = _loader(root, "pretrain", {}, {"train": ["told"], "reader": "stream"})
    assert isinstance(loader, StreamLoader) and loader.samples.tokenizer is TOKENIZER
    assert loader.samples.mask_probability == 0


def test_items_and_mixing_reach_the_loader(root: Path) -> None:
    data = {"train": ["bare", "told"], "items": "captions", "mixing": "sequential", "weights": [1, 2]}
    loader = _loader(root, "i2i", {"text_weight": 1}, data)
    assert isinstance(loader, TrainLoader) and loader.samples.counts == [15, 30]
    captions = [len(batch["token_BL"]) for (batch,) in loader.steps(0, 9)]
    assert captions == [0] * 3 + [8] * 6  # the stage has 9 steps


def test_only_the_image_stage_mixes_captioned_sets_with_others(root: Path) -> None:
    data = {"train": ["bare", "told"], "weights": [1, 1]}
    for kind in ("t2i", "pretrain"):
        with pytest.raises(UserError, match=r"bare: 15 of 15 training samples have no caption"):
            _loader(root, kind, {}, data)
    (batch,) = next(_loader(root, "i2i", {"text_weight": 1}, data, ranks=2).steps(0, 1))
    assert len(batch["token_BL"]) == 2 and len(batch["pid_B"]) == 4
    assert "captioned_B" not in next(_loader(root, "i2i", {}, data).steps(0, 1))[0]
    with pytest.raises(UserError, match=r"0\.5 of the 1 rows of a rank's micro-batch"):
        _loader(root, "i2i", {"text_weight": 1}, data, ranks=8)
    with pytest.raises(UserError, match=r"data\.weights: captioned and uncaptioned sets in one batch"):
        _loader(root, "i2i", {"text_weight": 1}, {"train": data["train"]})


def test_stages_without_captions_have_no_caption_losses() -> None:
    stages = [{"kind": kind, "name": kind, "steps": 1} for kind in ("identity_prompt", "i2i")]
    config = RunConfig.model_validate(
        {
            "model": {"architecture": "a", "image_size": [16, 8]},
            "stages": [{**s, "data": {"train": ["x"]}} for s in stages],
        }
    )
    assert [caption_losses(stage) for stage in config.stages] == [None, None]
