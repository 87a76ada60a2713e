"""A feature queue on disk: a folder of safetensors, one file for each shard, and a JSON manifest.

The rows carry their sequence numbers, so nothing depends on how the ranks were laid out: any world size reads the
files, replicated or sharded, into a queue of any size. What they hold is PERSONAL DATA (features of photographs of
people and their identities); exports of a model never include it.

Shape suffixes: S rows of one file, D feature size.
"""

from pathlib import Path

from safetensors import safe_open

from reid_dist.errors import UserError
from reid_dist.kernels.contrastive import EMPTY
from reid_dist.models.queue_ring import Ring
from reid_dist.models.shard_folder import FolderRecord, Kind, ShardRecord, open_shards, save_shards

_KIND = Kind("feature queue", "queue.json", "start with an empty queue")
_BLOCK = 1 << 16
_NOTE = "Features and identities of people in training images: personal data."


class QueueRecord(FolderRecord):
    """The manifest: what a saved queue says about itself."""

    step: int
    size: int
    features: int
    dtype: str
    next_sequence: int


def save_ring(ring: Ring, folder: Path, step: int) -> None:
    """Writes the ring, see `save_shards`; every rank calls it.

    Args:
        ring: of this rank; of a replicated queue rank 0 writes, of a sharded one every rank its part.
        folder: replaced when it exists.
        step: for the record.

    Raises:
        UserError: on every rank when one of them cannot write.
    """

    def describe(shards: list[ShardRecord]) -> QueueRecord:
        return QueueRecord(
            format_version=_KIND.version,
            note=_NOTE,
            step=step,
            size=ring.size,
            features=ring.features,
            dtype=str(ring.dtype).removeprefix("torch."),
            next_sequence=int(ring.next),
            shards=shards,
        )

    rows = {"image": ring.image_XD, "text": ring.text_XD, "ids": ring.ids_X, "sequence": ring.sequence_X}
    slots = {name: x[: ring.slots] for name, x in rows.items()}
    save_shards(_KIND, folder, (ring.shard, ring.shards), slots, _NOTE, describe)


def load_ring(ring: Ring, folder: Path) -> QueueRecord:
    """Replaces the content of the ring by the newest rows that were saved; every rank calls it.

    All files are verified before the first row is taken; the ranks share that work.

    Raises:
        UserError: on every rank, the ring unchanged.
    """

    def check(path: Path, record: QueueRecord) -> None:
        if record.features != ring.features:
            raise UserError(
                f"{path}: keys of {record.features} features, but the model's have {ring.features}; set model to the"
                f" one that was trained, or {_KIND.remedy(folder)}"
            )

    found, record = open_shards(_KIND, folder, QueueRecord, check)
    ring.clear()
    ring.next.fill_(record.next_sequence)
    for shard in record.shards:
        _place(ring, found / shard.file)
    return record


def _place(ring: Ring, path: Path) -> None:
    """Writes the rows of one file that belong into this rank's shard of the ring."""
    with safe_open(path, framework="pt", device=str(ring.next.device)) as file:
        parts = [file.get_slice(name) for name in ("image", "text", "ids", "sequence")]
        for start in range(0, parts[0].get_shape()[0], _BLOCK):
            image_SD, text_SD, ids_S, sequence_S = (part[start : start + _BLOCK] for part in parts)
            ring.place(image_SD, text_SD, ids_S, sequence_S, ids_S != EMPTY)
