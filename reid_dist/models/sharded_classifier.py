"""The class centres of an identity classifier, cut over the ranks: Partial FC (An et al., CVPR 2022, section 3).

Rank w of W holds the centres of a range of classes, their optimizer's moments and nothing of the others: 10^6 classes
of 512 features under Adam are 8.2 GB with gradients on every rank when dense, 8.2 GB / W here. Below rate 1 a step
counts, and moves, its own classes and a sample of the rest, so that logits and gradients shrink too.

The centres are mean directions of people's features: PERSONAL DATA, in memory and in checkpoints. Exports
of a model never hold them.

Shape suffixes: V labels of a step, C classes, S classes of this rank, P of them that a step counts, D feature size.
"""

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from reid_dist.digest import mixed, words
from reid_dist.distributed import all_gather, rank, sum_over_ranks, world_size
from reid_dist.models.row_optimizer import RowOptimizer
from reid_dist.pieces import Piece, Saved

PART = "classifier"  # of a run's state
# Drawn together: a block's centres depend on its number alone, so every number of ranks draws the same.
_DRAWN = 1024
# Moved together: an update's temporary tensors are of this many rows.
_MOVED = 1 << 13
_HASHED = 1 << 31  # values that `mixed` has in its upper half: signed shifts leave the sign 0


def class_range(classes: int, shard: int, shards: int) -> tuple[int, int]:
    """First class of a shard and the one behind its last; sizes differ by at most 1."""
    whole, rest = divmod(classes, shards)
    first = shard * whole + min(shard, rest)
    return first, first + whole + (shard < rest)


