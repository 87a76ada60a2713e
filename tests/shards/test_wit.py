"""WIT: tars as img2dataset writes them, and the TSV with local images."""

import csv
import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards import wit

HEADER = [
    "language", "page_url", "image_url", "page_title", "section_title", "hierarchical_section_title",
    "caption_reference_description", "caption_attribution_description", "caption_alt_text_description", "mime_type",
    "original_height", "original_width", "is_main_image", "attribution_passes_lang_id", "page_changed_recently",
    "context_page_description", "context_section_description",
]  # fmt: skip
BASE = "https://upload.wikimedia.org/wikipedia/commons/"


def _row(language: str, url: str, reference: str, alt: str = "", context: str = "") -> list[str]:
    values = {"language": language, "image_url": url, "caption_reference_description": reference,
              "caption_alt_text_description": alt, "caption_attribution_description": "English: by someone",
              "context_page_description": context}  # fmt: skip
    return [values.get(name, "") for name in HEADER]


ROWS = [
    _row("en", BASE + "a/ab/A.jpg", "The house.", "a red house"),
    _row("de", BASE + "a/ab/A.jpg", "Das Haus."),
    _row("en", BASE + "b/b1/B.jpg", "", "", 'with "quotes",\na line break\tand a tab'),
    _row("en", BASE + "c/c1/Ü.PNG", "Ünder"),
    _row("en", BASE + "a/ab/A.jpg", "The house.", "seen again"),
    _row("en", BASE + "d/d1/D.jpg", "not here"),
    _row("fr", BASE + "b/b1/B.jpg", "La chose."),
]


def _save(path: Path, rows: list[list[str]], header: list[str] = HEADER) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerows([header, *rows])
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def _name(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


@pytest.fixture
def root(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> Path:
    root = tmp_path / "wit"
    for number, (place, suffix) in enumerate([("a/ab/A.jpg", ".jpg"), ("b/b1/B.jpg", ".jpg"), ("c/c1/Ü.PNG", ".png")]):
        draw_at(root / "images" / f"{number}" / f"{_name(BASE + place)}{suffix}", number)
    draw_at(root / "images" / "other.jpg", 7)
    _save(root / "wit_v1.train.all-00000-of-00002.tsv.gz", ROWS[:4])
    _save(root / "wit_v1.train.all-00001-of-00002.tsv", ROWS[4:])
    return root


def test_english_rows(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = list(wit.samples(root, "en"))
    assert [(sample.source, sample.captions) for sample in samples] == [
        (f"images/0/{_name(BASE + 'a/ab/A.jpg')}.jpg", ("The house.", "a red house", "seen again")),
        (f"images/2/{_name(BASE + 'c/c1/Ü.PNG')}.png", ("Ünder",)),
    ]
    assert {(sample.pid, sample.camid, sample.split) for sample in samples} == {(None, -1, "train")}
    line = capsys.readouterr().out
    assert "2 in other languages" in line and "1 without a caption" in line and "1 without an image here" in line


def test_all_languages(root: Path) -> None:
    captions = [sample.captions for sample in wit.samples(root, "all")]
    assert captions == [("The house.", "a red house", "Das Haus.", "seen again"), ("Ünder",), ("La chose.",)]


def test_tars(root: Path) -> None:
    image = next((root / "images").rglob("*.jpg")).read_bytes()
    members = {
        "0.jpg": image, "0.txt": b"no language", "1.jpg": image, "1.json": b'{"caption": "it", "language": "it"}',
        "2.jpg": image, "2.json": b'{"caption": "english", "language": "en"}',
    }  # fmt: skip
    with tarfile.open(root / "00000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert [sample.captions for sample in wit.samples(root, "en")][:2] == [("no language",), ("english",)]
    assert len(list(wit.samples(root, "all"))) == 6
    for path in root.glob("*.tsv*"):
        path.unlink()
    samples = list(wit.samples(root, "en"))  # images of the TSV alone are not read
    assert [sample.source for sample in samples] == ["00000/0.jpg", "00000/2.jpg"]
    assert samples[1].image.read() == image


def test_broken_tables(root: Path) -> None:
    path = root / "wit_v1.train.all-00001-of-00002.tsv"
    _save(path, [ROWS[4], ROWS[5][:-1]])
    with pytest.raises(UserError, match=r"00001-of-00002\.tsv: line 3: 16 columns instead of 17"):
        list(wit.samples(root, "en"))
    _save(path, [], HEADER[:5])
    with pytest.raises(UserError, match=r"has no column caption_reference_description, caption_alt_text_description"):
        list(wit.samples(root, "en"))
    path.write_bytes(b"")
    with pytest.raises(UserError, match="has no column language"):
        list(wit.samples(root, "en"))
    _save(path, [_row("en", BASE, "x" * 1_500_000)])
    with pytest.raises(UserError, match=r"line 2: field larger than field limit"):
        list(wit.samples(root, "en"))
    path.write_bytes("\t".join(HEADER).encode() + b"\n\xff\xfe\n")
    with pytest.raises(UserError, match="not UTF-8"):
        list(wit.samples(root, "en"))


def test_broken_gzip(root: Path) -> None:
    path = root / "wit_v1.train.all-00000-of-00002.tsv.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-30], b"language\timage_url\n", whole[:-6] + bytes(6)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"\.tsv\.gz: .*damaged .*; get the file again") as caught:
            list(wit.samples(root, "en"))
        assert "\n" not in str(caught.value)


def test_a_gzip_bomb_is_read_no_further_than_a_line_may_be_long(root: Path) -> None:
    (root / "wit_v1.train.all-00000-of-00002.tsv.gz").write_bytes(gzip.compress(b"x" * 50_000_000))
    with pytest.raises(UserError, match="line 1: more than 4000000 characters"):
        list(wit.samples(root, "en"))


def test_wrong_trees(root: Path, tmp_path: Path, draw_at: Callable[[Path, int], None]) -> None:
    draw_at(root / "images" / "9" / f"{_name(BASE + 'a/ab/A.jpg')}.png", 3)
    with pytest.raises(UserError, match="the same name as"):
        list(wit.samples(root, "en"))
    (root / "images").rename(root / "pictures")
    with pytest.raises(UserError, match="no row has its image below images/"):
        list(wit.samples(root, "en"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither tars nor"):
        list(wit.samples(tmp_path / "empty", "en"))
