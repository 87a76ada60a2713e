"""How fast one core draws: identity, picture, camera, JPEG and two sentences, as an export does without its files."""

import time

from shards.world.spec import World

_WARM = 36


def images_per_second(world: World, images: int) -> tuple[float, float]:
    """Return pictures per second of wall clock and per second of this process's processor time.

    The second number is what one core does when others keep the machine busy. Backgrounds and the noise bank are
    made once before the clock starts.

    Args:
        world: The world.
        images: Pictures to draw, eight of each person.
    """
    _draw(world, _WARM)
    wall, cpu = time.perf_counter(), time.process_time()
    _draw(world, images)
    return images / (time.perf_counter() - wall), images / max(time.process_time() - cpu, 1e-9)


def _draw(world: World, images: int) -> None:
    for index in range((images + 7) // 8):
        identity = world.identity("train", index)
        for camera, k in world.shots(identity, min(8, images - 8 * index)):
            picture = world.picture(identity, camera, k)
            picture.jpeg()
            world.captions(identity, camera, k, picture)
