"""A small setting of the claims, and scores that look like those of finished arms."""

from pathlib import Path

import pytest

from reid_dist.claims.accounting import Cost
from reid_dist.claims.matrix import ARMS
from reid_dist.claims.results import arm_costs
from reid_dist.claims.running import Settings
from reid_dist.claims.worlds import Sizes

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the paths of the recipe are relative to."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(Path("configs/claims.yaml"), (), tmp_path, "claims", Sizes.of(16))


@pytest.fixture(scope="session")
def costs() -> dict[str, Cost]:
    """What every arm of the shipped recipe costs."""
    recipe = ROOT / "configs" / "claims.yaml"
    return arm_costs(Settings(recipe, (), Path("runs/claims"), "claims", Sizes.of(400)), [*ARMS.values()])
