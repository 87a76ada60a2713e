"""Golden hashes that pin the renderer and the sentences.

A change here changes every published number. When it is meant (a new drawing, or a Pillow that rasterises
otherwise: the hashes were made with Pillow 13.0), regenerate with

    python tests/shards/world/test_golden.py

and measure the baselines again.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from shards.world.draws import Draws
from shards.world.scenes import make_scene
from shards.world.spec import World

GOLDEN = Path(__file__).with_name("golden.json")
WORLD = World(0, 0.35, 1, 0.7, 0.0)
DEEPER = replace(WORLD, instance=1.0, cameras=15, held_out=4, style="action", test_style="list")


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def measure() -> dict[str, str]:
    """Return the hashes of raw pixels (before JPEG) and captions of a few identities and scenes."""
    found = {}
    for split, index in (
        ("train", 0),
        ("train", 1),
        ("test", 0),
        ("test", 7),
        ("distractor", 2),
        ("junk", 0),
    ):
        identity = WORLD.identity(split, index)
        for camera in range(0, 6, 2 if split == "test" else 5):
            picture = WORLD.picture(identity, camera, 0)
            texts = [caption.text for caption in WORLD.captions(identity, camera, 0, picture)]
            name = f"{split} {index} camera {camera}"
            found[f"{name} pixels"] = _sha(str(picture.image.size).encode() + picture.image.tobytes())
            found[f"{name} captions"] = _sha("\n".join(texts).encode())
    for split, index, camera in (("train", 3, 14), ("test", 2, 9), ("test", 5, 0), ("train", 8, 6)):
        identity = DEEPER.identity(split, index)
        picture = DEEPER.picture(identity, camera, 1)
        captions = DEEPER.captions(identity, camera, 1, picture)
        name = f"deeper {split} {index} camera {camera}"
        found[f"{name} pixels"] = _sha(str(picture.image.size).encode() + picture.image.tobytes())
        found[f"{name} captions"] = _sha(repr([(caption.text, caption.mentions) for caption in captions]).encode())
    poster = make_scene(Draws(0, 9), 0.35, posters=1.0, instance=0.5)
    found["poster"] = _sha(poster.image.tobytes() + poster.caption.encode())
    for number in range(4):
        scene = make_scene(Draws(0, number), 0.35)
        found[f"scene {number} pixels"] = _sha(scene.image.tobytes())
        found[f"scene {number} caption"] = _sha(scene.caption.encode())
    return found


def test_renderer_and_captions_are_pinned() -> None:
    assert measure() == json.loads(GOLDEN.read_text(encoding="utf-8"))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
