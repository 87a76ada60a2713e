"""The training rows of one or several shard sets as one numbered list of items: images, or pairs of image and caption.

Legend: N items, S sets.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from reid_dist.data.exclude import NOTHING, Exclusions
from reid_dist.data.reader import ShardSet
from reid_dist.data.units import IntArray, places_in_runs
from reid_dist.errors import UserError

Items = Literal["images", "captions"]


class TrainingItems:
    """What there is to train on.

    Identities are numbered by their sorted pid strings over all sets, cameras of different sets are kept apart.

    Attributes:
        shards: the sets.
        excluded: number of images left out because of `exclude`.
        identities: pid strings; `pid_N` points into them.
        counts: number of items of each set; they stand one set after the other.
        captioned_S: whether all training images of each set have captions. Shape: (S,).
        set_N: which of the sets each item is from. Shape: (N,).
        row_N: its row there. Shape: (N,).
        caption_N: which caption of the row it has; -1: any, or none. Shape: (N,).
        pid_N: its identity. Shape: (N,).
        camid_N: its camera, -1 where unknown. Shape: (N,).

    Args:
        shards: sets, in an order that belongs to the run.
        items: "images", or "captions": an image is as many items as it has captions, and one where it has none.
        exclude: identities and images that are left out; those of other sets do no harm.

    Raises:
        UserError: no training rows, or two sets that share pid strings.
    """

    def __init__(self, shards: Sequence[ShardSet], items: Items = "images", exclude: Exclusions = NOTHING) -> None:
        self.shards = list(shards)
        images = self._training_rows(exclude)
        captions = [each.index["captions"][row].astype(np.int64) for each, row in zip(self.shards, images, strict=True)]
        self.captioned_S: npt.NDArray[np.bool_] = np.array([bool((count > 0).all()) for count in captions])
        rows, numbers = images, [np.full(len(row), -1) for row in images]
        if items == "captions":
            rows = [np.repeat(row, np.maximum(count, 1)) for row, count in zip(images, captions, strict=True)]
            each = [np.repeat(count, np.maximum(count, 1)) for count in captions]
            numbers = [np.where(n > 0, places_in_runs(row), -1) for row, n in zip(rows, each, strict=True)]
        self.caption_N: IntArray = np.concatenate(numbers)
        self._number(rows)

    def __len__(self) -> int:
        return len(self.row_N)

    def describe(self, item: int) -> str:
        """Names an item, for messages."""
        return self.shards[int(self.set_N[item])].describe(int(self.row_N[item]))

    def require_captions(self, whole_sets_without: bool = False) -> None:
        """Checks that there is a caption for every image.

        Args:
            whole_sets_without: sets without any captions are no harm, as long as there is one with them.

        Raises:
            UserError: images without captions.
        """
        for each, row in zip(self.shards, self._rows_of_sets(), strict=True):
            missing = row[each.index["captions"][row] == 0]
            if not len(missing) or (whole_sets_without and len(missing) == len(row)):
                continue
            remedy = "this stage needs captions: leave the set out"
            if whole_sets_without:
                remedy = "a set has captions for all of them or for none: leave the set out or complete it"
            raise UserError(
                f"{each.shown}: {len(missing)} of {len(row)} training samples have no caption, the "
                f"first is {each.key(int(missing[0]))}; {remedy}"
            )
        if not any(captioned and count for captioned, count in zip(self.captioned_S, self.counts, strict=True)):
            names = ", ".join(each.shown for each in self.shards)
            raise UserError(f"data: {names}: no captions, but this stage's loss has text_weight; add a captioned set")

    def _rows_of_sets(self) -> list[IntArray]:
        """The images of each set."""
        return [np.unique(self.row_N[self.set_N == number]) for number in range(len(self.shards))]

    def _training_rows(self, exclude: Exclusions) -> list[IntArray]:
        """The rows of each set that are trained on."""
        rows = [each.rows("train", ["train"]) for each in self.shards]
        names = ", ".join(each.shown for each in self.shards) or "no shard set"
        if not sum(map(len, rows)):
            raise UserError(f"data: {names}: no training samples (split train, role train)")
        kept = [exclude.keeps(each, row) for each, row in zip(self.shards, rows, strict=True)]
        self.excluded = sum(map(len, rows)) - sum(map(len, kept))
        if not sum(map(len, kept)):
            raise UserError(
                f"data: {names}: all {self.excluded} training samples are excluded; "
                f"shorten the list of exclusions or train on another set"
            )
        return kept

    def _number(self, rows: list[IntArray]) -> None:
        """Concatenate the training rows and number identities and cameras."""
        used = [np.unique(each.index["pid"][row]) for each, row in zip(self.shards, rows, strict=True)]
        pids = [each.identities[pid] for each, own in zip(self.shards, used, strict=True) for pid in own.tolist()]
        order = sorted(range(len(pids)), key=pids.__getitem__)
        self.identities = [pids[place] for place in order]
        self._refuse_shared_identities()
        numbers = np.empty(len(pids), dtype=np.int64)
        numbers[order] = np.arange(len(pids))
        pid_N, camid_N, pid_base, camera_base = [], [], 0, 0
        for each, own, row in zip(self.shards, used, rows, strict=True):
            pid_N.append(numbers[pid_base + np.searchsorted(own, each.index["pid"][row])])
            camid = each.index["camid"][row].astype(np.int64)
            camid_N.append(np.where(camid < 0, -1, camid + camera_base))
            pid_base += len(own)
            camera_base += int(camid.max(initial=-1)) + 1
        self.counts = [len(row) for row in rows]
        self.row_N: IntArray = np.concatenate(rows)
        self.set_N: IntArray = np.repeat(np.arange(len(rows)), self.counts)
        self.pid_N: IntArray = np.concatenate(pid_N)
        self.camid_N: IntArray = np.concatenate(camid_N)

    def _refuse_shared_identities(self) -> None:
        """Classes of one name would be two persons, or one person twice: which of both, only the user knows."""
        twice = [one for one, other in itertools.pairwise(self.identities) if one == other]
        if twice:
            names = ", ".join(each.shown for each in self.shards)
            raise UserError(
                f"data: {names}: two of the sets hold the same identities, {len(twice)} of them, the first is "
                f"{twice[0]}; leave one set out, or where other people were given these names write it again with "
                f"`--dataset ANOTHER_NAME`"
            )
