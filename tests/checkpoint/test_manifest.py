"""Manifests: pieces that tile, and files that are what they were."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from reid_dist.checkpoint.manifest import FORMAT_VERSION, Manifest, dump, parse, step_folder, step_of
from reid_dist.errors import UserError
from tests.checkpoint import states


def manifest(pieces: list[tuple[int, int, int, int]], total: int = 10) -> Manifest:
    tensor = {"dtype": "F32", "total": total, "row": [], "shape": [total], "pieces": pieces}
    return Manifest.model_validate(
        {
            **states.record(3),
            "format_version": FORMAT_VERSION,
            "note": "",
            "step": 3,
            "world_size": 1,
            "versions": {"torch": None},
            "commit": None,
            "digests": {"weights": "0"},
            "private": [],
            "files": {},
            "tensors": {"weights": {"a": tensor}},
        }
    )


@pytest.mark.parametrize(
    "pieces",
    [
        [(0, 0, 1, 10)],
        [(1, 4, 1, 6), (0, 0, 1, 4)],
        [(0, 0, 2, 5), (1, 1, 2, 5)],
        [(2, 2, 3, 3), (0, 0, 3, 4), (1, 1, 3, 3)],
        [(0, 0, 2, 2), (1, 1, 2, 2), (0, 4, 1, 6)],
    ],
)
def test_pieces_that_tile(pieces: list[tuple[int, int, int, int]]) -> None:
    manifest(pieces).check_whole()


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([], "do not hold 10 rows"),
        ([(0, 0, 1, 9)], "do not hold 10 rows"),
        ([(0, 0, 1, 6), (1, 5, 1, 5)], "do not hold 10 rows"),
        ([(0, 0, 1, 6), (1, 5, 1, 4)], "two pieces hold row 5"),
        ([(0, 0, 1, 5), (1, 6, 1, 5)], "ends behind the tensor's 10 rows"),
        ([(0, 0, 2, 5), (1, 0, 2, 5)], "no piece holds row 1"),
        ([(0, 0, 2, 5), (1, 0, 1, 5)], "no piece holds row 5"),
        ([(0, 0, 2, 5), (1, 1, 3, 5)], "ends behind"),
    ],
)
def test_pieces_that_do_not(pieces: list[tuple[int, int, int, int]], words: str) -> None:
    with pytest.raises(ValueError, match=f"weights a: .*{words}"):
        manifest(pieces).check_whole()


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    written = manifest([(0, 0, 1, 10)])
    assert parse(tmp_path, dump(written), "remedy") == written


def test_a_loss_that_is_not_finite_is_none() -> None:
    fields = manifest([]).model_dump()
    assert Manifest.model_validate({**fields, "loss": float("nan")}).loss is None
    assert Manifest.model_validate({**fields, "loss": float("inf")}).loss is None


def _changed(**changes: Any) -> bytes:
    return json.dumps({**json.loads(dump(manifest([(0, 0, 1, 10)]))), **changes}).encode()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b"[]", "format_version is None"),
        (_changed(format_version=2), "format_version is 2; this program reads 1"),
        (_changed(step=4), "does not match its own hash"),
        (_changed(sha256="0"), "does not match its own hash"),
    ],
)
def test_a_damaged_manifest_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(UserError, match=f"^here: .*{words}"):
        parse(Path("here"), data, "remedy")


def test_whoever_makes_the_hash_fit_still_keeps_to_the_form() -> None:
    torn = manifest([]).model_dump(mode="json")["tensors"]
    for changes, words in (
        ({"files": {"../x.json": {"size": 1, "sha256": ""}}}, "files"),
        ({"surplus": 1}, "surplus"),
        ({"tensors": torn}, "do not hold 10 rows"),
    ):
        content = {**manifest([(0, 0, 1, 10)]).model_dump(mode="json"), **changes}
        sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        with pytest.raises(UserError, match=words):
            parse(Path("here"), json.dumps({**content, "sha256": sha256}).encode(), "remedy")


def test_a_folder_tells_its_step() -> None:
    assert step_of(step_folder(Path("x"), 120)) == 120
    assert step_of(step_folder(Path("x"), 123_456_789)) == 123_456_789
    assert [step_of(Path(name)) for name in ("step-1", ".step-00000001", "step-0000000x", "latest")] == [None] * 4
