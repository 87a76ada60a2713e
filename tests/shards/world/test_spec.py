"""The knobs of a world: what each one changes, and in which direction."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from reid_dist.evaluation.baselines import stripe_histogram
from reid_dist.evaluation.ranking import i2i_metrics
from shards.world.captions import STYLES
from shards.world.export import export
from shards.world.identity import ATTRIBUTES, UPPER_COLOURS, is_held_out
from shards.world.oracle import read_world, text_ceiling
from shards.world.spec import LEVELS, ExportSpec, World

WORLD = World(1, 0.35, 1, 0.7, 0.0)


def test_levels_have_no_later_knob_and_older_trees_stay_up_to_date() -> None:
    assert set(LEVELS) == {"easy", "standard", "hard", "claims", "quickstart"}
    assert LEVELS["claims"] == {"hardness": 0.6, "siblings": 1, "coverage": 0.7, "wrong": 0.0}
    for level in LEVELS.values():
        parameters = World(seed=4, **level).parameters()
        assert parameters == {"seed": 4, **level}
    assert replace(WORLD, instance=0.5, style="list").parameters()["instance"] == 0.5
    assert World(**json.loads(json.dumps(replace(WORLD, cameras=9).parameters()))) == replace(WORLD, cameras=9)


def test_unseen_cameras_are_those_of_test_people_alone() -> None:
    world = replace(WORLD, cameras=7, unseen_cameras=3)
    for split, wanted in (
        ("train", {0, 1, 2, 3}),
        ("val", {0, 1, 2, 3}),
        ("test", {4, 5, 6}),
        ("distractor", {4, 5, 6}),
    ):
        shots = [list(world.shots(world.identity(split, index), 9)) for index in range(20)]
        assert {camera for found in shots for camera, _ in found} == wanted
        assert all(len(set(found)) == 9 for found in shots)


@pytest.mark.parametrize("cameras", [2, 15])
def test_number_of_cameras(cameras: int) -> None:
    world = replace(WORLD, cameras=cameras)
    identity = world.identity("train", 0)
    assert {camera for camera, _ in world.shots(identity, cameras)} == set(range(cameras))
    assert len({world.picture(identity, camera, 0).image.tobytes() for camera in range(cameras)}) == cameras


@pytest.mark.parametrize("colours", [1, 3, 5])
def test_held_out_combinations_are_worn_by_test_people_alone(colours: int) -> None:
    world = replace(WORLD, held_out=colours, siblings=3)
    for split, reserved in (("train", False), ("val", False), ("test", True), ("distractor", True)):
        people = [world.identity(split, index).attributes for index in range(200)]
        assert {is_held_out(person, colours) for person in people} == {reserved}
        for index in range(0, 200, 4):
            members = [world.identity(split, index + member) for member in range(4)]
            assert len({tuple(one.attributes.values()) for one in members}) == 4
            for one in members[1:]:
                assert [n for n in ATTRIBUTES if one.attributes[n] != members[0].attributes[n]] == [one.diff]


def test_every_garment_and_every_colour_stays_in_training() -> None:
    pairs = [(g, c) for g in ATTRIBUTES["upper"] for c in UPPER_COLOURS]
    kept = [(g, c) for g, c in pairs if not is_held_out({"upper": g, "upper_colour": c}, 5)]
    assert {g for g, _ in kept} == set(ATTRIBUTES["upper"]) and {c for _, c in kept} == set(UPPER_COLOURS)
    assert len(kept) == 6 * (13 - 5)


def test_caption_styles_of_train_and_test() -> None:
    world = replace(WORLD, style="list", test_style="picture")

    def begins(split: str) -> Counter[str]:
        first = Counter[str]()
        for index in range(30):
            identity = world.identity(split, index)
            for caption in world.captions(identity, 0, 0, world.picture(identity, 0, 0)):
                first[" ".join(caption.text.split()[:2])] += 1
        return first

    assert set(begins("test")) == {"a picture", "there is", "we see"}
    assert not set(begins("train")) & {"a picture", "there is", "we see"}
    assert set(STYLES) == {"mixed", "plain", "clothes", "action", "picture", "list"}


def test_more_captions_begin_with_the_same() -> None:
    identity = WORLD.identity("train", 5)
    picture = WORLD.picture(identity, 2, 0)
    four = WORLD.captions(identity, 2, 0, picture, 4)
    assert len({caption.text for caption in four}) == 4
    assert WORLD.captions(identity, 2, 0, picture) == four[:2]


def test_mismatched_captions_are_those_of_somebody_else_and_only_in_training() -> None:
    world = replace(WORLD, mismatched=0.5)
    mismatched = 0
    for index in range(60):
        identity = world.identity("train", index)
        picture = world.picture(identity, 3, 0)
        other = world.described(identity, 3, 0)
        captions = world.captions(identity, 3, 0, picture)
        assert captions == WORLD.captions(other, 3, 0, WORLD.picture(other, 3, 0))
        assert other == identity or other.family != identity.family
        mismatched += other != identity
    assert 20 <= mismatched <= 40
    tested = world.identity("test", 4)
    assert world.described(tested, 3, 0) is tested


def _histogram_score(world: World, people: int = 40) -> float:
    """Return the I2I mAP of raw colour histograms."""
    images, pids, cameras = [], [], []
    for index in range(people):
        identity = world.identity("test", index)
        for camera, k in world.shots(identity, 4):
            image = world.picture(identity, camera, k).image.resize((32, 64))
            images.append(torch.from_numpy(np.array(image)))
            pids.append(index)
            cameras.append(camera)
    feature, pid, camera_of = stripe_histogram(torch.stack(images)), torch.tensor(pids), torch.tensor(cameras)
    return float(i2i_metrics(feature, feature, pid, pid, camera_of, camera_of)["mAP"])


def test_harder_cameras_lower_the_histogram() -> None:
    scores = [_histogram_score(replace(WORLD, hardness=hardness)) for hardness in (0.0, 0.25, 0.6, 1.5)]
    assert all(easier > 1.15 * harder for easier, harder in pairwise(scores)), scores


def _ceiling(tmp_path: Path, world: World) -> float:
    out = tmp_path / str(len(list(tmp_path.iterdir())))
    export(ExportSpec("cuhk_pedes", world, 1, 48, 0, 2, 0.4), out)
    return text_ceiling(read_world(out, "cuhk_pedes"))["R1"]


def test_sentences_tell_less_with_siblings_silence_and_errors(tmp_path: Path) -> None:
    siblings = [_ceiling(tmp_path, replace(WORLD, siblings=count)) for count in (0, 1, 7)]
    assert siblings[0] > siblings[1] + 5 > siblings[2] + 5, siblings
    coverage = [_ceiling(tmp_path, replace(WORLD, coverage=share)) for share in (1.0, 0.7, 0.3)]
    assert coverage[0] > coverage[1] + 3 > coverage[2] + 6, coverage
    wrong = [_ceiling(tmp_path, replace(WORLD, wrong=share)) for share in (0.0, 0.5)]
    assert wrong[0] > wrong[1], wrong
    instance = [_ceiling(tmp_path, replace(WORLD, instance=share)) for share in (0.0, 1.0)]
    assert instance[1] > instance[0], instance
