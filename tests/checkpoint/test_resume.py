"""Which checkpoint a run goes on from."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.checkpoint.manifest import MANIFEST_FILE, step_folder
from reid_dist.checkpoint.resume import Resume, choose
from reid_dist.errors import UserError
from tests.checkpoint import states


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints of steps 1, 2, 3."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    states.save(folder, 1, 2, 3)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_the_latest_is_taken(folder: Path) -> None:
    for resume in ("auto", "must", folder, step_folder(folder, 3)):
        assert choose(folder, resume) == step_folder(folder, 3)
    assert choose(folder, "never") is None
    assert choose(folder / "elsewhere", step_folder(folder, 1)) == step_folder(folder, 1)


def test_what_latest_names_counts_and_no_time_does(folder: Path) -> None:
    for step in (1, 2, 3):
        os.utime(step_folder(folder, step), (10 - step, 10 - step))
    os.utime(folder / "latest", (0, 0))
    assert choose(folder, "auto") == step_folder(folder, 3)
    (folder / "latest").write_text("step-00000002")  # killed between the folder's rename and this one
    assert choose(folder, "auto") == step_folder(folder, 2)
    (folder / "latest").unlink()  # the same at the first save
    assert choose(folder, "auto") == step_folder(folder, 3)


def test_none_is_there(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert choose(folder, "auto") is None
        with pytest.raises(UserError, match=f"{folder}: no checkpoint there"):
            choose(folder, "must")
        with pytest.raises(UserError, match=f"{folder}: no checkpoint there"):
            choose(tmp_path, folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "latest").write_text(""), "latest: empty"),
        (lambda folder: (folder / "latest").write_text("step-00000009\n"), "'step-00000009', which is not there"),
        (lambda folder: (folder / "latest").write_text("../../etc"), "is not there"),
        (lambda folder: (folder / "latest").write_bytes(b"\xff\xfe"), "is not there"),
        (lambda folder: shutil.rmtree(step_folder(folder, 3)), "'step-00000003', which is not there"),
        (lambda folder: (step_folder(folder, 3) / MANIFEST_FILE).unlink(), "'step-00000003', which has no manifest"),
    ],
)
@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_wrong_latest_is_refused_by_name(
    folder: Path, damage: Callable[[Path], object], words: str, resume: Resume, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    with pytest.raises(UserError, match=f"^{folder}/latest: .*--fallback") as raised:
        choose(folder, resume)
    assert words in str(raised.value)
    newest = max(path for path in folder.glob("step-*") if (path / MANIFEST_FILE).is_file())
    assert choose(folder, resume, fallback=True) == newest


def _flip(folder: Path, step: int) -> None:
    path = step_folder(folder, step) / "rank-00000-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_only_a_flag_falls_back_and_it_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _flip(folder, 3)
    assert choose(folder, "auto") == step_folder(folder, 3)  # to be refused when it is opened
    assert choose(folder, "auto", fallback=True) == step_folder(folder, 2)
    line = capsys.readouterr().out
    assert f"goes on from {step_folder(folder, 2)}, because {step_folder(folder, 3)}/rank-00000-of-00001.safe" in line
    _flip(folder, 2)
    assert choose(folder, step_folder(folder, 3), fallback=True) == step_folder(folder, 1)
    _flip(folder, 1)
    with pytest.raises(UserError, match=r"no good checkpoint left; .*step-00000003"):
        choose(folder, "auto", fallback=True)


def test_a_good_latest_needs_no_fallback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _flip(folder, 2)
    assert choose(folder, "auto", fallback=True) == step_folder(folder, 3)
    assert capsys.readouterr().out == ""


def _chosen(folder: Path, fallback: bool) -> str:
    try:
        return str(choose(folder, "auto", fallback))
    except UserError as error:
        return f"refused: {error}"


def test_all_ranks_agree(folder: Path, run_ranks: Callable) -> None:
    _flip(folder, 3)
    assert run_ranks(3, _chosen, folder, True) == [str(step_folder(folder, 2))] * 3
    (folder / "latest").write_text("")
    found = run_ranks(2, _chosen, folder, False)
    assert found[0] == found[1] and found[0].startswith(f"refused: {folder}/latest: empty")


def test_what_killed_saves_have_left_is_cleared(folder: Path) -> None:
    (folder / ".step-00000004.reid_dist-partial").mkdir()
    (folder / ".step-00000004.reid_dist-partial" / "rank-00000-of-00001.json").write_text("{")
    (folder / ".latest.reid_dist-partial").write_text("step")
    step_folder(folder, 3).rename(folder / ".step-00000003.reid_dist-old")  # killed while it was being replaced
    shutil.copytree(step_folder(folder, 2), folder / ".step-00000002.reid_dist-old")
    assert choose(folder, "auto") == step_folder(folder, 3)
    assert sorted(path.name for path in folder.iterdir()) == [
        "latest",
        *(f"step-0000000{step}" for step in (1, 2, 3)),
    ]
