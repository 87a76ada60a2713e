"""Generic scenes: size, captions, variety."""

import re

from shards.world.captions import MAX_WORDS
from shards.world.draws import Draws
from shards.world.items import BAGS, HATS, LOWERS, OTHERS, SHOES, UPPERS
from shards.world.scenes import PLACES, SIZE, make_scene
from shards.world.spec import World
from shards.world.vocabulary import words_of


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


def test_posters_say_what_hangs_there_in_few_words() -> None:
    scenes = [make_scene(Draws(4, index), 0.35, posters=1.0, instance=0.5) for index in range(150)]
    assert all(re.match(r"a (poster|painting|photo) (in|on|at) ", scene.caption) for scene in scenes)
    assert max(len(scene.caption.split()) for scene in scenes) <= MAX_WORDS
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]|  |\{|\}", scene.caption) for scene in scenes)
    plain = make_scene(Draws(4, 0), 0.35)
    assert plain.jpeg() == make_scene(Draws(4, 0), 0.35, posters=0.0, instance=1.0).jpeg()
    assert {scene.image.size for scene in scenes} == {(SIZE, SIZE)}


def test_scenes_with_posters_alone_use_every_word_about_people() -> None:
    for instance in (0.0, 1.0):
        known = {w for i in range(1100) for w in words_of(make_scene(Draws(6, i), 0.3, 0.6, instance).caption)}
        world, said = World(3, 0.3, 1, 0.7, 0.0, instance), set[str]()
        for index in range(150):
            identity = world.identity("train", index)
            for camera in (0, 3):
                picture = world.picture(identity, camera, 0)
                said |= {w for c in world.captions(identity, camera, 0, picture) for w in words_of(c.text)}
        assert len(said) > 110 and len(said - known) <= 0.03 * len(said), said - known