class ShardedClassifier:
    """Logits f . w_c of classes whose centres w_c this rank holds; an object, not a module.

    An engine that broadcasts, averages, shards or saves the stage must not see it. In a step: `begin` with its labels,
    `centres` for each loss, which gives the same leaf every time, so that gradients of micro-batches add up; then
    `step` or `discard`.

    Sampling: the labels of the step, of all ranks, are always counted; any other class when a hash of (seed, steps
    done, class) says so, with probability `rate`, independently of all others. So on average a row's sum of
    exponentials over negatives holds all of the step's other labels and `rate` times the rest; published, it is not
    corrected for that. (Published code fills up the labels of each rank to a fixed number instead, which depends on how
    many ranks there are.) Moments and decay of a centre move in the steps that count it, see `RowOptimizer`.

    Args:
        classes: C of all ranks.
        features: D.
        optimizer: settings; their learning rate is multiplied by the factor of each step.
        rate: share of the classes that a step counts; at 1 there is no sampling.
        seed: of first centres and samples, the same on all ranks.
        max_norm: gradients of all ranks' centres together are scaled down to this L2 norm; 0: never. An engine clips
            its own parameters by their own norm, so that together they are within sqrt(2) of the limit.
        device: where the centres are.
        dtype: float32, or float64 for references.

    Attributes:
        factor: of the learning rate in the next step.
        steps: done; those that the engine skipped do not count.
    """

    def __init__(
        self,
        classes: int,
        features: int,
        optimizer: RowOptimizer,
        *,
        rate: float = 1.0,
        seed: int = 0,
        max_norm: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 0 < rate <= 1 or classes < 1:
            raise ValueError(f"{classes} classes at rate {rate}: wants at least one, and a rate above 0 and at most 1")
        self.classes, self.features, self.optimizer = classes, features, optimizer
        self.rate, self.seed, self.max_norm = rate, seed, max_norm
        self.shard = (rank(), world_size())
        self.first, self.stop = class_range(classes, *self.shard)
        self.weight_SD = torch.empty(self.stop - self.first, features, dtype=dtype, device=device)
        self.moments = [torch.zeros_like(self.weight_SD) for _ in range(optimizer.moments)]
        self.steps_S = torch.zeros(self.stop - self.first, dtype=torch.int32, device=device)
        self.steps = 0
        self.factor = 1.0
        self._leaf: Tensor | None = None
        self._index_P: Tensor | None = None
        self._draw()

    def begin(self, label_V: Tensor) -> None:
        """Chooses the centres that a step counts; below rate 1 a collective.

        Args:
            label_V: this rank's labels of ALL micro-batches of the step, as many on every rank. Shape: (V,).
        """
        self.discard()
        if self.rate < 1:
            label_V = label_V.to(self.weight_SD.device)
            self._index_P = self._sample(all_gather(label_V) if len(label_V) else label_V)
            leaf_PD = self.weight_SD.index_select(0, self._index_P)
        else:
            leaf_PD = self.weight_SD.detach()
        self._leaf = leaf_PD.requires_grad_()

    def centres(self, label_V: Tensor) -> tuple[Tensor, Tensor]:
        """Centres that this step counts here, a leaf for gradients, and their classes.

        Args:
            label_V: for `begin`, where the step has not begun. Shape: (V,).

        Returns:
            Shapes: (P, D) and (P,), classes ascending.
        """
        if self._leaf is None:
            self.begin(label_V)
        assert self._leaf is not None
        if self._index_P is not None:
            return self._leaf, self._index_P + self.first
        return self._leaf, torch.arange(self.first, self.stop, device=self.weight_SD.device)

    @property
    def leaf(self) -> Tensor | None:
        """What `centres` gives in this step; None where it has not begun."""
        return self._leaf

    @torch.no_grad()
    def step(self) -> None:
        """Moves the counted centres by the gradients of this step, or by zero ones; a collective when they are clipped.

        Does nothing when no step has begun.
        """
        if self._leaf is None:
            return
        gradient_PD = torch.zeros_like(self._leaf) if self._leaf.grad is None else self._leaf.grad
        # Losses are means over ranks, and the gradient is that of their sum.
        gradient_PD.mul_(self._clipping(gradient_PD) / world_size())
        for rows in _blocks(gradient_PD.shape[0]):
            self._move(rows, gradient_PD[rows])
        self.steps += 1
        self.discard()

    def end(self, updated: bool) -> None:
        """`step`, or `discard` where the engine skipped its own."""
        if updated:
            self.step()
        else:
            self.discard()

    def discard(self) -> None:
        """Forgets the gradients: nothing moves, and the next step samples what this one did."""
        self._leaf = self._index_P = None

    def rows(self) -> dict[str, Tensor]:
        """All that is kept of this rank's classes between steps, by name: the tensors themselves."""
        moments = {f"moment_{number}": moment for number, moment in enumerate(self.moments)}
        return {"weight": self.weight_SD, **moments, "steps": self.steps_S}

    def pieces(self) -> Iterator[Piece]:
        """The classes of this rank, for a checkpoint. PERSONAL DATA."""
        for name, x in self.rows().items():
            if len(x):
                yield Piece(PART, name, x.detach(), self.classes, self.first, shape=(self.classes, *x.shape[1:]))

    def restore(self, saved: Saved, steps: int) -> None:
        """Takes up what `pieces` gave, of any number of ranks, and the count of steps."""
        self.discard()
        for name, x in self.rows().items():
            x.copy_(saved.rows(PART, name, self.first, len(x)))
        self.steps = steps

    def digest(self) -> Tensor:
        """A number that changes with any bit of centres, moments and counts; int64, Shape: (). A collective.

        The same for every number of ranks.
        """
        total = torch.zeros((), dtype=torch.int64, device=self.weight_SD.device)
        parts = [x if x.dim() == 2 else x[:, None] for x in self.rows().values()]
        for rows in _blocks(self.stop - self.first):
            class_S = torch.arange(rows.start, rows.stop, device=total.device) + self.first
            for place, x_SD in enumerate(parts):
                weight_D = mixed(torch.arange(x_SD.shape[1], device=total.device) + (place << 20))
                total += (mixed(class_S + (1 << 40)) * (words(x_SD[rows]) * weight_D).sum(dim=1)).sum()
        return sum_over_ranks(total) + self.steps

    def bytes_on(self, ranks: int) -> int:
        """Bytes of one of so many ranks within a step: centres, moments, counts, gradients and sampled copies."""
        rows = math.ceil(self.classes / ranks)
        row = self.features * self.weight_SD.dtype.itemsize
        counted = 1 if self.rate == 1 else 2 * self.rate
        return int(rows * (row * (1 + self.optimizer.moments + counted) + self.steps_S.dtype.itemsize))

    @property
    def nbytes(self) -> int:
        """Bytes that this rank holds now, between steps."""
        return sum(x.nbytes for x in self.rows().values())

    def _draw(self) -> None:
        """First centres, N(0, .001) as those of the dense classifier; drawn on the CPU, alike for every device."""
        for block in range(self.first // _DRAWN, math.ceil(self.stop / _DRAWN)):
            start = block * _DRAWN
            generator = torch.Generator().manual_seed(_hash(self.seed, "centres", block))
            drawn = torch.randn(_DRAWN, self.features, generator=generator) * 0.001
            low, high = max(start, self.first), min(start + _DRAWN, self.stop)
            self.weight_SD[low - self.first : high - self.first] = drawn[low - start : high - start]

    def _sample(self, label_G: Tensor) -> Tensor:
        """Rows that this step counts here, ascending. Shape: (V of all ranks,) -> (P,)."""
        rows = self.stop - self.first
        class_S = torch.arange(self.first, self.stop, device=label_G.device)
        drawn_S = mixed(class_S + _hash(self.seed, "sample", self.steps)) >> 32
        counted_S = torch.zeros(rows + 1, dtype=torch.bool, device=label_G.device)  # and one for labels of other ranks
        torch.lt(drawn_S, round(self.rate * _HASHED), out=counted_S[:rows])
        row_G = label_G - self.first
        counted_S[torch.where((row_G >= 0) & (row_G < rows), row_G, rows)] = True
        if isinstance(counted_S, FakeTensor):  # a dry run has no values to choose by
            return torch.arange(math.ceil(rows * self.rate), device=label_G.device)
        return counted_S[:rows].nonzero()[:, 0]

    def _clipping(self, gradient_PD: Tensor) -> float:
        """Factor of the gradient."""
        if not self.max_norm:
            return 1.0
        squares = gradient_PD.new_zeros((), dtype=torch.float64)
        for rows in _blocks(gradient_PD.shape[0]):
            squares += gradient_PD[rows].double().square().sum()
        norm = float(sum_over_ranks(squares).sqrt()) / world_size()
        return min(1.0, self.max_norm / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_'s

    def _move(self, rows: slice, gradient_SD: Tensor) -> None:
        """One optimizer step of a block of the counted rows."""
        stored = list(self.rows().values())
        if self._index_P is None:
            weight_SD, *moments, steps_S = (x[rows] for x in stored)
            self.optimizer.update(weight_SD, gradient_SD, moments, steps_S, self.factor)
            return
        index = self._index_P[rows]
        weight_SD, *moments, steps_S = taken = [x[index] for x in stored]
        self.optimizer.update(weight_SD, gradient_SD, moments, steps_S, self.factor)
        for x, block in zip(stored, taken, strict=True):
            x[index] = block


def _hash(seed: int, purpose: str, number: int) -> int:
    """64 well mixed bits; the same on every machine."""
    text = f"{seed} {purpose} {number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _blocks(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _MOVED):
        yield slice(start, min(start + _MOVED, rows))
