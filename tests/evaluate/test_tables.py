"""Tables, means over seeds, the cross-domain matrix and the selection, from rows written by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError
from reid_dist.evaluate.benchmarks import Benchmark
from reid_dist.evaluate.candidates import Candidate
from reid_dist.evaluate.records import Row
from reid_dist.evaluate.selection import Criterion, parse_criterion, select
from reid_dist.evaluate.tables import (
    matrix_tables,
    score_tables,
    seed_means,
    seed_notes,
    seed_table,
    selection_table,
)
from reid_dist.evaluate.training_data import TrainingData
from reid_dist.evaluation.reranking.choice import NeighbourJaccard
from reid_dist.report.document import as_html, as_text


def row(model: str, benchmark: str, r1: float, mean_ap: float = 10.0, task: Any = "t2i", way: Any = None) -> Row:
    metrics = {"R1": r1, "R5": 50.0, "R10": 60.0, "mAP": mean_ap, "mINP": 5.0, "tied": 0.0}
    return Row(model, benchmark, "test", task, way, metrics | {"queries": 7.0, "skipped": 1.0}, 20, 0.1, "2026-11-21")


def candidate(name: str, seed: int | None = 0, family: str | None = "f", training: Any = None) -> Candidate:
    return Candidate(name, Path(name), {}, training or TrainingData(["x"]), seed, family, None)


def test_re_ranked_rows_stand_apart_with_their_parameters() -> None:
    plain, re_ranked = score_tables([row("a", "x", 30), row("a", "x", 40, way=NeighbourJaccard(3, 0.5))])
    assert [cells[3] for cells in (*plain.rows, *re_ranked.rows)] == ["cosine", "jaccard(neighbours=3, weight=0.5)"]
    lines = as_text(plain).splitlines()
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    assert lines[0] == "Scores" and "| 30.0 |" in lines[4] and "rectangular AP, ties pessimistic" in lines[-1]
    assert len(score_tables([row("a", "x", 30)])) == 1


def test_mean_and_deviation_over_seeds() -> None:
    family = [candidate("a", 0), candidate("b", 1), candidate("c", 2), candidate("other", 0, "g")]
    rows = [row(name, "x", r1) for name, r1 in (("a", 30), ("b", 33), ("c", 39), ("other", 90))]
    rows += [row(name, "x", 50, way=NeighbourJaccard()) for name in "abc"]
    plain, re_ranked = seed_means(family, rows)
    assert plain.models == ["a", "b", "c"] and plain.mean["R1"] == 34 and plain.std["R1"] ** 2 == pytest.approx(21)
    assert re_ranked.row.reranking == NeighbourJaccard() and re_ranked.std["R1"] == 0
    (table,) = seed_table([plain])
    assert table.rows[0][4] == "34.0 ± 4.6"
    assert seed_notes(family) == []
    twice = [candidate("a", 0), candidate("b", 1), candidate("c", 1), candidate("other", 0, "g")]
    assert seed_means(twice, rows) == []  # twice one seed tells nothing of seeds
    (note,) = seed_notes(twice)
    assert note.startswith("a, b, c: ") and "(0, 1, 1) there is no mean" in note
    assert seed_means([candidate("a", 0, None), candidate("b", 1, None)], rows) == [] == seed_table([])


def test_matrix_of_training_and_test_sets(world: Path) -> None:
    market, pedes = ShardSet(world / "market1501"), ShardSet(world / "cuhk_pedes")
    from_market = TrainingData(["market1501"], [(market, None)])  # type: ignore[list-item]
    models = [candidate("a", training=from_market), candidate("b")]
    asked = [Benchmark("m", market, "test", ("i2i",)), Benchmark("p", pedes, "test", ("i2i", "t2i"))]
    rows = [row("a", "m", 1, 2, "i2i"), row("a", "p", 3, 4, "i2i"), row("b", "m", 5, 6, "i2i"), row("a", "p", 7)]
    (table,) = matrix_tables(models, asked, [*rows, row("b", "p", 9, way=NeighbourJaccard())])
    assert table.head == ["model", "trained on", "m (test)", "p (test)"]
    assert table.rows == [["a", "market1501", "*1.0 / 2.0", "3.0 / 4.0"], ["b", "x", "5.0 / 6.0", "n/a"]]
    assert matrix_tables(models[:1], asked, rows) == [] == matrix_tables(models, asked[:1], rows)


def test_the_best_mean_is_chosen_and_of_equal_ones_the_first() -> None:
    rows = [row("a", "x", 0, 20), row("b", "x", 0, 40), row("a", "y", 0, 50), row("b", "y", 0, 30)]
    selection = select(rows, Criterion("t2i", "mAP"))
    assert selection.values == {"a": 35, "b": 35} and selection.chosen == "a" and selection.benchmarks == ["x", "y"]
    better = [*rows[:3], replace(rows[3], metrics=rows[3].metrics | {"mAP": 31.0})]
    selection = select(better, Criterion("t2i", "mAP"))
    assert selection.chosen == "b"
    assert "| b     | chosen |          35.50 |" in as_text(selection_table(selection))


def test_columns_of_text_are_text_in_the_report(world: Path) -> None:
    sets = [Benchmark(name, ShardSet(world / "market1501"), "test", ("t2i",)) for name in "xy"]
    models = [candidate("a", 0), candidate("b", 1)]
    rows = [row(model.name, each.name, 12.3) for model in models for each in sets]
    tables = [*score_tables(rows), *seed_table(seed_means(models, rows)), *matrix_tables(models, sets, rows)]
    tables.append(selection_table(select(rows, Criterion("t2i", "mAP"))))
    assert [table.texts for table in tables] == [4, 4, 2, 2]
    for table in tables:
        shown = as_html("t", [table])
        for name, is_number in zip(table.head, (place >= table.texts for place in range(99)), strict=False):
            assert f'<th class="{"number" if is_number else "text"}">{name}</th>' in shown
            cells = [line[list(table.head).index(name)] for line in table.rows]
            assert is_number == all(cell[0].isdigit() for cell in cells if cell), name


def test_a_criterion_is_task_and_metric() -> None:
    assert parse_criterion("i2t.R10") == Criterion("i2t", "R10")
    with pytest.raises(UserError, match=r"--select t2i\.map: unknown; did you mean t2i\.mAP"):
        parse_criterion("t2i.map")
    with pytest.raises(UserError, match=r"it is TASK\.METRIC, of t2i, i2t, i2i and R1, R5"):
        parse_criterion("loss")
