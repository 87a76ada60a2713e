"""The command draws maps of every kind of model that has them, and refuses the others in one line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reid_dist.heat_maps import main
from tests.test_trained import make

pytest.importorskip("matplotlib", reason="the extra [plot] is not installed")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(kind, tmp_path_factory.mktemp(kind))[2] for kind in ("vit", "row_conv", "dictionary")}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("kind", ["vit", "row_conv"])
def test_every_question_gives_a_picture(kind: str, runs: dict[str, Path], photo: Path, tmp_path: Path) -> None:
    questions = {"text": ["--text", "a person in a red coat"], "alone": [], "like": ["--like", str(photo)]}
    sizes = {}
    for name, question in questions.items():
        out = tmp_path / "new" / f"{name}.png"
        assert main([str(runs[kind]), "--image", str(photo), *question, "--out", str(out)]) == 0
        with Image.open(out) as image:
            image.load()
            sizes[name] = image.size
    assert all(width > 500 and height > 100 for width, height in sizes.values())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["alone.png", "like.png", "text.png"]


def test_wrong_input_is_told_in_one_line(
    runs: dict[str, Path], photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    cases = [
        ([str(runs["dictionary"]), "--image", str(photo)], "no heat maps: its image tower (ResNetTower)"),
        ([str(runs["vit"]), "--image", str(tmp_path / "none.jpg")], "none.jpg: cannot be read (No such file"),
        ([str(runs["vit"]), "--image", str(photo), "--text", "  "], "--text: the sentence is empty"),
        ([str(runs["vit"]), "--image", str(runs["vit"] / "config.yaml")], "config.yaml: the image does not decode"),
        ([str(tmp_path), "--image", str(photo)], "no exported model"),
    ]
    for arguments, message in cases:
        assert main([*arguments, "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("heat_maps: ") and error.count("\n") == 1
    assert main([str(runs["vit"]), "--image", str(photo), "--out", str(tmp_path / "out.jpg")]) == 2
    assert "name a file that ends in .png" in capsys.readouterr().err
    assert not out.exists()


def test_words_that_the_model_does_not_know_leave_the_sentence(
    runs: dict[str, Path], photo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.png"
    assert main([str(runs["vit"]), "--image", str(photo), "--text", "zebra " * 1000, "--out", str(out)]) == 0
    assert out.stat().st_size > 1000
