"""The results that are kept in docs/ say what the measured ones say."""

import json
from pathlib import Path
from typing import Any

import pytest

from reid_dist.claims.matrix import ARMS, CLAIMS
from reid_dist.claims.report import claims_page

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "results" / "claims.json"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def test_the_page_is_generated_from_the_numbers(results: dict[str, Any]) -> None:
    assert FILE.with_suffix(".md").read_text() == claims_page(results, "claims.png")


def test_all_arms_and_claims_were_run(results: dict[str, Any]) -> None:
    assert set(results["arms"]) == set(ARMS) and len(results["seeds"]) == 5 and not results["fast"]
    assert [claim["name"] for claim in results["claims"]] == [claim.name for claim in CLAIMS]


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("supported", "Supported: {}; "),
        ("contradicted", "contradicted there: {}; "),
        ("within noise", "within noise: {}."),
    ],
)
def test_the_readme_names_the_verdicts(results: dict[str, Any], verdict: str, words: str) -> None:
    names = ", ".join(claim["name"] for claim in results["claims"] if claim["verdict"] == verdict)
    assert words.format(names) in (ROOT / "README.md").read_text()
