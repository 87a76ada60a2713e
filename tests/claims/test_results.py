"""From the scores of arms to verdicts, page and plot."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from reid_dist.claims.accounting import Cost
from reid_dist.claims.arms import Arm, Claim, Row
from reid_dist.claims.matrix import ARMS, CLAIMS
from reid_dist.claims.report import claims_page, claims_table, why, write_report
from reid_dist.claims.results import claim_entry, collect
from reid_dist.claims.running import COST_FILE, STAGE, Settings
from reid_dist.claims.worlds import WORLD_FILE, Sizes

SEEDS = range(5)
CLAIM = Claim(
    "X1", "a is better than b.", "nowhere", "all",
    (
        Row("first", "a", "b", "i2i"),
        Row("first", "a", "c", "t2i"),
        Row("first", "a", "d", "t2i"),
        Row("first", "c", "d", "t2i", decides=False),
        Row("second", "b", "c", "t2i"),
    ),
    "everything",
)  # fmt: skip
COSTS = {
    "a": Cost(i2i=10, t2i=10, total=20, updates=2),
    "b": Cost(i2i=20, t2i=0, total=20, updates=1),  # equal in all passes
    "c": Cost(i2i=0, t2i=10, total=10, updates=2),  # equal in passes of t2i and updates
    "d": Cost(i2i=0, t2i=20, total=20, updates=2),  # equal in all passes and updates
}


def scores(**levels: float) -> dict[str, Any]:
    """mAP rises with the arm's level, by the same for all seeds; R1 is its double."""
    return {
        arm: {
            seed: {task: {"mAP": level + seed, "R1": 2 * (level + seed)} for task in ("t2i", "i2i")} for seed in SEEDS
        }
        for arm, level in levels.items()
    }


def test_rows_are_judged_and_put_together_by_accounting() -> None:
    entry = claim_entry(CLAIM, scores(a=9, b=5, c=12, d=7), COSTS)
    first = entry["settings"]["first"]
    assert [row["mAP"]["verdict"] for row in first["rows"]] == ["supported", "contradicted", "supported", "supported"]
    assert [row["mAP"]["mean"] for row in first["rows"]] == [4, -3, 2, 5]
    assert [row["R1"]["mean"] for row in first["rows"]] == [8, -6, 4, 10]
    assert [row["equal_in"] for row in first["rows"]] == [
        ["total"],
        ["task", "updates"],
        ["total", "updates"],
        ["updates"],
    ]
    assert first["verdicts"] == {"total": "supported", "task": "contradicted", "updates": "contradicted"}
    assert entry["verdict"] == "supported"
    assert entry["decided_by"] == {"setting": "first", "accounting": "total"}
    assert entry["settings"]["second"]["verdicts"] == {"total": None, "task": None, "updates": None}


def test_a_row_that_explains_decides_nothing() -> None:
    entry = claim_entry(CLAIM, scores(a=9, b=5, c=6, d=7), COSTS)
    first = entry["settings"]["first"]
    assert first["rows"][3]["mAP"]["verdict"] == "contradicted" and first["rows"][3]["equal_in"] == ["updates"]
    assert first["verdicts"] == {"total": "supported", "task": "supported", "updates": "supported"}


def test_an_accounting_without_rows_leaves_the_decision_to_the_next() -> None:
    entry = claim_entry(CLAIM, scores(a=9, c=12), COSTS)
    assert entry["decided_by"] == {"setting": "first", "accounting": "task"}
    assert entry["verdict"] == "contradicted"


def test_a_claim_whose_deciding_arms_were_not_run_has_no_verdict() -> None:
    entry = claim_entry(CLAIM, scores(b=1, c=2), COSTS)
    assert entry["verdict"] is None and entry["decided_by"] is None
    assert list(entry["settings"]) == ["second"]
    assert why(entry) == "The arms that decide were not run."


def test_pairs_are_of_one_seed() -> None:
    """Differences of every seed, not of means: the scatter of the seeds themselves must cancel."""
    entry = claim_entry(CLAIM, scores(a=1.0, b=0.5), COSTS)
    judged = entry["settings"]["first"]["rows"][0]["mAP"]
    assert judged["values"] == tuple([0.5] * 5)
    assert judged["error"] == 0
    assert judged["verdict"] == "supported"


def test_the_sentence_says_what_decides_with_its_numbers() -> None:
    assert why(claim_entry(CLAIM, scores(a=9, b=5, c=12, d=10), COSTS)) == (
        "For it: I2I mAP of `a` +4.0 ± 0.0 against `b` (5 of 5 seeds); against it: T2I mAP of `a` -1.0 ± 0.0 against"
        " `d` (5 of 5 seeds)."
    )
    assert why(claim_entry(CLAIM, scores(a=9, b=9, d=7), COSTS)) == (
        "For it: T2I mAP of `a` +2.0 ± 0.0 against `d` (5 of 5 seeds); too close to tell: I2I mAP of `a` +0.0 ± 0.0"
        " against `b` (0 of 5 seeds)."
    )


