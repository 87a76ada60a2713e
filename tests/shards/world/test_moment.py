"""Instance-level content: what is drawn, what is said, and that nothing changes where there is none."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from shards.world.camera import render
from shards.world.captions import MAX_WORDS, STYLES, SYNONYMS
from shards.world.identity import effective
from shards.world.moment import POSES, Moment, make_moment
from shards.world.spec import World

PLAIN = World(3, 0.35, 1, 0.7, 0.0)
WORLD = replace(PLAIN, instance=1.0)


def _moments(instance: float, count: int = 900) -> list[tuple[str, Moment]]:
    found = []
    for index in range(count // 6):
        identity = PLAIN.identity("train", index)
        own = effective(identity.attributes)["bag"]
        found += [(own, make_moment(3, identity.key, identity.attributes, c, 0, instance)) for c in range(6)]
    return found


def test_strength_is_the_share_of_changed_pictures() -> None:
    for instance in (0.2, 1.0):
        found = _moments(instance)
        changed = sum((moment.bag == "none") != (own == "none") for own, moment in found) / len(found)
        assert abs(changed - instance / 2) < 0.06
        poses = Counter(moment.pose for _, moment in found)
        assert abs(poses["running"] / len(found) - instance / 3) < 0.06 and set(poses) <= set(POSES)


def test_an_owner_carries_the_own_bag_or_none() -> None:
    for index in range(80):
        identity = WORLD.identity("train", index)
        own = effective(identity.attributes)
        for camera in range(6):
            moment = WORLD.moment(identity, camera, 0)
            assert moment is not None
            if own["bag"] != "none" and moment.bag != "none":
                assert (moment.bag, moment.bag_colour) == (own["bag"], own["bag_colour"])
            assert (moment.bag == "none") == (moment.bag_colour == "none")


def test_without_strength_there_is_no_moment_and_nothing_changes() -> None:
    identity = PLAIN.identity("test", 0)
    assert PLAIN.moment(identity, 0, 0) is None
    picture = PLAIN.picture(identity, 1, 0)
    assert picture.moment is None and "pose" not in picture.visible
    captions = PLAIN.captions(identity, 1, 0, picture)
    assert not any(name.startswith("image.") for caption in captions for name, _ in caption.mentions)


def test_the_picture_shows_its_moment() -> None:
    """Drawn with another pose or without the bag, the picture is another one where it should be."""
    clean = replace(WORLD, hardness=0.0)
    differing = 0
    for index in range(30):
        identity = clean.identity("train", index)
        moment = clean.moment(identity, index % 6, 0)
        assert moment is not None
        picture = np.asarray(clean.picture(identity, index % 6, 0).image, dtype=np.int16)
        for other in POSES:
            changed = render(3, identity, index % 6, 0, 0.0, 6, replace(moment, pose=other))
            share = float((np.abs(np.asarray(changed.image) - picture).max(axis=2) > 24).mean())
            assert (share == 0) if other == moment.pose else (share > 0.004)
        if moment.bag != "none":
            bare = render(3, identity, index % 6, 0, 0.0, 6, Moment(moment.pose, "none", "none"))
            assert (np.abs(np.asarray(bare.image) - picture).max(axis=2) > 24).mean() > 0.003
            assert "bag" not in bare.visible
            differing += 1
    assert differing > 8


def _said() -> list[tuple[World, dict[str, str], frozenset[str], str, tuple[tuple[str, str], ...]]]:
    found = []
    for index in range(120):
        identity = WORLD.identity("train", index)
        for camera in (index % 6, (index + 2) % 6):
            picture = WORLD.picture(identity, camera, 0)
            assert picture.moment is not None
            facts = effective(identity.attributes) | picture.moment.facts(picture.view)
            for caption in WORLD.captions(identity, camera, 0, picture):
                found.append((WORLD, facts, picture.visible, caption.text, caption.mentions))
    return found


def test_mentions_are_true_visible_and_kept_apart() -> None:
    names = Counter[str]()
    for _, facts, visible, _, mentions in _said():
        for name, value in mentions:
            assert facts[name] == value
            assert name == "image.view" or name.removeprefix("image.") in visible
            assert name not in ("bag", "bag_colour", "pose", "view")
            names[name] += 1
    assert all(names[f"image.{name}"] > 30 for name in ("bag", "bag_colour", "pose", "view"))


def test_poses_and_views_are_said_when_logged_and_only_then() -> None:
    for _, _, _, text, mentions in _said():
        log = dict(mentions)
        for name, values in (("image.pose", POSES), ("image.view", ("front", "side", "back"))):
            for value in values:
                said = any(re.search(rf"\b{words}\b", text) for words in SYNONYMS[value])
                assert said == (log.get(name) == value), (text, log)
        assert "walking away" not in text and "passing by" not in text


def test_a_bag_is_said_only_of_pictures_that_show_it() -> None:
    bags = [word for kind in ("backpack", "handbag", "shoulder bag", "suitcase") for word in (kind, *SYNONYMS[kind])]
    for _, facts, visible, text, mentions in _said():
        if any(re.search(rf"\b{word}\b", text) for word in (*bags, "bag")):
            assert facts["image.bag"] != "none" and "bag" in visible
            assert {"image.bag", "image.bag_colour"} & {name for name, _ in mentions}


def test_sentences_about_moments_are_sentences() -> None:
    texts = [text for *_, text, _ in _said()]
    assert max(len(text.split()) for text in texts) <= MAX_WORDS and all(text.endswith(".") for text in texts)
    assert not any(
        re.search(r"\ba [aeiou]|\ban [^aeiou]|  | ,| \.|\bwhile (?!walk|stroll|stand|run|jog)", text) for text in texts
    )
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_has_room_for_the_moment(style: str) -> None:
    world = replace(WORLD, style=style, coverage=0.2)
    for index in range(60):
        identity = world.identity("train", index)
        picture = world.picture(identity, index % 6, 0)
        for caption in world.captions(identity, index % 6, 0, picture):
            for name, value in caption.mentions:
                if name in ("image.pose", "image.view"):
                    assert any(words in caption.text for words in SYNONYMS[value]), caption
