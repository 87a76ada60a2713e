"""LUPerson-MLLM: images and four caption files that meet in the base name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from reid_dist.errors import UserError
from shards import luperson_mllm
from shards.raw import Counts, count_parts

CAPTIONS = {
    "Ts-qwen": {"/data0/part1/a.jpg": "a man", "part2/b.jpg": "a woman"},
    "Td-qwen": {"other/a.jpg": "The [clothing description] of a man", "b.jpg": " a lady "},
    "Ts-shikra": {"a.jpg": "he wears a coat", "b.jpg": "she has <ph> bag", "gone.jpg": "not here"},
    "Td-shikra": {"a.jpg": "", "c.jpg": "<"},
}


@pytest.fixture
def root(tmp_path: Path, draw_at: Callable[[Path, int], None]) -> Path:
    for number, name in enumerate(["a", "b", "c", "d"]):
        draw_at(tmp_path / "LUPerson-MLLM" / f"{name}.jpg", number)
    (tmp_path / "LUPerson-MLLM" / "list.txt").write_text("x")
    for name, captions in CAPTIONS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(captions))
    return tmp_path


def test_samples(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = list(luperson_mllm.samples(root, "standard"))
    assert [(sample.source, sample.captions) for sample in samples] == [
        ("LUPerson-MLLM/a.jpg", ("a man", "he wears a coat")),
        ("LUPerson-MLLM/b.jpg", ("a woman", "a lady")),
    ]
    assert {(sample.pid, sample.camid, sample.split) for sample in samples} == {(None, -1, "train")}
    assert count_parts(samples, luperson_mllm) == {"train": Counts(2, 2, 4, 0)}
    assert "left out 3 captions that show their template and 2 images without a caption" in capsys.readouterr().out


def test_captions_in_their_own_folder(root: Path) -> None:
    (root / "caption").mkdir()
    for name in CAPTIONS:
        (root / f"{name}.json").rename(root / "caption" / f"{name}.json")
    assert len(list(luperson_mllm.samples(root, "standard"))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"x/a.jpg": "one", "y/a.jpg": "two"}', "'y/a.jpg': a second path with this base name"),
        ('{"a.jpg": "one", "a.jpg": "two"}', "the key 'a.jpg' occurs twice"),
        ('{"a.jpg": ["one"]}', "'a.jpg': caption: Input should be a valid string"),
        ('{"a.jpg": "\\udc00"}', "'a.jpg': caption: .*surrogates"),
        ('[{"a.jpg": "one"}]', "not an object"),
        ('{"a.jpg": ', "not JSON"),
    ],
)
def test_broken_captions(root: Path, content: str, message: str) -> None:
    (root / "Td-qwen.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        list(luperson_mllm.samples(root, "standard"))
    assert "Td-qwen.json" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_parts(root: Path, tmp_path: Path) -> None:
    (root / "Td-shikra.json").unlink()
    with pytest.raises(UserError, match=r"Td-shikra\.json: missing; get all four"):
        list(luperson_mllm.samples(root, "standard"))
    for name in CAPTIONS:
        (root / f"{name}.json").write_text('{"z.jpg": "a man"}')
    with pytest.raises(UserError, match="none of its images has a caption"):
        list(luperson_mllm.samples(root, "standard"))
    with pytest.raises(UserError, match=r"LUPerson-MLLM: missing; --root is"):
        list(luperson_mllm.samples(tmp_path / "none", "standard"))
