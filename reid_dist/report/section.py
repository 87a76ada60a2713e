"""What the report tells of one benchmark beyond its numbers: sheets of queries, errors by camera and attribute, maps.

Shape suffixes: Q queries.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from reid_dist.data.reader import ShardSet
from reid_dist.data.tokenizer import Tokenizer
from reid_dist.data.transforms import decode_image
from reid_dist.errors import UserError
from reid_dist.evaluation.benchmark import TaskKind, TaskResult
from reid_dist.evaluation.features import Features
from reid_dist.evaluation.ranking import top_matches
from reid_dist.models.dual_encoder import DualEncoder
from reid_dist.report.attributes import read_attributes
from reid_dist.report.document import Block, Heading, Picture, Table, Text
from reid_dist.report.error_plots import camera_name, draw_attributes, draw_cameras
from reid_dist.report.errors import (
    Facts,
    Group,
    Mistakes,
    by_attribute,
    by_camera,
    find_mistakes,
    known_facts,
    mistaken_attributes,
    mistaken_cameras,
)
from reid_dist.report.heat_plots import Strip, draw_strips, query_strips, word_strip
from reid_dist.report.ranked import choose_extremes, query_rows
from reid_dist.report.sheet import draw_sheet
from reid_dist.report.token_maps import lacks_maps

TASK_NAMES: dict[TaskKind, str] = {"t2i": "text to image", "i2t": "image to text", "i2i": "image to image"}
_QUERIES, _MATCHES, _SENTENCES = 4, 10, 5
_EXTREMES = {"best": "The best queries", "median": "Queries in the middle", "worst": "The worst queries"}


@dataclass(frozen=True)
class Section:
    """One benchmark as one model answered it.

    Attributes:
        name: of the benchmark, with its split: "market1501 (test)".
        shards: whose images are shown.
        features: of one of the tasks; only its rows and captions are read.
        results: one for each task and re-ranking, plain ones first.
        model: what tables and legends call the model; sections of one benchmark are drawn into the same curves.
        encoder: for heat maps; None: none are drawn.
        tokenizer: of the encoder; None: no heat maps of words.
        size: (height, width) of its images.
    """

    name: str
    shards: ShardSet
    features: Features
    results: Sequence[TaskResult]
    model: str = ""
    encoder: DualEncoder | None = None
    tokenizer: Tokenizer | None = None
    size: tuple[int, int] = (0, 0)


class Album:
    """The pictures of a page, each under a name of its own.

    Args:
        folder: of the page.
        name: of the folder of pictures in it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._taken: set[str] = set()

    def keep(self, name: str, data: bytes, text: str) -> Picture:
        """Writes a PNG; what the name holds from elsewhere (a benchmark, a run) becomes letters that every system has.

        Args:
            name: of the picture.
            data: the PNG.
            text: what it shows.
        """
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80] or "picture"
        file, number = f"{stem}.png", 2
        while file in self._taken:
            file, number = f"{stem}-{number}.png", number + 1
        self._taken.add(file)
        (self._folder / self._name / file).write_bytes(data)
        with Image.open(io.BytesIO(data)) as image:
            return Picture(f"{self._name}/{file}", text, image.size)


def section_blocks(album: Album, section: Section) -> list[Block]:
    """Everything about one section but its scores and curves."""
    name = f"{section.name}, {section.model}" if section.model else section.name
    blocks: list[Block] = [Heading(2, name)]
    attributes: Mapping[str, Facts] = {}
    try:
        attributes = read_attributes(section.shards)
    except UserError as error:  # what was scored meanwhile is worth more than a side file
        blocks.append(Text(f"No errors by attribute: {error}."))
    for result in section.results:
        if result.reranking is None:
            blocks += [Heading(3, TASK_NAMES[result.kind].capitalize()), *_sheets(album, section, result, name)]
            blocks += _errors(album, section, result, name, attributes)
            blocks += _heat(album, section, result, name)
    return blocks


def _sheets(album: Album, section: Section, result: TaskResult, name: str) -> Iterator[Block]:
    ranks = result.ranks
    pid_Q = result.task.retrieval.query_pid_Q
    for kind, chosen in choose_extremes(ranks.ap_Q, ranks.positives_Q, pid_Q, _QUERIES).items():
        count = _SENTENCES if result.kind == "i2t" else _MATCHES
        rows = query_rows(section.shards, section.features, result.task, chosen, ranks.first_Q, count)
        buffer = io.BytesIO()
        draw_sheet(f"{name}: {TASK_NAMES[result.kind]}, {_EXTREMES[kind].lower()}", rows).save(buffer, format="PNG")
        text = f"{_EXTREMES[kind]} by average precision, of different people, with their first {count} answers."
        yield album.keep(f"{name} {result.kind} {kind}", buffer.getvalue(), text)


def _errors(
    album: Album, section: Section, result: TaskResult, name: str, attributes: Mapping[str, Facts]
) -> Iterator[Block]:
    facts = known_facts(section.shards.identities, attributes)
    cameras = by_camera(result)
    if not cameras and not facts:
        return
    mistakes = find_mistakes(result)
    if cameras:
        yield from _cameras(album, result, name, cameras, mistakes)
    if facts:
        yield from _attributes(album, result, name, facts, mistakes)


