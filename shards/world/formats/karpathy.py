"""The annotation form of Karpathy's splits, which COCO and Flickr30k share."""

from collections.abc import Sequence
from pathlib import Path

from shards.world.formats.base import Record, put_json
from shards.world.vocabulary import words_of


def put_karpathy(root: Path, path: str, dataset: str, images: Sequence[Record]) -> None:
    """Write an annotation.

    Args:
        root: The tree.
        path: The file inside it.
        dataset: Name of the data set.
        images: Each with `filename`, `split`, `captions` and other fields that are copied.
    """
    entries = []
    sentid = 0
    for imgid, image in enumerate(images):
        sentences = []
        for caption in image["captions"]:
            sentences.append({"tokens": words_of(caption), "raw": caption, "imgid": imgid, "sentid": sentid})
            sentid += 1
        copied = {name: value for name, value in image.items() if name != "captions"}
        sentids = [sentence["sentid"] for sentence in sentences]
        entries.append({**copied, "imgid": imgid, "sentids": sentids, "sentences": sentences})
    put_json(root, path, {"images": entries, "dataset": dataset})
