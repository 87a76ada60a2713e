"""Captions: only what is visible, in agreement with the log, short, grammatical articles."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from shards.world.captions import MAX_WORDS, SYNONYMS, article, describe, listing
from shards.world.draws import Draws
from shards.world.identity import ATTRIBUTES, Identity, effective, make_identity
from shards.world.pen import Pen
from shards.world.render import VIEWS, Figure
from shards.world.spec import World

WORLD = World(0, 0.35, 1, 0.7, 0.0)


def _captions(count: int, coverage: float = 0.7, wrong: float = 0.0):  # type: ignore[no-untyped-def]
    pen = Pen(Image.new("RGB", (64, 128)), (32, 4), 120)
    for index in range(count):
        identity = make_identity(0, "train", index, 1)
        view = VIEWS[index % 3]
        boxes = Figure(identity, view, 0.2).draw(pen)
        visible = frozenset(boxes)
        yield identity, view, visible, describe(Draws(9, index), identity, view, visible, coverage, wrong)


def test_mentions_are_visible_and_true() -> None:
    for identity, view, visible, caption in _captions(400):
        seen = effective(identity.attributes)
        assert all(name in visible and seen[name] == value for name, value in caption.mentions)
        names = {name for name, _ in caption.mentions}
        if view != "front":
            assert not names & {"logo", "glasses"}
        if seen["hat"] != "none":
            assert not names & {"hair", "hair_colour"}


def test_text_holds_a_word_for_every_mention() -> None:
    for _, _, _, caption in _captions(400):
        for name, value in caption.mentions:
            words = SYNONYMS.get(value, (value,))
            if value == "two-tone":
                words = ("two-tone", "lower half")
            if value == "bald":
                words = ("bald head",)
            assert any(word in caption.text for word in words), (name, value, caption.text)


def test_nothing_unlogged_is_said() -> None:
    for identity, _, _, caption in _captions(400):
        logged = {value for _, value in caption.mentions}
        for value in (
            "backpack",
            "suitcase",
            "beanie",
            "sunglasses",
            "boots",
            "skirt",
            "hoodie",
            "dotted",
            "yellow",
        ):
            if any(re.search(rf"\b{word}\b", caption.text) for word in SYNONYMS.get(value, (value,))):
                assert value in logged, (value, caption.text, identity.attributes)


def test_length_and_articles() -> None:
    texts = [caption.text for *_, caption in _captions(600)]
    lengths = [len(text.split()) for text in texts]
    assert max(lengths) <= MAX_WORDS
    assert 20 <= sum(lengths) / len(lengths) <= 26
    assert not any(re.search(r"\ba [aeiou]", text) or re.search(r"\ban [^aeiou]", text) for text in texts)
    assert not any("  " in text or " ," in text for text in texts)
    full = [len(caption.text.split()) for *_, caption in _captions(200, coverage=1.0)]
    assert max(full) <= MAX_WORDS
    assert all(caption.text for *_, caption in _captions(50, coverage=0.0))


def test_wrong_colours_are_logged_as_said() -> None:
    lies = 0
    for identity, _, _, caption in _captions(100, wrong=1.0):
        seen = effective(identity.attributes)
        for name, value in caption.mentions:
            if name.endswith("colour") or name in ("upper_colour2", "scarf"):
                assert value != seen[name]
                lies += 1
    assert lies > 100


def test_occluded_things_are_not_named() -> None:
    world = World(4, 2.0, 1, 1.0, 0.0)
    hidden = 0
    for index in range(120):
        identity = world.identity("train", index)
        picture = world.picture(identity, index % 6, 0)
        for caption in world.captions(identity, index % 6, 0, picture):
            assert {name for name, _ in caption.mentions} <= picture.visible
        hidden += "shoes" not in picture.visible
    assert hidden > 5


def test_what_is_named_leaves_a_trace_in_the_picture() -> None:
    """Drawn with another value of the attribute, the picture changes: nothing hidden is named, but for a trifle.

    A garment under an open coat or behind a backpack may be covered more than its box says.
    """
    world = World(0, 0.35, 1, 1.0, 0.0)
    named = hidden = 0
    for index in range(70):
        identity = world.identity("train", index)
        picture = world.picture(identity, index % 6, 0)
        pixels = np.asarray(picture.image, dtype=np.int16)
        mentioned = {
            name for caption in world.captions(identity, index % 6, 0, picture) for name, _ in caption.mentions
        }
        for name in mentioned:
            named += 1
            others = [value for value in ATTRIBUTES[name] if value != identity.attributes[name]]
            hidden += not any(_differs(world, identity, index % 6, name, value, pixels) for value in others)
    assert named > 600 and hidden <= 0.01 * named, (hidden, named)


def _differs(world: World, identity: Identity, camera: int, name: str, value: str, pixels: np.ndarray) -> bool:  # type: ignore[type-arg]
    other = replace(identity, attributes={**identity.attributes, name: value})
    changed = np.asarray(world.picture(other, camera, 0).image, dtype=np.int16)
    return bool((np.abs(changed - pixels).max(axis=2) > 24).mean() > 0.001)


@pytest.mark.parametrize(("phrase", "expected"), [("orange hat", "an orange hat"), ("red hat", "a red hat")])
def test_article(phrase: str, expected: str) -> None:
    assert article(phrase) == expected


def test_listing() -> None:
    assert listing([]) == ""
    assert listing(["a", "", "b"]) == "a and b"
    assert listing(["a", "b", "c"]) == "a, b and c"
