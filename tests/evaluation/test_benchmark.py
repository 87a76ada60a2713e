"""Which rows of a shard set play which part in the two tasks, and the contact sheet of a whole benchmark."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from reid_dist.data.reader import ShardSet
from reid_dist.data.tokenizer import WordTokenizer
from reid_dist.errors import UserError
from reid_dist.evaluation.baselines import closed_form_baselines
from reid_dist.evaluation.benchmark import (
    evaluate_benchmark,
    extract_benchmark,
    i2i_task,
    i2t_task,
    load_baseline_data,
    score_task,
    t2i_task,
)
from reid_dist.evaluation.ranking import rank_metrics
from reid_dist.evaluation.reranking.choice import NeighbourJaccard
from reid_dist.report.ranked import ranked_rows
from reid_dist.report.sheet import contact_sheet

SIZE = (32, 16)
TOKENIZER = WordTokenizer(["red", "green", "blue"], context_length=4, vocab_size=7)
Write = Callable[..., Path]


class MeanColour:
    """Not even a module: the mean colour of an image, a caption's first word."""

    def encode_image(self, image_BCHW: Tensor) -> Tensor:
        return image_BCHW.float().mean((2, 3))

    def encode_text(self, token_BL: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(token_BL[:, 1], 7)[:, 3:6].float() + 0.01


def market(write_set: Write, folder: Path) -> ShardSet:
    gallery = [(pid, camera, "gallery", []) for pid in "abc" for camera in (0, 1, 2)]
    queries = [(pid, 0, "query", []) for pid in "abc"]
    rest = [
        ("0000", 1, "distractor", []),
        ("0000", 2, "distractor", []),
        ("-1", 1, "junk", []),
    ]
    return ShardSet(write_set(folder, [*gallery, *queries, *rest], "market"))


def pedes(write_set: Write, folder: Path, split: str = "test", role: str = "gallery") -> ShardSet:
    return ShardSet(
        write_set(
            folder,
            [
                ("a", -1, role, ["red"]),
                ("a", -1, role, ["red", "red x", "red y"]),
                ("b", -1, role, ["green"]),
            ],
            "pedes",
            split,
        )
    )


def test_market_roles(tmp_path: Path, write_set: Write) -> None:
    shards = market(write_set, tmp_path / "m")
    features = extract_benchmark(MeanColour(), shards, TOKENIZER, SIZE)
    assert t2i_task(features) is None
    task = i2i_task(features)
    assert task is not None and len(task.query_Q) == 3 and len(task.gallery_G) == 11  # junk is gone, distractors stay
    assert set(shards.index["camid"][features.row_N[task.gallery_G].numpy()]) == {
        0,
        1,
        2,
    }
    pair = evaluate_benchmark(MeanColour(), shards, TOKENIZER, SIZE)
    assert pair["t2i"] is None and pair["i2i"] is not None and pair["i2i"]["queries"] == 3
    retrieval = task.retrieval
    assert pair["i2i"] == rank_metrics(
        retrieval.query_QD,
        retrieval.gallery_GD,
        retrieval.query_pid_Q,
        retrieval.gallery_pid_G,
        retrieval.query_camid_Q,
        retrieval.gallery_camid_G,
    )


def test_captions_are_queries_and_images_stand_once(tmp_path: Path, write_set: Write) -> None:
    shards = pedes(write_set, tmp_path / "p")
    features = extract_benchmark(MeanColour(), shards, TOKENIZER, SIZE)
    task = t2i_task(features)
    assert task is not None and task.retrieval.query_QD.shape == (5, 3) and task.retrieval.gallery_GD.shape == (3, 3)
    assert task.retrieval.query_camid_Q is None and i2i_task(features) is None
    pair = evaluate_benchmark(MeanColour(), shards, TOKENIZER, SIZE)
    assert pair["i2i"] is None and pair["t2i"] is not None
    assert pair["t2i"]["queries"] == 5 and pair["t2i"]["mAP"] == 100 and pair["t2i"]["tied"] == 0
    assert evaluate_benchmark(MeanColour(), shards, None, SIZE) == {
        "t2i": None,
        "i2i": None,
    }


def test_captioned_distractors_are_gallery_only(tmp_path: Path, write_set: Write) -> None:
    rows = [
        ("a", 0, "query", ["red"]),
        ("a", 1, "gallery", ["red"]),
        ("z", 1, "distractor", ["blue"]),
    ]
    features = extract_benchmark(MeanColour(), ShardSet(write_set(tmp_path / "x", rows)), TOKENIZER, SIZE)
    text, image = t2i_task(features), i2i_task(features)
    assert text is not None and len(text.query_Q) == 2 and len(text.gallery_G) == 3
    assert image is not None and len(image.query_Q) == 1 and len(image.gallery_G) == 2


def test_i2t_is_t2i_with_the_sides_swapped(tmp_path: Path, write_set: Write) -> None:
    rows = [
        ("a", 0, "query", ["red"]),
        ("a", 1, "gallery", ["red", "red x"]),
        ("b", 1, "gallery", []),
        ("z", 1, "distractor", ["blue"]),
    ]
    features = extract_benchmark(MeanColour(), ShardSet(write_set(tmp_path / "x", rows)), TOKENIZER, SIZE)
    text, image = t2i_task(features), i2t_task(features)
    assert text is not None and image is not None and image.kind == "i2t"
    one, other = text.retrieval, image.retrieval
    assert one.query_QD.equal(other.gallery_GD) and one.gallery_GD.equal(other.query_QD)
    assert one.query_pid_Q.equal(other.gallery_pid_G) and one.gallery_pid_G.equal(other.query_pid_Q)
    assert text.query_Q.equal(image.gallery_G) and text.gallery_G.equal(image.query_Q)
    result = score_task(image, NeighbourJaccard(2, 0.0))
    assert result.metrics["queries"] == 2 and result.metrics["skipped"] == 2 and len(result.task.gallery_G) == 3
    assert result.metrics == score_task(image).metrics  # of weight 0
    assert i2t_task(extract_benchmark(MeanColour(), market(write_set, tmp_path / "m"), TOKENIZER, SIZE)) is None


def test_a_split_without_images_is_an_error(tmp_path: Path, write_set: Write) -> None:
    with pytest.raises(UserError, match="no query or gallery images in split val"):
        evaluate_benchmark(MeanColour(), market(write_set, tmp_path / "m"), None, SIZE, split="val")


def test_baselines_from_shards(tmp_path: Path, write_set: Write) -> None:
    identity, captioned = (
        market(write_set, tmp_path / "m"),
        pedes(write_set, tmp_path / "p"),
    )
    data = load_baseline_data(identity, captioned, SIZE)
    assert data.query is not None and data.gallery is not None and data.caption_gallery is not None
    assert len(data.query.pid_N) == 3 and len(data.gallery.pid_N) == 11 and len(data.caption_gallery.texts()[0]) == 5
    assert data.query.image_NHWC.shape == (3, *SIZE, 3) and data.query.image_NHWC.dtype == torch.uint8
    assert load_baseline_data(None, None, SIZE).query is None
    data = load_baseline_data(identity, None, SIZE)
    data = type(data)(query=data.query, gallery=data.gallery)  # the toy has no training split
    assert closed_form_baselines(data)["raw_histogram"]["i2i"] is not None


def test_contact_sheet_of_a_benchmark(tmp_path: Path, write_set: Write) -> None:
    rows = []
    for shards in (pedes(write_set, tmp_path / "p"), market(write_set, tmp_path / "m")):
        features = extract_benchmark(MeanColour(), shards, TOKENIZER, SIZE)
        for task in (t2i_task(features), i2i_task(features)):
            rows += ranked_rows(shards, features, task, count=2)
    assert len(rows) == 4 and isinstance(rows[0].query, str) and isinstance(rows[2].query, Image.Image)
    assert [len(row.matches) for row in rows] == [3, 3, 10, 10]
    assert all(row.matches[0].right for row in rows[:2]) and "rank 1" in rows[0].note
    assert all(a.score >= b.score for row in rows for a, b in zip(row.matches, row.matches[1:], strict=False))
    contact_sheet(tmp_path / "sheet.png", "benchmark", rows)
    assert (tmp_path / "sheet.png").stat().st_size > 1000
