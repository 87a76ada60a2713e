"""Generic scenes: size, captions, variety."""

import re

from shards.world.draws import Draws
from shards.world.items import BAGS, HATS, LOWERS, OTHERS, SHOES, UPPERS
from shards.world.scenes import PLACES, SIZE, make_scene


def test_scenes_are_square_varied_and_well_spelt() -> None:
    scenes = [make_scene(Draws(2, index), 0.35) for index in range(300)]
    assert all(scene.image.size == (SIZE, SIZE) for scene in scenes)
    texts = [scene.caption for scene in scenes]
    assert len(set(texts)) > 280
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]|  |\{|\}", text) for text in texts)
    assert all(any(text.endswith(f"{place}.") for text in texts) for place in PLACES)
    assert max(len(text.split()) for text in texts) <= 38


def test_there_are_enough_things_and_places() -> None:
    assert len(UPPERS + LOWERS + SHOES + BAGS + HATS + OTHERS) >= 14
    assert len(PLACES) >= 6


def test_same_stream_same_scene() -> None:
    assert make_scene(Draws(1, 5), 0.5).jpeg() == make_scene(Draws(1, 5), 0.5).jpeg()
