"""Cameras and pictures: independence, geometry, visible attributes."""

import numpy as np

from shards.world.camera import CAMERAS, MAX_HEIGHT, MIN_HEIGHT, make_camera, render, strength
from shards.world.draws import Draws
from shards.world.identity import make_identity


def test_a_picture_depends_on_its_key_alone() -> None:
    identity = make_identity(0, "train", 3, 1)
    first = render(0, identity, 2, 0, 0.35)
    render(0, make_identity(0, "train", 9, 1), 4, 1, 0.35)
    again = render(0, identity, 2, 0, 0.35)
    assert first.image.tobytes() == again.image.tobytes() and first.visible == again.visible
    assert first.image.tobytes() != render(0, identity, 2, 1, 0.35).image.tobytes()


def test_sizes_for_all_cameras() -> None:
    for seed in range(3):
        for camera in range(CAMERAS):
            image = render(seed, make_identity(seed, "test", camera, 1), camera, 0, 1.0).image
            assert MIN_HEIGHT <= image.height <= MAX_HEIGHT and image.width * 2 == image.height


def test_cameras_of_a_world_differ_and_a_clean_world_has_no_disturbance() -> None:
    assert len({make_camera(0, camera, 0.35).gain for camera in range(CAMERAS)}) == CAMERAS
    clean = make_camera(0, 1, 0.0)
    assert (clean.gain, clean.gamma, clean.saturation, clean.noise, clean.quality) == (0.0, 1.0, 1.0, 0.0, 92)
    assert strength(0.25) < strength(0.35) < strength(1.0) < 1


def test_hardness_spreads_brightness_between_cameras() -> None:
    def spread(hardness: float) -> float:
        identity = make_identity(0, "train", 0, 1)
        return float(np.std([np.asarray(render(0, identity, c, 0, hardness).image).mean() for c in range(CAMERAS)]))

    assert spread(1.0) > spread(0.0)


def test_draws_are_uniform_and_seeded() -> None:
    draws = Draws(1, 2)
    values = [draws.uniform() for _ in range(1000)]
    assert 0.45 < sum(values) / 1000 < 0.55 and Draws(1, 2).uniform() == values[0] != Draws(1, 3).uniform()
    assert sorted(draws.shuffled(range(9))) == list(range(9))
    assert all(abs(draws.normal(limit=1.0)) <= 1.0 for _ in range(200))
    assert {draws.weighted("ab", (0.0, 1.0)) for _ in range(50)} == {"b"}
