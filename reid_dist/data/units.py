"""What plans order: single samples, or identities with K images each.

Legend: N units of a set (or its samples, where a shape says so), U units of a step, K samples of a unit, M samples of
the step's identities.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
RawArray = npt.NDArray[np.uint64]


class Units(Protocol):
    """What a plan needs of a set.

    Attributes:
        images: K.
        draws: random numbers of a pass that come before those that order the units.
        own_spares: how many spares are samples of the same unit; the others are of the units that follow.
        distinct: whether a step with a unit in it twice would be wrong, however few there are.
    """

    images: int
    draws: int
    own_spares: int
    distinct: bool

    def __len__(self) -> int:
        """N."""

    def rows(self, unit_U: IntArray, random_N: RawArray) -> IntArray:
        """The samples of some units in a pass. Shape: (U, K)."""

    def others(self, unit_U: IntArray, random_N: RawArray) -> IntArray:
        """Further samples of the same units, for each row of `rows`. Shape: (U, K, own_spares)."""


class Samples:
    """Each sample is a unit.

    Args:
        count: number of samples.
        first: number of the first sample; the others follow.
    """

    images = 1
    draws = 0
    own_spares = 0
    distinct = False

    def __init__(self, count: int, first: int = 0) -> None:
        self._count = count
        self._first = first

    def __len__(self) -> int:
        return self._count

    def rows(self, unit_U: IntArray, random_N: RawArray) -> IntArray:
        """See `Units`."""
        return unit_U[:, None] + self._first

    def others(self, unit_U: IntArray, random_N: RawArray) -> IntArray:
        """See `Units`."""
        return np.empty((len(unit_U), 1, 0), dtype=np.int64)


class Identities:
    """Each identity is a unit of K images.

    The first image of an identity is any of them, the next ones are of cameras that were not taken yet, where there
    are such; then a second image of each camera, and so on. The K images are distinct where the identity has that
    many, otherwise each is repeated as evenly as possible. What is said of images holds of items (`TrainingItems`):
    where these are pairs of image and caption, K of them may be fewer images.

    Args:
        pid_N: identity of each sample. Shape: (samples,).
        camid_N: camera of each sample; -1, unknown, counts as one more camera. Shape: (samples,).
        images: K.
        first: number of the first sample; the others follow.
    """

    own_spares = 12
    distinct = True

    def __init__(self, pid_N: IntArray, camid_N: IntArray, images: int, first: int = 0) -> None:
        self.images = images
        self.draws = len(pid_N)
        self._first = first
        self._camid_N = camid_N
        self._grouped_N = np.argsort(pid_N, kind="stable")
        _, self._begin, self._size = np.unique(pid_N[self._grouped_N], return_index=True, return_counts=True)

    def __len__(self) -> int:
        return len(self._begin)

    def rows(self, unit_U: IntArray, random_N: RawArray) -> IntArray:
        """See `Units`."""
        return self._at(unit_U, random_N, np.arange(self.images) % self._size[unit_U, None])

    def others(self, unit_U: IntArray, random_N: RawArray) -> IntArray:
        """See `Units`; images that the step does not hold come first, other ones for each of the K rows."""
        size_U11 = self._size[unit_U, None, None]
        unused = np.maximum(size_U11 - self.images, 0)
        row = np.arange(self.images)[:, None] + np.arange(self.own_spares)
        used = (row + 1 - unused) % np.minimum(self.images, size_U11)
        place = np.where(np.arange(self.own_spares) < unused, self.images + row % np.maximum(unused, 1), used)
        return self._at(unit_U, random_N, place.reshape(len(unit_U), -1)).reshape(place.shape)

    def _at(self, unit_U: IntArray, random_N: RawArray, place: IntArray) -> IntArray:
        """Images by their place in the order of their identity. Shape of `place`: (U, any)."""
        size_U = self._size[unit_U]
        end_U = np.cumsum(size_U)
        owner_M = np.repeat(np.arange(len(unit_U)), size_U)
        member_M = self._grouped_N[np.arange(end_U[-1]) + (self._begin[unit_U] - end_U + size_U)[owner_M]]
        random_M, camid_M = random_N[member_M], self._camid_N[member_M]
        # Which image of its camera each is, the first to be taken being number 0.
        order_M = np.lexsort((random_M, camid_M, owner_M))
        round_M = np.empty_like(order_M)
        round_M[order_M] = places_in_runs(owner_M[order_M], camid_M[order_M])
        ordered_M = member_M[np.lexsort((random_M, round_M, owner_M))]
        chosen: IntArray = ordered_M[(end_U - size_U)[:, None] + place] + self._first
        return chosen


def places_in_runs(*columns: IntArray) -> IntArray:
    """How many rows directly before each are equal to it in all columns."""
    new = np.ones(len(columns[0]), dtype=bool)
    new[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    starts = np.flatnonzero(new)
    place: IntArray = np.arange(len(new)) - np.repeat(starts, np.diff(np.r_[starts, len(new)]))
    return place
