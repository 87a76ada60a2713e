"""Cameras and pictures: independence, geometry, visible attributes."""

from colorsys import rgb_to_hsv
from dataclasses import replace
from itertools import product

import numpy as np
from PIL import Image

from shards.world.backdrop import PLACES, draw_backdrop
from shards.world.camera import CAMERAS, MAX_HEIGHT, MIN_HEIGHT, _expose, make_camera, render, strength
from shards.world.draws import Draws
from shards.world.identity import ATTRIBUTES, make_identity
from shards.world.palette import SKIN
from shards.world.pen import Pen
from shards.world.render import Figure


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


def test_skin_seldom_turns_magenta() -> None:
    """Casts level off: hues between violet and pink are rare on skin, also beyond hardness 1."""
    for hardness, limit in ((0.35, 0.02), (1.0, 0.08), (2.0, 0.1)):
        magenta = total = 0
        for seed, camera, skin in product(range(6), range(CAMERAS), SKIN.values()):
            patch = Image.new("RGB", (24, 48), skin)
            shown = np.asarray(_expose(patch, make_camera(seed, camera, hardness), Draws(seed, camera, 7)))
            hue, saturation, _ = rgb_to_hsv(*(shown.reshape(-1, 3).mean(axis=0) / 255))
            magenta += 270 <= 360 * hue <= 340 and saturation > 0.25
            total += 1
        assert magenta <= limit * total, (hardness, magenta, total)


def test_backgrounds_are_places_and_not_noise() -> None:
    """Neighbouring pixels of a clean panorama are mostly of the same colour."""
    for place in PLACES:
        panorama = np.asarray(draw_backdrop(Draws(5, 1), place, 256), dtype=np.int16)
        same = (np.abs(np.diff(panorama, axis=1)).max(axis=2) == 0).mean()
        assert same > 0.93 and len(np.unique(panorama.reshape(-1, 3), axis=0)) > 4, place


def test_a_backpack_is_seen_from_behind_over_every_garment() -> None:
    base = next(
        one for one in (make_identity(1, "train", i, 0) for i in range(99)) if one.attributes["hair"] == "short"
    )
    for garment in ATTRIBUTES["upper"]:
        worn = {**base.attributes, "upper": garment, "upper_colour": "black", "bag": "backpack", "bag_colour": "yellow"}
        image = Image.new("RGB", (128, 256))
        boxes = Figure(replace(base, attributes=worn), "back", 0.3).draw(Pen(image, (64, 8), 240))
        pixels = np.asarray(image)
        assert "bag" in boxes and ((pixels[..., 0] > 180) & (pixels[..., 2] < 120)).mean() > 0.03