def finish(settings: Settings, arm: Arm, seed: int, level: float) -> None:
    """The files that a finished arm leaves."""
    folder = settings.run_folder(arm.name, seed)
    (folder / STAGE).mkdir(parents=True)
    metrics = {"mAP": level + seed, "R1": level + seed + 1}
    sets = {"t2i": {"cuhk_pedes": metrics, "cuhk_unseen": {"mAP": 1.0, "R1": 2.0}}, "i2i": {"market1501": metrics}}
    sets["t2i_reranked"] = {"cuhk_pedes": {**metrics, "mAP": level + seed + 0.5}}
    (folder / STAGE / "metrics.json").write_text(json.dumps({"name": STAGE, "split": "test", "seconds": 1.0, **sets}))
    points = [{"step": 10, "loss": 1.0, "conflict/all": 0.25, "conflict/stem": 0.5}, {"step": 20, "loss": 1.0}]
    points.append({"step": 30, "loss": 1.0, "conflict/all": 0.75, "conflict/stem": -0.5})
    watched = "conflict_every" in arm.stage.get("loss", {})
    history = points if watched else [{"step": 10, "loss": 1.0}]
    (folder / STAGE / "training.json").write_text(json.dumps(history))
    (folder / COST_FILE).write_text(json.dumps({"seconds": 3.0, "cpu_seconds": 2.0}))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of all arms; later ones are better."""
    recipe = Path(__file__).parents[2] / "configs" / "claims.yaml"
    settings = Settings(recipe, (), tmp_path_factory.mktemp("runs"), "claims", Sizes.of(400))
    for seed in SEEDS:
        settings.world(seed).mkdir(parents=True)
        pair = {"t2i": {"mAP": 1.0, "R1": 2.0}, "i2i": None}
        (settings.world(seed) / WORLD_FILE).write_text(json.dumps({"limits": {"ridge": pair}}))
        for place, arm in enumerate(ARMS.values()):
            finish(settings, arm, seed, 10 + place)
    return collect(settings, CLAIMS, [*ARMS.values()], SEEDS)


def test_everything_is_collected(results: dict[str, Any]) -> None:
    assert list(results["arms"]) == list(ARMS)
    assert [claim["name"] for claim in results["claims"]] == [claim.name for claim in CLAIMS]
    assert all(claim["verdict"] for claim in results["claims"])
    assert results["arms"]["base"]["scores"]["unseen"] == {"mAP": [1.0] * 5, "R1": [2.0] * 5}
    assert results["arms"]["base"]["scores"]["t2i"]["mAP"] == [10.0, 11.0, 12.0, 13.0, 14.0]
    joint = results["arms"]["joint-double"]
    assert joint["gradient_cosine"] == {"all": [0.5] * 5, "stem": [0.0] * 5}
    assert "gradient_cosine" not in results["arms"]["joint"]
    assert joint["steps"] == 200 and joint["passes"]["total"] == 200 * 64
    assert results["world"]["instance"] == 0.5 and results["world"]["hardness"] == 0.6
    rerank = next(claim for claim in results["claims"] if claim["name"] == "D4")
    (setting,) = rerank["settings"].values()
    assert all(row["mAP"]["values"] == (0.5,) * 5 for row in setting["rows"])


def test_the_page_holds_every_claim_arm_and_number_and_reads_only_the_results(results: dict[str, Any]) -> None:
    page = claims_page(json.loads(json.dumps(results)), "claims.png")
    for claim in CLAIMS:
        assert f"## {claim.name}: {claim.text}" in page and claim.differs in page
    for name, arm in ARMS.items():
        assert f"| `{name}` | {arm.about} |" in page
    assert "![Paired differences of every comparison](claims.png)" in page
    tables = re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)
    assert len(tables) > len(CLAIMS)
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_files_are_written_and_the_same_each_time(results: dict[str, Any], tmp_path: Path) -> None:
    results = {**results, "claims": results["claims"][:2]}
    first = write_report(results, tmp_path / "one" / "claims.json")
    assert [path.name for path in first] == ["claims.json", "claims.md", "claims.png"]
    second = write_report(json.loads(first[0].read_text()), tmp_path / "two" / "claims.json")
    assert first[0].read_bytes() == second[0].read_bytes()
    assert first[1].read_bytes() == second[1].read_bytes()
    assert first[2].read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_plot(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [path.name for path in write_report(results, tmp_path / "claims.json")] == ["claims.json", "claims.md"]
    assert ".png" not in (tmp_path / "claims.md").read_text()


def test_the_table_has_a_line_for_each_claim(results: dict[str, Any]) -> None:
    lines = claims_table(results).splitlines()
    assert len(lines) == 2 + len(CLAIMS)
    assert all(f"| {claim.name} |" in line for claim, line in zip(CLAIMS, lines[2:], strict=True))