def _sampled(mistakes: Mistakes) -> str:
    count = len(mistakes.query_W)
    return (
        "" if count == mistakes.total else f" Of {mistakes.total:,} wrong first answers, {count:,} evenly spread ones."
    )


def _cameras(
    album: Album, result: TaskResult, name: str, groups: Mapping[int, Group], mistakes: Mistakes
) -> Iterator[Block]:
    title = f"{name}: {TASK_NAMES[result.kind]}, errors by camera"
    data = draw_cameras(title, groups, mistaken_cameras(result.task, mistakes))
    text = f"Scores by the camera of the query, and the cameras of wrong first answers.{_sampled(mistakes)}"
    yield album.keep(f"{name} {result.kind} cameras", data, text)
    rows = [
        [camera_name(camid), f"{group.queries:,}", f"{group.rank1:.1f}", f"{group.mean_ap:.1f}"]
        for camid, group in groups.items()
    ]
    yield Table(("camera of the query", "queries", "Rank-1", "mAP"), rows, title="Scores by camera", folded=True)


def _attributes(
    album: Album, result: TaskResult, name: str, facts: Mapping[int, Facts], mistakes: Mistakes
) -> Iterator[Block]:
    values = {name: groups for name, groups in by_attribute(result, facts).items() if groups}
    if not values:
        return
    differences, count = mistaken_attributes(result.task, mistakes, facts)
    title = f"{name}: {TASK_NAMES[result.kind]}, errors by attribute"
    text = (
        "Left: Rank-1 by what the person asked for looks like. Right: in how many wrong first answers the person "
        "found differs from the one asked for, and what it would be if any wrong answer came first as easily: the "
        f"further left of it, the better the model reads the attribute.{_sampled(mistakes)}"
    )
    data = draw_attributes(title, values, differences, count)
    yield album.keep(f"{name} {result.kind} attributes", data, text)
    rows = [
        [f"{attribute.replace('_', ' ')}: {value}", f"{group.queries:,}", f"{group.rank1:.1f}", f"{group.mean_ap:.1f}"]
        for attribute, groups in values.items()
        for value, group in groups.items()
    ]
    yield Table(("attribute", "queries", "Rank-1", "mAP"), rows, title="Scores by attribute", folded=True)


def _heat(album: Album, section: Section, result: TaskResult, name: str) -> Iterator[Block]:
    """Maps of the best and a middle query with their first answers; of a model without them one line says so."""
    if section.encoder is None or result.kind == "i2t":
        return
    reason = lacks_maps(section.encoder, section.tokenizer if result.kind == "t2i" else None)
    if reason:
        yield Text(f"No heat maps: {reason}.")
        return
    ranks, retrieval = result.ranks, result.task.retrieval
    extremes = choose_extremes(ranks.ap_Q, ranks.positives_Q, retrieval.query_pid_Q, 2)
    chosen = list(dict.fromkeys([*extremes["best"][:1], *extremes["median"]]))[:3]
    strips: list[tuple[str, Strip]] = []
    for query in chosen:
        strips += _query_heat(section, result, query)
    if strips:
        title = f"{name}: {TASK_NAMES[result.kind]}, heat maps"
        yield album.keep(f"{name} {result.kind} heat", draw_strips(title, strips), _HEAT_TEXTS[result.kind])


_HEAT_TEXTS: dict[TaskKind, str] = {
    "t2i": "Cosine of the sentence's feature, and of each word's token, with the tokens of the places of the first "
    "answer, as the model makes them. A bright place is like the word to the model; it does not prove why it chose so.",
    "i2i": "Cosine of the query's feature with the tokens of places of the query and of its first answer; and, of a "
    "ViT, how the class token shares out its attention in the last block. It does not prove why the model chose so.",
}


def _query_heat(section: Section, result: TaskResult, query: int) -> list[tuple[str, Strip]]:
    assert section.encoder is not None
    task = result.task
    position = torch.tensor([query], device=task.retrieval.query_pid_Q.device)
    index_11, _ = top_matches(task.retrieval.only(position), 1)
    entry = int(index_11[0, 0])
    if entry < 0:
        return []
    right = bool(task.retrieval.gallery_pid_G[entry] == task.retrieval.query_pid_Q[query])
    answer = _seen(section, int(task.gallery_G[entry]))
    told = "right answer" if right else "wrong answer"
    place = int(task.query_Q[query])
    if result.kind == "t2i":
        assert section.tokenizer is not None
        caption = section.features.captions[place]
        return [(f"{told} to: {caption[:200]}", word_strip(section.encoder, section.tokenizer, answer, caption))]
    strips = query_strips(section.encoder, _seen(section, place), answer, told)
    return [("", strip) for strip in strips]


def _seen(section: Section, position: int) -> Image.Image:
    """What the model sees of an image of the features."""
    row = int(section.features.row_N[position])
    return Image.fromarray(decode_image(section.shards.image_bytes(row), section.size, section.shards.describe(row)))
