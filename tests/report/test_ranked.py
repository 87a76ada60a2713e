"""Which queries a sheet shows, and that its lists are those that the metrics count."""

import io
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from reid_dist.data.reader import ShardSet
from reid_dist.evaluation.benchmark import Task, i2t_task, t2i_task
from reid_dist.evaluation.features import Features
from reid_dist.evaluation.ranking import Retrieval, rank_queries, top_matches
from reid_dist.report.ranked import choose_extremes, choose_queries, nearest_positive, query_rows
from reid_dist.report.sheet import TEXT_W, contact_sheet, draw_sheet, match_box

Write = Callable[..., Path]


def test_queries_run_from_easy_to_hard() -> None:
    first = torch.tensor([5, 0, 1, 1, 9, 2, 0, 30, 1, 4])
    chosen = choose_queries(first, 4)
    assert [int(first[i]) for i in chosen] == [1, 2, 5, 30]
    assert chosen == choose_queries(first, 4)
    assert sorted(choose_queries(first, 99)) == [0, 2, 3, 4, 5, 7, 8, 9]
    assert choose_queries(torch.zeros(3), 2) == []


def test_extremes_are_of_different_people() -> None:
    ap = torch.tensor([1.0, 1.0, 0.9, 0.1, 0.2, 0.5, 0.0, 0.6, 0.4], dtype=torch.float64)
    positives = torch.tensor([1, 3, 1, 1, 1, 1, 0, 1, 1])
    pid = torch.tensor([0, 0, 1, 2, 2, 3, 4, 3, 5])
    chosen = choose_extremes(ap, positives, pid, 2)
    # Of person 0 the query with the most positives, of person 2 the worse one; number 6 has no positive. In the middle
    # stand 7 and 5, of one person.
    assert chosen == {"best": [1, 2], "median": [2, 7], "worst": [3, 8]}
    everyone = choose_extremes(ap, positives, pid, 99)
    assert all(sorted(pid[found].tolist()) == [0, 1, 2, 3, 5] for found in everyone.values())
    values = ap[everyone["median"]].tolist()
    assert values == sorted(values, reverse=True)
    assert choose_extremes(ap, torch.zeros(9), pid, 2) == {"best": [], "median": [], "worst": []}


def test_the_nearest_positive_stands_at_its_rank() -> None:
    make = torch.Generator().manual_seed(0)
    query_QD, gallery_GD = torch.randn(15, 6, generator=make), torch.randn(40, 6, generator=make)
    pid_Q, pid_G = torch.randint(0, 5, (15,), generator=make), torch.randint(0, 5, (40,), generator=make)
    camid_Q, camid_G = torch.randint(-1, 3, (15,), generator=make), torch.randint(-1, 3, (40,), generator=make)
    for cameras in ((), (camid_Q, camid_G)):
        retrieval = Retrieval(query_QD, gallery_GD, pid_Q, pid_G, *cameras)
        first_Q = rank_queries(retrieval).first_Q
        index_QK, score_QK = top_matches(retrieval, 40)
        for query in first_Q.nonzero().flatten().tolist():
            entry, value = nearest_positive(retrieval, query)
            place = int(first_Q[query]) - 1
            assert entry == int(index_QK[query, place])
            assert abs(value - float(score_QK[query, place])) < 1e-6


def made(write_set: Write, folder: Path) -> tuple[ShardSet, Features]:
    """Twelve people with a sentence each, and features under which the first one's own image comes last."""
    names = [f"p{number:02d}" for number in range(12)]
    shards = ShardSet(write_set(folder, [(name, -1, "gallery", [f"person {name}"]) for name in names]))
    image_ND, text_MD = torch.eye(12), torch.eye(12)
    text_MD[0] = torch.linspace(0, 1, 12)
    number_N = torch.arange(12)
    zeros_N = torch.zeros(12, dtype=torch.int64)
    role_N = torch.from_numpy(shards.index["role"].astype("int64"))
    captions = [f"person {name}" for name in names]
    return shards, Features(image_ND, number_N, zeros_N - 1, role_N, number_N, text_MD, number_N, number_N, captions)


def ranks(task: Task | None) -> tuple[Task, torch.Tensor]:
    assert task is not None
    return task, rank_queries(task.retrieval).first_Q


def test_a_right_answer_that_came_late_stands_behind_the_first_ones(tmp_path: Path, write_set: Write) -> None:
    shards, features = made(write_set, tmp_path / "set")
    task, first_Q = ranks(t2i_task(features))
    late, early = query_rows(shards, features, task, [0, 5], first_Q, k=4)
    assert late.query == "person p00" and late.note == "first right one at rank 12"
    assert [match.right for match in late.matches] == [False] * 4 + [True]
    assert [match.rank for match in late.matches] == [0] * 4 + [12]
    assert [match.right for match in early.matches] == [True, False, False, False]
    (last,) = query_rows(shards, features, task, [0], first_Q, k=12)
    assert [match.right for match in last.matches] == [False] * 11 + [True]  # it is among them already
    first = late.matches[4].image
    with Image.open(io.BytesIO(shards.image_bytes(0))) as stored:
        assert isinstance(first, Image.Image) and first.tobytes() == stored.convert("RGB").tobytes()
    contact_sheet(tmp_path / "sheet.png", "title", [late, early])


def test_sentences_are_matches_of_images(tmp_path: Path, write_set: Write) -> None:
    shards, features = made(write_set, tmp_path / "set")
    task, first_Q = ranks(i2t_task(features))
    rows = query_rows(shards, features, task, [3], first_Q, k=2)
    assert isinstance(rows[0].query, Image.Image)
    assert rows[0].matches[0].image == "person p03"
    sheet = draw_sheet("title", rows)
    left, top, right, bottom = match_box(1, 0, TEXT_W)
    assert sheet.getpixel((left, top)) != (255, 255, 255) and sheet.size[0] > right and sheet.size[1] > bottom
    inside = sheet.crop((left + 6, top + 6, right - 6, bottom - 6)).convert("L")
    assert inside.getextrema()[0] < 100  # there is writing
