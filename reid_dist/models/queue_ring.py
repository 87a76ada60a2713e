"""Storage of a feature queue: image keys, text keys and identities in one ring, written without host synchronisation.

Shape suffixes: K slots of the whole queue, S slots of this shard, X = S + 1 + T rows of storage (the shard's slots,
a dump row, a tail for keys that are counted once), G gathered rows, T rows of the tail, D feature size.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reid_dist.digest import mixed, words
from reid_dist.kernels.contrastive import EMPTY, RANDOM
from reid_dist.pieces import Piece, Saved, read_whole, shared_out, shared_rows

Modality = Literal["image", "text"]
PART = "queue"  # of a run's state

# Sequence number of a slot that was never written; numbers of first, random content are negative but small.
_NEVER = torch.iinfo(torch.int64).min
_RANDOM_BLOCK = 4096
_READ = 1 << 16  # rows at once
_DIGEST_WORDS = 1 << 22


class Ring:
    """Slots s with s % shards == shard of a ring of `size` slots; the row with sequence number n is in slot n % size.

    Rows that must not be kept (padding, another shard's, older than the newest `size`) are written to the dump row,
    which is emptied at once: where a row goes is then arithmetic on the device, and no count ever reaches the host.
    Memory that was never written is zero, so that no 0 * NaN arises from a key of weight 0.

    Args:
        size: slots of the whole ring.
        features: D.
        dtype: of the stored keys.
        device: where they are stored.
        shard: which of `shards` this is.
        shards: number of parts that the ring is cut into.
    """

    def __init__(
        self, size: int, features: int, dtype: torch.dtype, device: torch.device, shard: int = 0, shards: int = 1
    ) -> None:
        self.size, self.features, self.dtype, self.shard, self.shards = size, features, dtype, shard, shards
        self.slots = len(range(shard, size, shards))
        self.image_XD = torch.zeros(self.slots + 1, features, dtype=dtype, device=device)
        self.text_XD = torch.zeros_like(self.image_XD)
        self.ids_X = torch.full((self.slots + 1,), EMPTY, dtype=torch.int32, device=device)
        self.sequence_X = torch.full((self.slots + 1,), _NEVER, dtype=torch.int64, device=device)
        self.next = torch.zeros((), dtype=torch.int64, device=device)

    def clear(self) -> None:
        """As new: no keys, next sequence number 0."""
        self.image_XD.zero_()
        self.text_XD.zero_()
        self.ids_X.fill_(EMPTY)
        self.sequence_X.fill_(_NEVER)
        self.next.zero_()

    def push(self, image_GD: Tensor, text_GD: Tensor, ids_G: Tensor) -> None:
        """Writes the rows with ids >= 0 over the oldest ones, in order; of more than `size` rows the newest stay.

        Args:
            image_GD: Shape: (G, D).
            text_GD: Shape: (G, D).
            ids_G: int32; negative for padding. Shape: (G,).
        """
        valid_G = ids_G >= 0
        sequence_G = self.next + valid_G.cumsum(0) - 1
        self.next += valid_G.sum()
        self.place(image_GD, text_GD, ids_G, sequence_G, valid_G)

    def place(self, image_GD: Tensor, text_GD: Tensor, ids_G: Tensor, sequence_G: Tensor, valid_G: Tensor) -> None:
        """Writes valid rows that are among the newest `size` before `next` to the slots of their sequence numbers."""
        slot_G = sequence_G.remainder(self.size)
        kept_G = valid_G & (sequence_G >= self.next - self.size) & (slot_G % self.shards == self.shard)
        row_G = torch.where(kept_G, slot_G // self.shards, self.slots)
        self.image_XD.index_copy_(0, row_G, image_GD.to(self.dtype))
        self.text_XD.index_copy_(0, row_G, text_GD.to(self.dtype))
        self.ids_X.index_copy_(0, row_G, ids_G)
        self.sequence_X.index_copy_(0, row_G, sequence_G)
        self._empty_dump()

    def fill_random(self, seed: int) -> None:
        """Random unit vectors in every slot, equal to nobody: uniform in [0, 1), then L2-normalised.

        Drawn on the CPU for the whole ring, so that every world size and device starts with the same keys.
        """
        generator = torch.Generator().manual_seed(seed)
        device = self.ids_X.device
        for start in range(0, self.size, _RANDOM_BLOCK):
            shape = (2, _RANDOM_BLOCK, self.features)
            keys = F.normalize(torch.rand(shape, generator=generator), dim=-1).to(device)
            # Numbers -size ... -1: older than anything that will come, and each in its own slot.
            sequence = torch.arange(start, start + _RANDOM_BLOCK, device=device) - self.size
            ids = torch.full_like(sequence, RANDOM, dtype=torch.int32)
            self.place(keys[0], keys[1], ids, sequence, sequence < 0)

    def keys(self, modality: Modality, tail: int = 0) -> tuple[Tensor, Tensor]:
        """The storage that a kernel reads, keys and their ids; contiguous.

        Args:
            modality: which keys.
            tail: rows of the tail to count too; 0 leaves out the dump row as well.
        """
        rows = self.slots + 1 + tail if tail else self.slots
        stored_XD = self.image_XD if modality == "image" else self.text_XD
        return stored_XD[:rows], self.ids_X[:rows]

    def set_tail(self, image_TD: Tensor, text_TD: Tensor, ids_T: Tensor) -> None:
        """Writes further keys behind the slots; no part of the queue, gone with the next call."""
        start, stop = self.slots + 1, self.slots + 1 + ids_T.shape[0]
        if stop > self.ids_X.shape[0]:
            self._grow(stop)
        self.image_XD[start:stop] = image_TD
        self.text_XD[start:stop] = text_TD
        self.ids_X[start:stop] = ids_T

    def pieces(self) -> Iterator[Piece]:
        """This rank's slots of the ring, for a checkpoint. PERSONAL DATA."""
        for name, x in self._stored().items():
            if self.shards == 1:
                yield from shared_rows(PART, name, x[: self.slots])
            elif self.slots:
                shape = (self.size, *x.shape[1:])
                yield Piece(PART, name, x[: self.slots], self.size, self.shard, self.shards, shape)
        yield from shared_out(PART, "next", self.next)

    def restore(self, saved: Saved) -> None:
        """Takes up what `pieces` gave, of any number of ranks and a ring of any size: the newest rows that were saved.

        Keys of another dtype are converted: float32 to bfloat16 rounds, bfloat16 to float32 changes no value.
        """
        total = saved.total(PART, "ids")
        self.clear()
        self.next.copy_(read_whole(saved, PART, "next", ()))
        for first in range(0, total, _READ):
            place = (first, min(_READ, total - first))
            rows = {name: saved.rows(PART, name, *place).to(x.device) for name, x in self._stored().items()}
            self.place(rows["image"], rows["text"], rows["ids"], rows["sequence"], rows["ids"] != EMPTY)

    def _stored(self) -> dict[str, Tensor]:
        return {"image": self.image_XD, "text": self.text_XD, "ids": self.ids_X, "sequence": self.sequence_X}

    def digest(self) -> Tensor:
        """Position-weighted sum of the shard's raw words, modulo 2^64; the shards' sum is that of the whole ring.

        Depends on keys, ids, sequence numbers and their slots, bit by bit, and on nothing else. Shape: ().
        """
        total = self.next * (self.shard == 0)
        parts = [_wide_words(x) for x in (self.image_XD, self.text_XD, self.ids_X[:, None], self.sequence_X[:, None])]
        for rows in self._blocks():
            weight_S = mixed(self._slot_numbers(rows) + (1 << 40))
            for place, x in enumerate(parts):
                weight_D = mixed(torch.arange(x.shape[1], device=x.device) + (place << 20))
                total = total + (weight_S * (words(x[rows]) * weight_D).sum(dim=1)).sum()
        return total

    def in_sequence(self) -> Tensor:
        """Whether every filled slot holds the number that follows from `next`. Shape: (), bool."""
        slot_S = self._slot_numbers(slice(0, self.slots))
        newest = self.next - 1
        expected_S = newest - (newest - slot_S).remainder(self.size)
        empty_S = self.ids_X[: self.slots] == EMPTY
        return (empty_S | (self.sequence_X[: self.slots] == expected_S)).all()

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        parts = (self.image_XD, self.text_XD, self.ids_X, self.sequence_X)
        return sum(x.nbytes for x in parts)

    def _blocks(self) -> Iterator[slice]:
        rows = max(1, _DIGEST_WORDS // self.features)
        for start in range(0, self.slots, rows):
            yield slice(start, min(start + rows, self.slots))

    def _slot_numbers(self, rows: slice) -> Tensor:
        """Slots of the whole ring that these rows of storage are."""
        return torch.arange(rows.start, rows.stop, device=self.next.device) * self.shards + self.shard

    def _empty_dump(self) -> None:
        self.image_XD[self.slots].zero_()
        self.text_XD[self.slots].zero_()
        self.ids_X[self.slots].fill_(EMPTY)
        self.sequence_X[self.slots].fill_(_NEVER)

    def _grow(self, rows: int) -> None:
        """Makes room for a longer tail: once, at the first use of the longest one."""
        more = rows - self.ids_X.shape[0]
        self.image_XD = F.pad(self.image_XD, (0, 0, 0, more))
        self.text_XD = F.pad(self.text_XD, (0, 0, 0, more))
        self.ids_X = F.pad(self.ids_X, (0, more), value=EMPTY)


def _wide_words(x_XD: Tensor) -> Tensor:
    """The same bytes in words of 8 where rows can be cut so: a quarter of the arithmetic for bf16."""
    return x_XD.view(torch.int64) if x_XD.shape[1] * x_XD.dtype.itemsize % 8 == 0 else x_XD
