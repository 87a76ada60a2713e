"""Sharded class centres on disk, with their optimizer's moments: any number of ranks reads what any number wrote.

Shards are ranges of classes in order. They hold PERSONAL DATA (mean directions of people's features); exports of a
model never include them.
"""

from pathlib import Path

from safetensors import safe_open

from reid_dist.errors import UserError
from reid_dist.models.shard_folder import FolderRecord, Kind, ShardRecord, open_shards, save_shards
from reid_dist.models.sharded_classifier import ShardedClassifier

_KIND = Kind("sharded classifier", "classifier.json", "start with new class centres")
_NOTE = "Mean directions of the features of people in training images: personal data."


class ClassifierRecord(FolderRecord):
    """The manifest: what a saved classifier says about itself."""

    classes: int
    features: int
    moments: int
    steps: int


def save_classifier(classifier: ShardedClassifier, folder: Path) -> None:
    """Writes centres, moments and counts between two steps, see `save_shards`; every rank calls it.

    Args:
        classifier: of this rank.
        folder: replaced when it exists. PERSONAL DATA.

    Raises:
        UserError: on every rank when one of them cannot write.
    """

    def describe(shards: list[ShardRecord]) -> ClassifierRecord:
        return ClassifierRecord(
            format_version=_KIND.version,
            note=_NOTE,
            classes=classifier.classes,
            features=classifier.features,
            moments=len(classifier.moments),
            steps=classifier.steps,
            shards=shards,
        )

    save_shards(_KIND, folder, classifier.shard, classifier.rows(), _NOTE, describe)


def load_classifier(classifier: ShardedClassifier, folder: Path) -> ClassifierRecord:
    """Replaces centres, moments and counts by those that were saved; every rank calls it.

    All files are verified before the first row is taken; the ranks share that work.

    Raises:
        UserError: on every rank, the classifier unchanged.
    """

    def check(path: Path, record: ClassifierRecord) -> None:
        found = (record.classes, record.features, record.moments)
        wanted = (classifier.classes, classifier.features, len(classifier.moments))
        if found != wanted:
            raise UserError(
                f"{path}: {found[0]} identities of {found[1]} features with {found[2]} moments, but data, model and"
                f" optimizer.name of this run give {wanted[0]} of {wanted[1]} with {wanted[2]}; set them to those that"
                f" were trained, or {_KIND.remedy(folder)}"
            )

    found, record = open_shards(_KIND, folder, ClassifierRecord, check)
    classifier.discard()
    classifier.steps = record.steps
    first = 0
    for shard in record.shards:
        _place(classifier, found / shard.file, first, shard.rows)
        first += shard.rows
    return record


def _place(classifier: ShardedClassifier, path: Path, first: int, rows: int) -> None:
    """Takes the rows of one file, of classes from `first` on, that are of this rank."""
    low, high = max(first, classifier.first), min(first + rows, classifier.stop)
    if low >= high:
        return
    with safe_open(path, framework="pt", device=str(classifier.weight_SD.device)) as file:
        for name, x in classifier.rows().items():
            x[low - classifier.first : high - classifier.first] = file.get_slice(name)[low - first : high - first]
