"""Batches of captioned and uncaptioned sets: every rank and micro-batch must get the same number of captions.

Text features are gathered over the ranks, so that tensors of other lengths would hang or mislead them.

Legend: G global batch, W world size, A accumulation, B = G / (W * A) rows of one rank's micro-batch, K rows of a unit.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from reid_dist.data.mixing import FINEST_SHARE, Mix
from reid_dist.errors import UserError

# How many times greater a batch may be to be named as one that works.
_FARTHEST = 16


def require_equal_rows(
    captioned: Sequence[bool],
    weights: Sequence[float],
    global_batch_size: int,
    world_size: int,
    accumulation: int = 1,
    images: int = 1,
) -> None:
    """Checks that a mix gives every rank and micro-batch the same number of captioned rows.

    Args:
        captioned: of each set, whether it has captions; some have and some have not.
        weights: of each set, as of `Mix`; empty where sets are not told apart.
        global_batch_size: G, which W * A divide.
        world_size: W.
        accumulation: A.
        images: K.

    Raises:
        UserError: it does not; names what would.
    """
    if not weights:
        raise UserError(
            "data.weights: captioned and uncaptioned sets in one batch need a share for each, so that all ranks get as "
            "many captions; give data.weights, or data.mixing: alternating"
        )
    pieces = world_size * accumulation
    rows, share = global_batch_size // pieces, _first_share(captioned, weights)
    if _equal(share, rows, images):
        return
    mine = share if captioned[0] else 1 - share
    sizes = _other_sizes(share, global_batch_size, pieces, accumulation, images)
    shares = [each if captioned[0] else 1 - each for each in _other_shares(share, rows, images)]
    nearest = [f"data.global_batch_size {size}" for size in sizes]
    nearest += [f"data.weights that give them {each}" for each in shares] + ["data.mixing: alternating"]
    raise UserError(
        f"data.weights: captioned sets have {float(mine):.4g} of the mix, {float(mine * rows):.4g} of the {rows} rows "
        f"of a rank's micro-batch, but all of these must hold the same whole number"
        f"{f', in identities of {images}' if images > 1 else ''}; nearest that work: {' or '.join(nearest)}"
    )


def _first_share(captioned: Sequence[bool], weights: Sequence[float]) -> Fraction:
    """Of the group of sets that `Mix` tells from the other first: those that are captioned as the first set is."""
    exact = [Fraction(str(weight)) for weight in weights]
    part = sum((weight for weight, has in zip(exact, captioned, strict=True) if has == captioned[0]), Fraction())
    return (part / sum(exact)).limit_denominator(FINEST_SHARE)


def _equal(share: Fraction, rows: int, images: int) -> bool:
    """Whether all pieces of `rows` rows of the global order hold the same number of rows of the first group.

    That number then is rows * share, a whole one; so the order repeats after at most `rows` units, which are `images`
    pieces, and these are looked at.
    """
    if (rows * share).denominator > 1:
        return False
    before = Mix([share.numerator, share.denominator - share.numerator], 1).counts(np.arange(rows + 1))[0]
    counts = np.diff(before).repeat(images).reshape(images, rows).sum(axis=1)
    return bool((counts == counts[0]).all())


def _other_sizes(share: Fraction, size: int, pieces: int, accumulation: int, images: int) -> list[int]:
    """The next smaller and the next greater global batch that works, if not too far off."""
    unit = math.lcm(pieces, accumulation * images)
    ways = range(size - unit, 0, -unit), range(size + unit, _FARTHEST * size + 1, unit)
    found = [next((each for each in way if _equal(share, each // pieces, images)), 0) for way in ways]
    return [each for each in found if each]


def _other_shares(share: Fraction, rows: int, images: int) -> list[Fraction]:
    """The nearest share that works with this batch, if there is one."""
    ordered = sorted((Fraction(count, rows) for count in range(1, rows)), key=lambda each: abs(each - share))
    return [each for each in ordered if _equal(each, rows, images)][:1]
