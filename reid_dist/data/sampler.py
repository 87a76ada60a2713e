"""Plans: which samples make up each optimizer step, as pure functions of (seed, epoch).

A plan is one global order, the same on every rank and at every world size; a rank takes its slice of a step, so the
position in training is (seed, epoch, step) and nothing has to be stored or gathered.

Legend: N samples, G global batch, W world size, A accumulation, B = G / (W * A) rows of one rank's micro-batch,
P identities of a step, K images of an identity.
"""

import math

import numpy as np
import numpy.typing as npt

from reid_dist.errors import UserError

IntArray = npt.NDArray[np.int64]

# Third word of the key, so that plans never share random numbers with augmentations (transforms.sample_rng).
_PLAN_STREAM = 0x504C414E


def epoch_plan(count: int, global_batch_size: int, seed: int, epoch: int) -> IntArray:
    """One pass over all samples in a seeded order, cut into equal steps.

    Each sample appears at most once; the remainder (fewer than G samples, other ones in each epoch) is dropped. When
    there are fewer samples than one batch takes, the order wraps around, so samples repeat and there is one step.

    Args:
        count: N, number of samples.
        global_batch_size: G.
        seed: not negative.
        epoch: not negative.

    Returns:
        Sample numbers. Shape: (steps, G) with steps = max(1, N // G).

    Raises:
        UserError: there are no samples.
    """
    if count < 1:
        raise UserError("data: the training set has no samples; check data.root and the split")
    order = np.argsort(_random(seed, epoch, count), kind="stable")
    steps = max(1, count // global_batch_size)
    return np.resize(order, (steps, global_batch_size)).astype(np.int64)


def identity_plan(pid_N: IntArray, identities: int, images: int, seed: int, epoch: int) -> IntArray:
    """One pass over all identities, P identities with K images each per step.

    Each identity appears at most once per pass; the remainder (fewer than P identities) is dropped. The K images of
    an identity are distinct where it has that many, otherwise each is repeated as evenly as possible.

    Args:
        pid_N: identity number of each sample. Shape: (N,).
        identities: P.
        images: K.
        seed: not negative.
        epoch: not negative.

    Returns:
        Sample numbers, the K rows of an identity adjacent. Shape: (steps, P * K).

    Raises:
        UserError: there are fewer than P identities.
    """
    random = _random(seed, epoch, 2 * len(pid_N))
    # Random order inside groups of equal identity: one sort instead of one permutation per identity.
    grouped = np.lexsort((random[: len(pid_N)], pid_N))
    present, first, size = np.unique(pid_N[grouped], return_index=True, return_counts=True)
    if len(present) < identities:
        raise UserError(
            f"data: a batch takes {identities} identities, but the training set has {len(present)}; "
            f"lower data.global_batch_size or raise the images per identity"
        )
    steps = len(present) // identities
    order = np.argsort(random[len(pid_N) :][: len(present)], kind="stable")
    chosen = order[: steps * identities]
    position = first[chosen, None] + np.arange(images) % size[chosen, None]
    return grouped[position].reshape(steps, identities * images).astype(np.int64)


def local_batch_size(global_batch_size: int, world_size: int, accumulation: int = 1, images: int = 1) -> int:
    """B, the rows of one rank's micro-batch, when the global batch can be cut that way.

    Args:
        global_batch_size: G.
        world_size: W.
        accumulation: A.
        images: K of P×K batches; every micro-batch of W * B rows must hold whole identities.

    Raises:
        UserError: G is not a multiple of W * A, or G / A not one of K.
    """
    unit = math.lcm(world_size * accumulation, accumulation * images)
    if global_batch_size < 1 or global_batch_size % unit:
        below, above = global_batch_size // unit * unit, (global_batch_size // unit + 1) * unit
        nearest = f"{below} or {above}" if below > 0 else f"{above}"
        reason = f"world size {world_size}"
        if accumulation > 1:
            reason += f" x accumulation {accumulation}"
        if images > 1:
            reason += f" in whole identities of {images} images"
        raise UserError(
            f"data.global_batch_size: {global_batch_size} cannot be shared by {reason}; nearest that work: {nearest}"
        )
    return global_batch_size // (world_size * accumulation)


def micro_batches(
    plan_row_G: IntArray, rank: int, world_size: int, accumulation: int = 1, images: int = 1
) -> list[IntArray]:
    """The rows of a global batch that one rank computes.

    Micro-batch a is rows [a*W*B, (a+1)*W*B) of the step and rank r takes [r*B, (r+1)*B) of it: features gathered in
    rank order, micro-batch after micro-batch, are in the order of the plan at any world size.

    Args:
        plan_row_G: one step of a plan. Shape: (G,).
        rank: r.
        world_size: W.
        accumulation: A.
        images: K, see `local_batch_size`.

    Returns:
        A arrays of shape (B,).

    Raises:
        UserError: the batch cannot be cut that way.
    """
    rows = local_batch_size(len(plan_row_G), world_size, accumulation, images)
    return list(plan_row_G.reshape(accumulation, world_size, rows)[:, rank])


def occurrences(plan_row_G: IntArray) -> IntArray:
    """How often each entry has appeared before in the step: 0 for all when the samples are distinct.

    A sample that a step repeats must not get the same augmentation twice; the count is taken over the global batch,
    so it does not depend on the world size.

    Returns:
        Shape: (G,).
    """
    order = np.argsort(plan_row_G, kind="stable")
    ordered = plan_row_G[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(ordered)])
    result = np.empty(len(plan_row_G), dtype=np.int64)
    result[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return result


def _random(seed: int, epoch: int, count: int) -> npt.NDArray[np.uint64]:
    """Raw 64-bit draws: numpy keeps these the same in all versions, unlike Generator.permutation."""
    raw = np.random.PCG64(np.random.SeedSequence([seed, epoch, _PLAN_STREAM])).random_raw(count)
    return np.asarray(raw, dtype=np.uint64)
