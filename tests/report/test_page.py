"""The report as a folder: whole or not there, with everything in it that a benchmark allows, whatever names say."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from reid_dist.data.reader import ShardSet
from reid_dist.data.tokenizer import Tokenizer
from reid_dist.errors import UserError
from reid_dist.evaluation.benchmark import TASKS, extract_benchmark, score_task
from reid_dist.evaluation.reranking.choice import NeighbourJaccard
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.report import figures
from reid_dist.report.document import Table
from reid_dist.report.page import Page, require_page
from reid_dist.report.section import Section
from tests.test_trained import SIZE, make

pytest.importorskip("matplotlib", reason="the extra [plot] is not installed")
Write = Callable[..., Path]
HOSTILE = '"><script>alert(1)</script>'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[DualEncoder, Tokenizer]:
    return make("vit", tmp_path_factory.mktemp("model"))[:2]


@pytest.fixture
def section(tmp_path: Path, write_set: Write, model: tuple[DualEncoder, Tokenizer]) -> Section:
    """A benchmark with all three tasks, cameras and attributes, of a model with token maps."""
    entries = [
        (pid, camera, role, [f"a {word} coat {HOSTILE}"])
        for pid, word in zip("abcdef", ("red", "blue", "a", "person", "red", "coat"), strict=True)
        for camera, role in ((0, "query"), (1, "gallery"), (2, "gallery"))
    ]
    shards = ShardSet(write_set(tmp_path / "set", entries))
    known = {f"toy:{pid}": {"hat": "cap" if pid < "c" else "none", HOSTILE: "yes"} for pid in "abcde"}
    (shards.path / "attributes.json").write_text(json.dumps({"attributes": known}))
    encoder, tokenizer = model
    features = extract_benchmark(encoder, shards, tokenizer, SIZE)
    tasks = [task for make_task in TASKS.values() if (task := make_task(features)) is not None]
    results = [
        score_task(task, how) for task in tasks for how in (None, NeighbourJaccard())[: 2 - (task.kind == "i2i")]
    ]
    return Section(f"toy {HOSTILE}", shards, features, results, "run", encoder, tokenizer, SIZE)


@pytest.fixture
def small(section: Section) -> Section:
    """The same with sentences as queries alone, and without attributes and heat maps."""
    (section.shards.path / "attributes.json").unlink()
    return replace(section, results=section.results[:1], encoder=None)


def write_page(folder: Path, title: str, sections: Iterable[Section], tables: Iterable[Table] = ()) -> None:
    with Page(folder) as page:
        for section in sections:
            page.add(section)
        page.finish(title, list(tables), {"weights": "abc"}, {"results": [title]})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_page_has_everything(tmp_path: Path, section: Section) -> None:
    folder = tmp_path / "new" / "report"
    table = Table(("trained on", HOSTILE), [["x", "1.0"]], title="Cross-domain")
    write_page(folder, f"Evaluation {HOSTILE}", [section], [table])
    assert sorted(path.name for path in folder.iterdir()) == ["pictures", "report.html", "report.md", "results.json"]
    assert json.loads((folder / "results.json").read_text()) == {"results": [f"Evaluation {HOSTILE}"]}
    assert [path.name for path in folder.parent.iterdir()] == ["report"]
    html, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "<script" not in html and "<script" not in markdown
    pictures = sorted(path.name for path in (folder / "pictures").iterdir())
    kinds = {
        "t2i": ("curves", "best", "median", "worst", "attributes", "heat"),
        "i2t": ("curves", "best", "median", "worst", "attributes"),
        "i2i": ("curves", "best", "median", "worst", "attributes", "cameras", "heat"),
    }
    assert len(pictures) == sum(map(len, kinds.values()))
    for kind, wanted in kinds.items():
        for what in wanted:
            assert any(name.endswith(f"{kind}-{what}.png") for name in pictures), (kind, what)
    assert sorted(re.findall(r'src="pictures/([a-z0-9-]+\.png)"', html)) == pictures
    assert sorted(re.findall(r"\]\(pictures/([a-z0-9-]+\.png)\)", markdown)) == pictures
    for name in pictures:
        with Image.open(folder / "pictures" / name) as image:
            image.load()
            assert f'width="{image.width}" height="{image.height}"' in html
    assert "jaccard(neighbours=5, weight=0.05)" in html and "Cross-domain" in html and "abc" in html
    for result in section.results:
        assert f"{result.metrics['mAP']:.1f}" in html
    # What names a file elsewhere is no part of the page: it can be moved.
    assert str(tmp_path) not in html + markdown


def test_the_same_results_give_the_same_page_in_place_of_the_old(tmp_path: Path, small: Section) -> None:
    folder = tmp_path / "report"
    write_page(folder, "first", [small, small])
    first = files(folder)
    write_page(folder, "other", [small])
    assert len(files(folder)) < len(first)
    (tmp_path / "link").symlink_to(folder)
    write_page(tmp_path / "link", "first", [small, small])
    assert files(folder) == first and (tmp_path / "link").is_symlink()
    assert sum("curves" in name for name in first) == 1  # two models of one benchmark are compared in one plot
    assert sum(name.endswith("best.png") for name in first) == 1 and any("best-2" in name for name in first)


def test_a_failure_leaves_the_old_report(tmp_path: Path, small: Section) -> None:
    folder = tmp_path / "report"
    write_page(folder, "first", [small])
    first = files(folder)

    def sections() -> Iterator[Section]:
        yield small
        raise UserError("the second benchmark fails")

    with pytest.raises(UserError, match="second benchmark"):
        write_page(folder, "first", sections())
    assert files(folder) == first and not [path for path in tmp_path.iterdir() if path.name.startswith(".report")]


def test_only_a_report_is_replaced(tmp_path: Path) -> None:
    require_page(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    require_page(tmp_path / "empty")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "report.html").touch()
    (photos / "results.json").touch()
    require_page(photos)
    (photos / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"--report .*photos: holds something else than a report"):
        require_page(photos)
    with pytest.raises(UserError, match=r"holiday\.jpg: is no folder"):
        require_page(photos / "holiday.jpg")


def test_without_matplotlib_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=r"^plots: matplotlib is missing: install the extra: pip install -e '\.\[plot\]'$"
    ):
        require_page(tmp_path / "report")


def test_a_model_without_places_says_so(
    tmp_path: Path, section: Section, tmp_path_factory: pytest.TempPathFactory
) -> None:
    encoder, tokenizer, _ = make("dictionary", tmp_path_factory.mktemp("resnet"))
    plain = [result for result in section.results if result.kind == "i2i"]
    write_page(tmp_path / "report", "t", [replace(section, results=plain, encoder=encoder, tokenizer=tokenizer)])
    text = (tmp_path / "report" / "report.md").read_text()
    assert "No heat maps: its image tower (ResNetTower) has no tokens" in text
    assert not list((tmp_path / "report" / "pictures").glob("*heat*"))


def test_a_perfect_model_and_unknown_cameras_can_be_drawn(tmp_path: Path, write_set: Write) -> None:
    entries = [(pid, -1, role, []) for pid in "ab" for role in ("query", "gallery")]

    class Colour:
        def encode_image(self, image_BCHW: torch.Tensor) -> torch.Tensor:
            return image_BCHW.float().mean((2, 3)) - 60

        encode_text = encode_image

    shards = ShardSet(write_set(tmp_path / "set", entries))
    features = extract_benchmark(Colour(), shards, None, SIZE)
    result = score_task(TASKS["i2i"](features))
    assert result.metrics["R1"] == 100
    write_page(tmp_path / "report", "t", [Section("two people", shards, features, [result])])
    assert "unknown" in (tmp_path / "report" / "report.md").read_text()
