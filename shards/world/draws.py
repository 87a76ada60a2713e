"""Seeded random draws whose stream depends on the PCG64 bit generator alone.

numpy guarantees the streams of bit generators, not those of `Generator` methods, so everything the world draws is
derived from uniform doubles taken here; buffering them is also several times faster than scalar numpy calls.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_BUFFER = 128


class Draws:
    """Random draws for one object of the world (an identity, an image, a caption, a camera)."""

    def __init__(self, *key: int) -> None:
        """Start the stream named by `key`, for example (world seed, identity, camera, k)."""
        self._bits = np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))
        self._values: list[float] = []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a double in [low, high)."""
        if not self._values:
            self._values = self._bits.random(_BUFFER).tolist()
        return low + (high - low) * self._values.pop()

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self.uniform() < probability

    def below(self, limit: int) -> int:
        """Return an integer in [0, limit)."""
        return min(int(self.uniform() * limit), limit - 1)

    def pick(self, options: Sequence[T]) -> T:
        """Return one of the options, each as likely."""
        return options[self.below(len(options))]

    def weighted(self, options: Sequence[T], weights: Sequence[float]) -> T:
        """Return one of the options with probability proportional to its weight."""
        left = self.uniform() * sum(weights)
        for option, weight in zip(options, weights, strict=True):
            left -= weight
            if left < 0:
                return option
        return options[-1]

    def normal(self, sigma: float = 1.0, limit: float = 2.5) -> float:
        """Return a normal number (Box-Muller), cut at `limit` standard deviations so that no picture is ruined."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self.uniform()))
        value = radius * math.cos(2.0 * math.pi * self.uniform())
        return sigma * max(-limit, min(limit, value))

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """Return the options in random order (Fisher-Yates)."""
        items = list(options)
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]
        return items
