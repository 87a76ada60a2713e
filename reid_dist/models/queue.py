"""Keys of past batches as further negatives and positives: a ring of image keys, text keys and identities in step.

MoCo (He et al., CVPR 2020, section 3.2) with one queue for each modality, as in TextReID's CM-MoCo (Han et al., BMVC
2021, section 3.2). The rows of all ranks enter in canonical order, which is the plan's (reid_dist/data/sampler.py), so
N ranks with A accumulation steps hold the same bytes as one rank with N x A.

The keys are features of photographs of people, stored beside their identities: PERSONAL DATA, in memory and in
checkpoints. Exports of a model never hold a queue.

Shape suffixes: B rows of this rank, R = max_rows, G = world_size x R gathered rows (padded, rank-major), K slots of the
queue, S slots of this rank's shard, T rows of the tail, D feature size, U ids of a batch.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from reid_dist.digest import mixed
from reid_dist.distributed import PackedGather, check_equal_on_ranks, rank, start_all_gather, sum_over_ranks, world_size
from reid_dist.kernels.contrastive import EMPTY, Backend, Mask, identity_means, queue_attend
from reid_dist.models.queue_ring import Modality, Ring
from reid_dist.models.queue_shards import sharded_attend, sharded_means
from reid_dist.pieces import Piece, Saved

QueueInit = Literal["empty", "random_as_published"]


def queue_ids(ids_B: Tensor) -> Tensor:
    """Identities as the queue and the kernels hold them: int32.

    Below 2^31 nothing changes. Larger ones (a stream numbers its pairs tar * 2^32 + number) become 31 well mixed bits:
    among K keys an anchor meets another of its id by mistake with probability K / 2^31, and that key is masked.
    Negative ones are padding, EMPTY.

    Args:
        ids_B: int64 or int32. Shape: (B,).

    Returns:
        Shape: (B,).
    """
    largest = torch.iinfo(torch.int32).max
    folded_B = torch.where(ids_B > largest, (mixed(ids_B.long()) >> 32) & largest, ids_B)
    return folded_B.clamp(min=EMPTY).to(torch.int32)


class PendingKeys:
    """Keys of one micro-step on their way to all ranks; made by `FeatureQueue.gather`."""

    def __init__(self, gathering: PackedGather) -> None:
        self._gathering: PackedGather | None = gathering
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """The keys of all ranks, as stored: in the queue's dtype, rank-major, padded by rows of id EMPTY.

        Returns:
            Image keys, Shape: (G, D); text keys, Shape: (G, D); ids, int32, Shape: (G,). The same on every rank.
        """
        if self._gathering is not None:
            image_GD, text_GD, ids_G = self._gathering.wait()
            self._rows, self._gathering = (image_GD, text_GD, ids_G), None
        assert self._rows is not None
        return self._rows


class FeatureQueue:
    """The newest `size` pairs of keys with their identities, equal on all ranks; not a module, so no buffer of one.

    The row with sequence number n is in slot n % size. Nothing here waits for the device except `check_agreement`
    and `restore`. Order of use in a step: `gather` right after the key encoder, `lse` for the loss, and `commit`
    after the backward of the last micro-step, and only if the optimizer stepped: every rank must decide alike.

    `commit` and a `current` of `lse` write into the storage that earlier calls of `lse` read. That is safe because
    the kernels keep the mean key and not the keys.

    Args:
        size: slots; needs no relation to any batch size.
        features: D.
        max_rows: the most rows that one rank gathers in a micro-step (the fixed length of its buffer).
        init: "empty", or "random_as_published": random unit vectors that count as negatives until overwritten.
        sharded: slot s only on rank s % world_size, for queues beyond a few GB. Statistics and partial sums are
            exchanged at every `lse`; loss and gradient equal those of the replicated queue within rounding.
        dtype: of the stored keys.
        device: where they are stored.
        seed: of the random keys; the same on every rank.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        size: int,
        features: int,
        max_rows: int,
        *,
        init: QueueInit = "empty",
        sharded: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if min(size, features, max_rows) < 1:
            raise ValueError(f"a queue of size {size}, {features} features and {max_rows} rows; each is at least 1")
        self.size, self.features, self.max_rows, self.sharded = size, features, max_rows, sharded
        shard, shards = (rank(), world_size()) if sharded else (0, 1)
        self.ring = Ring(size, features, dtype, torch.device(device), shard, shards)
        self._tail: tuple[PendingKeys, ...] = ()
        if init == "random_as_published":
            self.ring.fill_random(seed)

    def gather(self, image_BD: Tensor, text_BD: Tensor, ids_B: Tensor) -> PendingKeys:
        """Starts to gather this micro-step's keys over all ranks, in one collective; the caller goes on meanwhile.

        Args:
            image_BD: keys of the images, normalised; no gradient flows. Shape: (B, D), B <= max_rows, also 0.
            text_BD: keys of their texts. Shape: (B, D).
            ids_B: identities (see `queue_ids`); rows with a negative id are padding and left out. Shape: (B,).

        Raises:
            ValueError: shapes that do not fit the queue.
        """
        rows = ids_B.shape[0]
        if rows > self.max_rows:
            raise ValueError(f"{rows} rows to gather, but this queue was made for max_rows={self.max_rows} per rank")
        for name, keys in (("image", image_BD), ("text", text_BD)):
            if keys.shape != (rows, self.features):
                raise ValueError(f"{name} keys have shape {tuple(keys.shape)}; expected {(rows, self.features)}")
        ids_R = ids_B.new_full((self.max_rows,), EMPTY, dtype=torch.int32)
        ids_R[:rows] = queue_ids(ids_B)
        return PendingKeys(start_all_gather([self._padded(image_BD, ids_R), self._padded(text_BD, ids_R), ids_R]))

    def commit(self, pending: Sequence[PendingKeys]) -> None:
        """Writes the keys of a step's micro-steps over the oldest ones; after the backward.

        Args:
            pending: in the order of the micro-steps; any number of rows, also more than `size`: the newest stay.
        """
        self._tail = ()  # their memory can go
        if pending:
            self.ring.push(*_joined(pending))

    def lse(
        self,
        anchors_BD: Tensor,
        modality: Modality,
        ids_B: Tensor,
        log_scale: Tensor,
        *,
        mask: Mask = "identity",
        batch_ids_U: Tensor | None = None,
        current: Sequence[PendingKeys] = (),
        backend: Backend = "auto",
    ) -> Tensor:
        """Log-sum-exp of each anchor's scaled products with the stored keys; see `kernels.contrastive.queue_attend`.

        Args:
            anchors_BD: differentiable. Shape: (B, D); in a sharded queue of as many micro-steps on every rank.
            modality: which keys to compare with.
            ids_B: identities of the anchors, >= 0. Shape: (B,).
            log_scale: natural log of the inverse temperature; differentiable. Shape: () or (1,).
            mask: "identity" leaves out keys of the anchor's own id, "none" counts all, "positives" only the own id.
            batch_ids_U: with mask "none": ids that are left out for all anchors. In a sharded queue they must be the
                same on every rank, as `PendingKeys.wait()[2]` are. Shape: (U,).
            current: gathered keys that are counted too, in the same pass (in-batch negatives). With accumulation a row
                then sees its own micro-step's keys only, unless all micro-steps' are given.
            backend: of the kernel.

        Returns:
            -inf where nothing is counted. Shape: (B,).
        """
        keys_SD, key_ids_S = self._counted(modality, current)
        batch_ids_U = None if batch_ids_U is None else queue_ids(batch_ids_U)
        arguments = (anchors_BD, keys_SD, queue_ids(ids_B), key_ids_S, log_scale)
        if self.sharded:
            return sharded_attend(
                *arguments, rows=self._exchanged(anchors_BD), mask=mask, batch_ids_U=batch_ids_U, backend=backend
            )
        return queue_attend(*arguments, mask=mask, batch_ids_U=batch_ids_U, backend=backend)

    def positive_means(
        self, modality: Modality, ids_B: Tensor, current: Sequence[PendingKeys] = ()
    ) -> tuple[Tensor, Tensor]:
        """Mean of the stored keys of each identity; a constant.

        Args:
            modality: which keys.
            ids_B: wanted identities, >= 0. Shape: (B,); in a sharded queue as `lse`.
            current: gathered keys that are counted too.

        Returns:
            Means, zeros without a key, Shape: (B, D); number of keys, Shape: (B,).
        """
        keys_SD, key_ids_S = self._counted(modality, current)
        if self.sharded:
            return sharded_means(keys_SD, key_ids_S, queue_ids(ids_B), rows=self._exchanged(ids_B))
        return identity_means(keys_SD, key_ids_S, queue_ids(ids_B))

    def digest(self) -> Tensor:
        """A number that changes with any bit of any slot and with the slots' order; int64 on the device. Shape: ().

        Of the queue's content alone: the same for every world size, replicated or sharded (then a collective).
        """
        digest = self.ring.digest()
        return sum_over_ranks(digest) if self.sharded else digest

    def check_agreement(self) -> None:
        """Compares the ranks' queues; collective, and waits for the device.

        A shard has no twin: of a sharded queue the next sequence number is compared, and each shard with it.

        Raises:
            DivergenceError: on every rank, naming those that differ.
        """
        check_equal_on_ranks(self.agreed(), "the feature queue")

    def agreed(self) -> Tensor:
        """The number that must be the same on all ranks, of which `check_agreement` tells; int64. Shape: ()."""
        value = self.ring.next if self.sharded else self.ring.digest()
        # A rank whose slots contradict its next number must not agree with anyone.
        return torch.where(self.ring.in_sequence(), value, -1 - rank())

    def pieces(self) -> Iterator[Piece]:
        """This rank's rows, for a checkpoint. PERSONAL DATA."""
        return self.ring.pieces()

    def restore(self, saved: Saved) -> None:
        """Replaces the content by what `pieces` gave: of any number of ranks, replicated or sharded, and of any size.

        Raises:
            UserError: the queue was not saved.
        """
        self._tail = ()
        self.ring.restore(saved)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's storage."""
        return self.ring.nbytes

    def _exchanged(self, x_B: Tensor) -> int:
        """Rows of a shard's buffers, equal on all ranks: `max_rows` for each micro-step that the anchors are of."""
        return max(1, -(-x_B.shape[0] // self.max_rows)) * self.max_rows

    def _padded(self, keys_BD: Tensor, ids_R: Tensor) -> Tensor:
        """Keys in the queue's dtype with zeros in all rows that are padding. Shape: (B, D) -> (R, D)."""
        keys_RD = keys_BD.new_zeros((self.max_rows, self.features), dtype=self.ring.dtype)
        keys_RD[: keys_BD.shape[0]] = keys_BD.detach()
        return keys_RD.masked_fill_((ids_R == EMPTY)[:, None], 0)

    def _counted(self, modality: Modality, current: Sequence[PendingKeys]) -> tuple[Tensor, Tensor]:
        """The storage to read: the slots, and behind them the current keys that this rank counts."""
        if not current:
            return self.ring.keys(modality)
        # Of a sharded queue each rank counts the rows that it sent itself: they are counted once.
        owners = 1 if self.sharded else world_size()
        rows = slice(rank() * self.max_rows, (rank() + 1) * self.max_rows) if self.sharded else slice(None)
        if self._tail != tuple(current):
            self.ring.set_tail(*_joined(current, rows))
            self._tail = tuple(current)
        return self.ring.keys(modality, tail=len(current) * owners * self.max_rows)


def _joined(pending: Sequence[PendingKeys], rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """These rows of each micro-step, one after the other."""
    parts = [[x[rows] for x in keys.wait()] for keys in pending]
    image_GD, text_GD, ids_G = (torch.cat(part) for part in zip(*parts, strict=True))
    return image_GD, text_GD, ids_G
