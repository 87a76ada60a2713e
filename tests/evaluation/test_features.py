"""Extraction: each sample once, in the order asked for, the same to the bit for any number of ranks."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reid_dist.data.reader import ShardSet
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.errors import UserError
from reid_dist.evaluation.benchmark import (
    evaluate_benchmark,
    i2i_task,
    rank_task,
    t2i_task,
)
from reid_dist.evaluation.features import Features, extract

SIZE = (32, 16)
WORDS = [
    "person",
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
]
TOKENIZER = WordTokenizer(WORDS, context_length=5, vocab_size=16)


class ToyEncoder(nn.Module):
    """A fixed random projection; counts what it sees."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        self.image_weight = nn.Parameter(torch.randn(3, 12, generator=make))
        self.word = nn.Parameter(torch.randn(16, 12, generator=make))
        self.frozen = nn.Dropout(0.5).eval()
        self.drop = nn.Dropout(0.5)
        self.dtype = dtype
        self.images_seen = 0

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        assert image_BCHW.dtype == torch.uint8 and not self.drop.training and torch.is_inference_mode_enabled()
        self.images_seen += len(image_BCHW)
        return self.drop((image_BCHW.float().mean((2, 3)) / 255 - 0.4) @ self.image_weight).to(self.dtype)

    def encode_text(self, token_BL: Tensor) -> Tensor:
        return self.drop(self.word[token_BL].sum(1)).to(self.dtype)


def entries() -> list[tuple[str, int, str, list[str]]]:
    """23 images: queries, gallery, distractors and junk, with 0 to 3 captions each."""
    out = []
    for i in range(23):
        role = ("query", "gallery", "gallery", "gallery")[i % 4]
        if i in (9, 13):
            role = "distractor"
        if i == 11:
            role = "junk"
        pid = "9" if role == "distractor" else str(i // 4)
        out.append(
            (
                pid,
                i % 3,
                role,
                [f"a person {WORDS[1 + i // 4]} {WORDS[1 + j]}" for j in range(i % 4)],
            )
        )
    return out


@pytest.fixture(name="shards")
def _shards(tmp_path: Path, write_set: Callable[..., Path]) -> ShardSet:
    return ShardSet(write_set(tmp_path / "toy", entries()))


def columns(features: Features) -> list[Tensor]:
    assert features.text_MD is not None
    labels = [
        features.image_pid_N,
        features.camid_N,
        features.row_N,
        features.text_pid_M,
        features.text_image_M,
    ]
    return [features.image_ND, features.text_MD, *labels]


def test_rows_come_back_in_the_order_asked_for(shards: ShardSet) -> None:
    rows = np.array([7, 3, 22, 0, 11, 5])
    encoder = ToyEncoder()
    got = extract(encoder, shards, rows, SIZE, TOKENIZER, batch_size=4)
    assert encoder.images_seen == 6 and got.row_N.tolist() == rows.tolist()
    assert got.image_ND.norm(dim=1).tolist() == pytest.approx([1.0] * 6)
    for i, row in enumerate(rows):
        alone = extract(encoder, shards, rows[i : i + 1], SIZE, batch_size=4)
        assert alone.text_MD is None and torch.allclose(alone.image_ND[0], got.image_ND[i], atol=1e-6)
        assert shards.identities[int(got.image_pid_N[i])] == shards.sample(int(row)).pid
        owned = [text for text, owner in zip(got.captions, got.text_image_M.tolist(), strict=True) if owner == i]
        assert owned == shards.sample(int(row)).captions
    assert got.text_pid_M.equal(got.image_pid_N[got.text_image_M])
    assert got.image_ND.is_inference() is False


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process_to_the_bit(
    world_size: int, shards: ShardSet, run_ranks: Callable[..., list[Any]]
) -> None:
    def job() -> tuple[list[Tensor], list[Tensor]]:
        features = extract(ToyEncoder(), shards, shards.rows("test"), SIZE, TOKENIZER, batch_size=3)
        ranks = [rank_task(task).table() for task in (t2i_task(features), i2i_task(features)) if task is not None]
        return columns(features), ranks

    alone = job()
    for one in run_ranks(world_size, job):
        assert all(torch.equal(a, b) for a, b in zip(one[0], alone[0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one[1], alone[1], strict=True))


def test_more_ranks_than_blocks(shards: ShardSet, run_ranks: Callable[..., list[Any]]) -> None:
    def job() -> Any:
        return evaluate_benchmark(ToyEncoder(), shards, TOKENIZER, SIZE, batch_size=64)

    assert run_ranks(3, job) == [job()] * 3


def test_an_error_on_one_rank_stops_all(shards: ShardSet, run_ranks: Callable[..., list[Any]]) -> None:
    bad = shards.index[4]
    path = shards.path / "toy-000000.tar"
    data = bytearray(path.read_bytes())
    data[int(bad["image_offset"]) : int(bad["image_offset"]) + 8] = b"notimage"
    path.write_bytes(data)

    def job() -> str:
        try:
            extract(ToyEncoder(), shards, shards.rows("test"), SIZE, batch_size=3)
        except UserError as error:
            return str(error)
        return "no error"

    # Row 4 lies in the second block of three.
    first, second = run_ranks(2, job)
    assert first == second
    assert "000004" in first and "the image is damaged" in first


def test_modes_are_put_back_after_an_error_too(shards: ShardSet) -> None:
    encoder = ToyEncoder()
    encoder.encode_text = lambda token_BL: 1 / 0  # type: ignore[method-assign,assignment]
    with pytest.raises(ZeroDivisionError):
        extract(encoder, shards, shards.rows("test"), SIZE, TOKENIZER)
    assert encoder.training and encoder.drop.training and not encoder.frozen.training
    assert not torch.is_inference_mode_enabled()


def test_nan_names_the_sample(shards: ShardSet) -> None:
    encoder = ToyEncoder()
    encoder.image_weight.data.fill_(math.nan)
    with pytest.raises(UserError, match=r"sample 000000 hold nan or inf \(23 of 23\)"):
        extract(encoder, shards, shards.rows("test"), SIZE)
    encoder = ToyEncoder()
    encoder.word.data.fill_(math.inf)
    with pytest.raises(UserError, match='caption "a person'):
        extract(encoder, shards, shards.rows("test"), SIZE, TOKENIZER)
    with pytest.raises(UserError, match="no images"):
        extract(encoder, shards, shards.rows("val"), SIZE)


def test_low_precision_encoder_gives_fp32_features(shards: ShardSet) -> None:
    got = extract(ToyEncoder(torch.bfloat16), shards, shards.rows("test"), SIZE, TOKENIZER)
    assert got.image_ND.dtype == torch.float32 and got.text_MD is not None and got.text_MD.dtype == torch.float32
