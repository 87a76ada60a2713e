"""Errors by camera and by attribute, against counting by hand."""

from collections import Counter
from collections.abc import Mapping

import pytest
import torch

from reid_dist.evaluation.benchmark import Task, TaskResult
from reid_dist.evaluation.ranking import Retrieval, rank_queries, summarise, top_matches
from reid_dist.report.errors import (
    by_attribute,
    by_camera,
    find_mistakes,
    known_facts,
    mistaken_attributes,
    mistaken_cameras,
)

QUERIES, GALLERY, PEOPLE = 31, 47, 6


@pytest.fixture(scope="module")
def result() -> TaskResult:
    make = torch.Generator().manual_seed(5)
    sides = torch.randn(QUERIES, 5, generator=make), torch.randn(GALLERY, 5, generator=make)
    pids = [torch.randint(0, PEOPLE, (count,), generator=make) for count in (QUERIES, GALLERY)]
    pids[0][0] = 99  # nobody of the gallery
    camids = [torch.randint(-1, 3, (count,), generator=make) for count in (QUERIES, GALLERY)]
    retrieval = Retrieval(*sides, *pids, *camids)
    ranks = rank_queries(retrieval)
    task = Task("i2i", retrieval, torch.arange(QUERIES), torch.arange(GALLERY))
    return TaskResult("i2i", None, task, ranks, summarise(ranks))


def facts() -> dict[int, Mapping[str, str]]:
    """Of person 5 nothing is known."""
    return {pid: {"coat": ("red", "blue")[pid % 2], "hat": "none" if pid < 4 else "cap"} for pid in range(5)}


def test_scores_by_camera(result: TaskResult) -> None:
    groups = by_camera(result)
    assert list(groups) == sorted(set(result.task.retrieval.query_camid_Q.tolist()))
    for camid, group in groups.items():
        here_Q = (result.task.retrieval.query_camid_Q == camid) & (result.ranks.positives_Q > 0)
        assert group.queries == int(here_Q.sum())
        assert group.rank1 == pytest.approx(100 * float((result.ranks.first_Q[here_Q] == 1).double().mean()))
        assert group.mean_ap == pytest.approx(100 * float(result.ranks.ap_Q[here_Q].mean()))
    total = sum(group.queries for group in groups.values())
    assert total == result.metrics["queries"]
    mean = sum(group.rank1 * group.queries for group in groups.values()) / total
    assert mean == pytest.approx(result.metrics["R1"])


def test_without_cameras_there_are_no_errors_by_camera(result: TaskResult) -> None:
    sides = result.task.retrieval
    plain = Retrieval(sides.query_QD, sides.gallery_GD, sides.query_pid_Q, sides.gallery_pid_G)
    task = Task("t2i", plain, result.task.query_Q, result.task.gallery_G)
    without = TaskResult("t2i", None, task, rank_queries(plain), {})
    assert by_camera(without) == {} and mistaken_cameras(task, find_mistakes(without)) == {}


def test_wrong_first_answers_are_those_of_the_ranking(result: TaskResult) -> None:
    mistakes = find_mistakes(result)
    index_QK, _ = top_matches(result.task.retrieval, 1)
    expected = (result.ranks.first_Q > 1).nonzero().flatten()
    assert mistakes.total == len(expected) > 5
    assert torch.equal(mistakes.query_W, expected) and torch.equal(mistakes.gallery_W, index_QK[expected, 0])
    sides = result.task.retrieval
    assert not (sides.gallery_pid_G[mistakes.gallery_W] == sides.query_pid_Q[mistakes.query_W]).any()
    few = find_mistakes(result, most=4)
    assert few.total == mistakes.total
    assert few.query_W.tolist() == [int(expected[place * len(expected) // 4]) for place in range(4)]


def test_cameras_of_wrong_first_answers(result: TaskResult) -> None:
    mistakes, sides = find_mistakes(result), result.task.retrieval
    pairs = zip(mistakes.query_W.tolist(), mistakes.gallery_W.tolist(), strict=True)
    expected = Counter((int(sides.query_camid_Q[q]), int(sides.gallery_camid_G[g])) for q, g in pairs)
    assert mistaken_cameras(result.task, mistakes) == expected


def test_scores_by_attribute(result: TaskResult) -> None:
    values = by_attribute(result, facts())
    assert list(values) == ["coat", "hat"] and list(values["coat"]) == ["blue", "red"]
    pid_Q = result.task.retrieval.query_pid_Q
    red_Q = torch.isin(pid_Q, torch.tensor([0, 2, 4])) & (result.ranks.positives_Q > 0)
    assert values["coat"]["red"].queries == int(red_Q.sum())
    assert values["coat"]["red"].rank1 == pytest.approx(100 * float((result.ranks.first_Q[red_Q] == 1).double().mean()))
    assert by_attribute(result, {}) == {}


def test_what_wrong_first_answers_are_wrong_in(result: TaskResult) -> None:
    mistakes, sides, known = find_mistakes(result), result.task.retrieval, facts()
    found, count = mistaken_attributes(result.task, mistakes, known)
    pid_Q, pid_G = sides.query_pid_Q.tolist(), sides.gallery_pid_G.tolist()
    pairs = zip(mistakes.query_W.tolist(), mistakes.gallery_W.tolist(), strict=True)
    asked = [(pid_Q[q], pid_G[g]) for q, g in pairs if pid_Q[q] in known and pid_G[g] in known]
    assert count == len(asked) > 3
    for name in ("coat", "hat"):
        wrong = [known[a][name] != known[b][name] for a, b in asked]
        others = [known[a][name] != known[b][name] for a, _ in asked for b in pid_G if b in known and b != a]
        assert found[name].mistaken == pytest.approx(100 * sum(wrong) / len(wrong))
        assert found[name].random == pytest.approx(100 * sum(others) / len(others))
    assert mistaken_attributes(result.task, mistakes, {}) == ({}, 0)


def test_facts_are_found_by_the_name_of_an_identity() -> None:
    assert known_facts(["a:1", "a:2", "a:3"], {"a:3": {"hat": "cap"}, "b:9": {}}) == {2: {"hat": "cap"}}
