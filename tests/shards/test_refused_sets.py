"""DukeMTMC and what was made from it are refused by name, whatever the spelling."""

from pathlib import Path

import pytest

from shards.write import main


@pytest.mark.parametrize(
    "name",
    [
        "dukemtmc",
        "duke",
        "DukeMTMC-reID",
        "dukemtmc_reid",
        "DukeMTMC4ReID",
        "Occluded-Duke",
        "occluded_duke",
        "Occluded-DukeMTMC",
        "P-DukeMTMC-reID",
        "Partial-Duke",
        "DukeMTMC-attribute",
        "DukeMTMC-VideoReID",
        "DukeMTMC-Video",
        "duke2market",
    ],
)
def test_duke_is_refused_with_the_reason(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {name}: refused.") and error.count("\n") == 1
    assert "without the consent of the people" in error and "withdrawn in 2019" in error
    assert not (tmp_path / "out").exists()
