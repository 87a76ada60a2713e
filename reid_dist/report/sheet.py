"""Contact sheets: queries and what was found for them, as pictures."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from reid_dist.files import write_bytes

RIGHT, WRONG, PAPER, INK, FAINT = (
    (0, 145, 60),
    (215, 30, 30),
    (255, 255, 255),
    (25, 25, 25),
    (110, 110, 110),
)
THUMB_W, THUMB_H = 84, 168
TEXT_W = 200  # of a match that is a sentence
FRAME = 5
MARGIN = 16
QUERY_W = 270
LABEL_H = 24
GAP = 10
TEXT_SIZE = 16
LEGEND = "thick green frame: the right person   thin red frame: another person   below: rank and cosine"


@dataclass(frozen=True)
class Match:
    """One gallery entry of a ranked list.

    Attributes:
        image: what it is; or it is a sentence.
        score: its similarity.
        right: whether it is what was asked for.
        rank: from 1; 0: as it stands in the row.
    """

    image: Image.Image | str
    score: float
    right: bool
    rank: int = 0


@dataclass(frozen=True)
class SheetRow:
    """One query and its first matches, best first.

    Attributes:
        query: an image, or the sentence.
        note: a short line under the query ("first hit at rank 3").
        matches: best first.
    """

    query: Image.Image | str
    note: str
    matches: Sequence[Match]


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _wrap(text: str, width: int, lines: int, size: int = TEXT_SIZE) -> list[str]:
    """Breaks a sentence into at most `lines` lines of `width` pixels, with an ellipsis where it was cut."""
    font, out, line = _font(size), list[str](), ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            out.append(line)
            line = word
        else:
            line = longer
    out.append(line)
    return out if len(out) <= lines else [*out[: lines - 1], out[lines - 1] + " ..."]


def _thumb(image: Image.Image) -> Image.Image:
    """The image at thumbnail size, its shape kept, on white."""
    scale = min(THUMB_W / image.width, THUMB_H / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    sheet = Image.new("RGB", (THUMB_W, THUMB_H), PAPER)
    small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    sheet.paste(small, ((THUMB_W - size[0]) // 2, (THUMB_H - size[1]) // 2))
    return sheet


def match_box(column: int, row: int, width: int = THUMB_W) -> tuple[int, int, int, int]:
    """Outer corner pixels (left, top, right, bottom; inclusive) of the frame of a match.

    Args:
        column: from 0.
        row: from 0.
        width: inside the frames: THUMB_W, or TEXT_W where matches are sentences.
    """
    left = MARGIN + QUERY_W + column * (width + 2 * FRAME + GAP)
    top = MARGIN + 2 * LABEL_H + row * (THUMB_H + 2 * FRAME + LABEL_H + GAP)
    return left, top, left + width + 2 * FRAME - 1, top + THUMB_H + 2 * FRAME - 1


def _draw_query(sheet: Image.Image, row: SheetRow, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    if isinstance(row.query, str):
        for i, line in enumerate(_wrap(row.query, QUERY_W - 20, lines=8)):
            draw.text((MARGIN, top + i * (TEXT_SIZE + 4)), line, INK, _font(TEXT_SIZE))
    else:
        sheet.paste(_thumb(row.query), (MARGIN + FRAME, top + FRAME))
    draw.text((MARGIN, top + THUMB_H + 2 * FRAME + 3), row.note, FAINT, _font(TEXT_SIZE - 2))


def _draw_match(sheet: Image.Image, match: Match, box: tuple[int, int, int, int], place: int) -> None:
    draw = ImageDraw.Draw(sheet)
    colour = RIGHT if match.right else WRONG
    # Right frames are also thicker, for readers who cannot tell the two colours apart.
    draw.rectangle(box, outline=colour, width=FRAME if match.right else FRAME - 3)
    if isinstance(match.image, str):
        size = TEXT_SIZE - 3
        for i, line in enumerate(_wrap(match.image, box[2] - box[0] - 4 * FRAME, THUMB_H // (size + 3), size)):
            draw.text((box[0] + 2 * FRAME, box[1] + FRAME + 2 + i * (size + 3)), line, INK, _font(size))
    else:
        sheet.paste(_thumb(match.image), (box[0] + FRAME, box[1] + FRAME))
    label = f"{place}:  {match.score:.2f}"
    draw.text(
        ((box[0] + box[2]) / 2, box[3] + 3),
        label,
        colour,
        _font(TEXT_SIZE - 2),
        anchor="ma",
    )


def contact_sheet(path: str | os.PathLike[str], title: str, rows: Sequence[SheetRow], legend: str = LEGEND) -> None:
    """Writes a PNG with one query per row and its ranked gallery entries, right framed green and wrong red.

    Args:
        path: the PNG; its folder is made.
        title: one line above the rows, for example the run and the checkpoint.
        rows: from top to bottom; text and image queries may be mixed.
        legend: one line that says what the frames mean.
    """
    buffer = io.BytesIO()
    draw_sheet(title, rows, legend).save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())


def draw_sheet(title: str, rows: Sequence[SheetRow], legend: str = LEGEND) -> Image.Image:
    """What `contact_sheet` writes."""
    columns = max((len(row.matches) for row in rows), default=0)
    width = TEXT_W if any(isinstance(match.image, str) for row in rows for match in row.matches) else THUMB_W
    _, _, right, bottom = match_box(max(columns, 1) - 1, max(len(rows), 1) - 1, width)
    right = max(right, *(MARGIN + round(_font(size).getlength(text)) for text, size in _lines(title, legend)))
    sheet = Image.new("RGB", (right + MARGIN, bottom + LABEL_H + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for line, (text, size) in enumerate(_lines(title, legend)):
        draw.text((MARGIN, 10 + line * LABEL_H), text, FAINT if line else INK, _font(size))
    for r, row in enumerate(rows):
        _draw_query(sheet, row, match_box(0, r)[1])
        for c, match in enumerate(row.matches):
            _draw_match(sheet, match, match_box(c, r, width), match.rank or c + 1)
    return sheet


def _lines(title: str, legend: str) -> list[tuple[str, int]]:
    """What stands above the rows, with sizes."""
    return [(title, TEXT_SIZE + 2), (legend, TEXT_SIZE - 2)]
