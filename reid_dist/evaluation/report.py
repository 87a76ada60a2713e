"""What a person looks at: the contact sheet of ranked results, the result table, the results file.

Nothing half-written is ever found under a final name: bytes go to a temporary name, are synced, then renamed.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from reid_dist.data.reader import ShardSet
from reid_dist.data.transforms import decode_image
from reid_dist.evaluation.benchmark import Task
from reid_dist.evaluation.features import Features
from reid_dist.evaluation.ranking import METRIC_KEYS, Metrics, rank_queries, top_matches

RIGHT, WRONG, PAPER, INK, FAINT = (
    (0, 145, 60),
    (215, 30, 30),
    (255, 255, 255),
    (25, 25, 25),
    (110, 110, 110),
)
THUMB_W, THUMB_H = 84, 168
FRAME = 5
MARGIN = 16
QUERY_W = 270
LABEL_H = 24
GAP = 10
TEXT_SIZE = 16


@dataclass(frozen=True)
class Match:
    """One gallery image of a ranked list."""

    image: Image.Image
    score: float
    right: bool


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


def choose_queries(first_Q: Tensor, count: int) -> list[int]:
    """Queries spread from easy to hard: the middles of `count` equal parts of all, ordered by first-hit rank.

    Args:
        first_Q: rank of the first positive, 0 for skipped queries (`QueryRanks.first_Q`).
        count: how many; fewer when there are fewer valid queries.

    Returns:
        Indices of queries; the same for the same ranks.
    """
    valid_V = (first_Q > 0).nonzero().flatten()
    order_V = valid_V[first_Q[valid_V].argsort(stable=True)]
    count = min(count, len(order_V))
    return [int(order_V[(2 * i + 1) * len(order_V) // (2 * count)]) for i in range(count)]


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _wrap(text: str, width: int, lines: int) -> list[str]:
    """Breaks a sentence into at most `lines` lines of `width` pixels, with an ellipsis where it was cut."""
    font, out, line = _font(TEXT_SIZE), list[str](), ""
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


def match_box(column: int, row: int) -> tuple[int, int, int, int]:
    """Outer corner pixels (left, top, right, bottom; inclusive) of the frame of a match."""
    left = MARGIN + QUERY_W + column * (THUMB_W + 2 * FRAME + GAP)
    top = MARGIN + 2 * LABEL_H + row * (THUMB_H + 2 * FRAME + LABEL_H + GAP)
    return left, top, left + THUMB_W + 2 * FRAME - 1, top + THUMB_H + 2 * FRAME - 1


def _draw_query(sheet: Image.Image, row: SheetRow, top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    if isinstance(row.query, str):
        for i, line in enumerate(_wrap(row.query, QUERY_W - 20, lines=8)):
            draw.text((MARGIN, top + i * (TEXT_SIZE + 4)), line, INK, _font(TEXT_SIZE))
    else:
        sheet.paste(_thumb(row.query), (MARGIN + FRAME, top + FRAME))
    draw.text((MARGIN, top + THUMB_H + 2 * FRAME + 3), row.note, FAINT, _font(TEXT_SIZE - 2))


def _draw_match(sheet: Image.Image, match: Match, column: int, row: int) -> None:
    draw, box = ImageDraw.Draw(sheet), match_box(column, row)
    colour = RIGHT if match.right else WRONG
    # Right frames are also thicker, for readers who cannot tell the two colours apart.
    draw.rectangle(box, outline=colour, width=FRAME if match.right else FRAME - 3)
    sheet.paste(_thumb(match.image), (box[0] + FRAME, box[1] + FRAME))
    label = f"{column + 1}:  {match.score:.2f}"
    draw.text(
        ((box[0] + box[2]) / 2, box[3] + 3),
        label,
        colour,
        _font(TEXT_SIZE - 2),
        anchor="ma",
    )


def contact_sheet(path: str | os.PathLike[str], title: str, rows: Sequence[SheetRow]) -> None:
    """Writes a PNG with one query per row and its ranked gallery images, right framed green and wrong red.

    Args:
        path: the PNG; its folder is made.
        title: one line above the rows, for example the run and the checkpoint.
        rows: from top to bottom; text and image queries may be mixed.
    """
    columns = max((len(row.matches) for row in rows), default=0)
    _, _, right, bottom = match_box(max(columns, 1) - 1, max(len(rows), 1) - 1)
    sheet = Image.new("RGB", (right + MARGIN, bottom + LABEL_H + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, _font(TEXT_SIZE + 2))
    legend = "thick green frame: the right person   thin red frame: another person   below: rank and cosine"
    draw.text((MARGIN + QUERY_W, MARGIN + LABEL_H - 2), legend, FAINT, _font(TEXT_SIZE - 2))
    for r, row in enumerate(rows):
        _draw_query(sheet, row, match_box(0, r)[1])
        for c, match in enumerate(row.matches):
            _draw_match(sheet, match, c, r)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    _write(path, buffer.getvalue())


def ranked_rows(shards: ShardSet, features: Features, task: Task | None, count: int = 4, k: int = 10) -> list[SheetRow]:
    """Sheet rows of some queries of a task, from easy to hard. Not a collective: rank 0 alone may call it.

    Args:
        shards: the set that the features come from; its images are shown in their stored size.
        features: of the benchmark.
        task: one of its tasks; None gives no rows.
        count: number of queries.
        k: matches shown of each.
    """
    if task is None:
        return []
    first_Q = rank_queries(task.retrieval).first_Q
    chosen = choose_queries(first_Q, count)
    picked = task.retrieval.only(torch.tensor(chosen, dtype=torch.int64, device=first_Q.device))
    index_QK, score_QK = top_matches(picked, k)

    def image(position: int) -> Image.Image:
        row = int(features.row_N[position])
        sample = shards.sample(row)
        return Image.fromarray(
            decode_image(
                shards.image_bytes(row),
                (sample.height, sample.width),
                shards.describe(row),
            )
        )

    rows = []
    for q, query in enumerate(chosen):
        pid, position = int(picked.query_pid_Q[q]), int(task.query_Q[query])
        matches = [
            Match(
                image(int(task.gallery_G[g])),
                float(value),
                int(picked.gallery_pid_G[g]) == pid,
            )
            for g, value in zip(index_QK[q].tolist(), score_QK[q].tolist(), strict=True)
            if g >= 0
        ]
        shown = features.captions[position] if task.kind == "t2i" else image(position)
        rows.append(SheetRow(shown, f"first right one at rank {int(first_Q[query])}", matches))
    return rows


def _cells(metrics: Metrics | None) -> list[str]:
    return ["n/a" if metrics is None else f"{metrics[key]:.1f}" for key in METRIC_KEYS]


def _counts(task: str, metrics: Iterable[Metrics | None]) -> str:
    present = [one for one in metrics if one is not None]
    if not present:
        return f"{task}: not measured"
    # Chance and learners share one test set, so the counts agree; of the ties the worst is told.
    queries, skipped = int(present[0]["queries"]), int(present[0]["skipped"])
    return (
        f"{task}: {queries} queries, {skipped} skipped, at most {max(m.get('tied', 0.0) for m in present):.1f} % tied"
    )


def result_table(rows: Sequence[tuple[str, Mapping[str, Metrics | None]]]) -> str:
    """An aligned Markdown table of models by metrics in percent, with a line that states the protocol.

    Args:
        rows: (name, {"t2i": metrics or None, "i2i": metrics or None}), in the order to print.
    """
    head = ["", *(f"{task} {key}" for task in ("T2I", "I2I") for key in METRIC_KEYS)]
    body = [[name, *_cells(pair["t2i"]), *_cells(pair["i2i"])] for name, pair in rows]
    width = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        numbers = [cell.rjust(width[i]) for i, cell in enumerate(cells) if i > 0]
        return "| " + " | ".join([cells[0].ljust(width[0]), *numbers]) + " |"

    rule = "|" + "|".join(["-" * (width[0] + 2), *("-" * (w + 1) + ":" for w in width[1:])]) + "|"
    note = "Percent. Cosine in fp32, rectangular AP, pessimistic ties; I2I drops same identity and camera. "
    note += "; ".join(_counts(task.upper(), [pair[task] for _, pair in rows]) for task in ("t2i", "i2i")) + "."
    return "\n".join([line(head), rule, *(line(cells) for cells in body), "", note])


def write_results(path: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Writes the results as indented JSON; nan and tensors are refused before anything is written.

    Raises:
        ValueError: a number is nan or infinite.
        TypeError: a value has no JSON form.
    """
    _write(path, (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())


def _write(path: str | os.PathLike[str], data: bytes) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
