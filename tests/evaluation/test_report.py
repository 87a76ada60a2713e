"""The contact sheet shows the right frames; tables and files say what they should."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from reid_dist.evaluation.report import (
    FRAME,
    PAPER,
    RIGHT,
    WRONG,
    Match,
    SheetRow,
    choose_queries,
    contact_sheet,
    match_box,
    result_table,
    write_results,
)

METRICS = {"R1": 42.5, "R5": 60.0, "R10": 71.0, "mAP": 47.0, "mINP": 30.0}
FULL = METRICS | {"queries": 3200.0, "skipped": 2.0, "tied": 0.5}


def plain(colour: str, size: tuple[int, int] = (32, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_frames_and_pictures(tmp_path: Path) -> None:
    right = [True, False, True, False, False, True, False, False, False, True]
    matches = [Match(plain("blue"), 1 - i / 10, r) for i, r in enumerate(right)]
    rows = [
        SheetRow("a very long sentence about a person " * 20, "note", matches),
        SheetRow(plain("purple"), "note", matches[:3]),
    ]
    path = tmp_path / "new" / "sheet.png"
    contact_sheet(path, "title", rows)
    with Image.open(path) as sheet:
        sheet.load()
        for column, is_right in enumerate(right):
            left, top, end, bottom = match_box(column, 0)
            want = RIGHT if is_right else WRONG
            for corner in (
                (left, top),
                (end, top),
                (left, bottom),
                (end, bottom),
                (left + 1, top + 60),
            ):
                assert sheet.getpixel(corner) == want
            inner = sheet.getpixel((left + FRAME - 1, top + 60))
            assert inner == (RIGHT if is_right else PAPER)  # a wrong frame is thin
            assert sheet.getpixel(((left + end) // 2, (top + bottom) // 2)) == (
                0,
                0,
                255,
            )
        left, top, _, _ = match_box(3, 1)
        assert sheet.getpixel((left, top)) == PAPER  # a list of three matches ends there
        assert (128, 0, 128) in {colour for _, colour in sheet.getcolors(2**20) or []}
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_sheet_without_rows_or_with_wide_images(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "none.png", "nothing", [])
    contact_sheet(
        tmp_path / "wide.png",
        "wide",
        [SheetRow(plain("red", (300, 10)), "", [Match(plain("red"), 1, True)])],
    )
    for name in ("none.png", "wide.png"):
        with Image.open(tmp_path / name) as sheet:
            sheet.verify()


def test_queries_run_from_easy_to_hard() -> None:
    first = torch.tensor([5, 0, 1, 1, 9, 2, 0, 30, 1, 4])
    chosen = choose_queries(first, 4)
    assert [int(first[i]) for i in chosen] == [1, 2, 5, 30]
    assert chosen == choose_queries(first, 4)
    assert sorted(choose_queries(first, 99)) == [0, 2, 3, 4, 5, 7, 8, 9]
    assert choose_queries(torch.zeros(3), 2) == []


def test_table_is_aligned_and_says_na() -> None:
    table = result_table(
        [
            ("chance", {"t2i": FULL, "i2i": None}),
            ("after the T2I stage", {"t2i": FULL, "i2i": FULL}),
        ]
    )
    lines = table.splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[2].count("n/a") == 5 and lines[3].count("42.5") == 2
    assert "rectangular" in lines[-1] and "3200 queries, 2 skipped" in lines[-1] and "0.5 % tied" in lines[-1]
    assert "I2I: not measured" in result_table([("x", {"t2i": FULL, "i2i": None})])


def test_results_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "run" / "results.json"
    write_results(path, {"stages": [{"name": "t2i", "t2i": METRICS, "i2i": None}]})
    assert json.loads(path.read_text())["stages"][0]["t2i"]["R1"] == 42.5
    for bad in (math.nan, object()):
        with pytest.raises((ValueError, TypeError)):
            write_results(path, {"stages": bad})
    assert json.loads(path.read_text())["stages"][0]["i2i"] is None
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
