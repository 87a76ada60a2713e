"""The contact sheet shows the right frames."""

from pathlib import Path

from PIL import Image

from reid_dist.report.sheet import FRAME, PAPER, RIGHT, WRONG, Match, SheetRow, contact_sheet, match_box


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
