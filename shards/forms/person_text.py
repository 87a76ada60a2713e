"""What the text-person sets share: one JSON list with an entry for each image."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from reid_dist.errors import UserError
from shards.forms.annotation import Text, sentences
from shards.raw import RawSample, image_file, inside


class Entry(BaseModel):
    """One image of the annotation; other keys, such as `processed_tokens`, are left alone."""

    model_config = ConfigDict(extra="ignore", strict=True)

    split: Literal["train", "val", "test"]
    captions: list[Text] = Field(min_length=1)
    file_path: Text
    id: int = Field(ge=0)


def samples_of(
    path: Path,
    entries: Iterable[tuple[str, Entry]],
    folder: str,
    camera: Callable[[str], int] | None = None,
) -> Iterator[RawSample]:
    """The images of an annotation, in its order.

    Val and test images have the role "gallery"; each of their captions is a query of text-to-image retrieval.

    Args:
        path: the annotation, in the root of the raw tree.
        entries: what it holds, each with its place for messages.
        folder: folder beside the annotation that `file_path` is relative to; empty: the root itself.
        camera: the camera that a file name tells, from 0; None: cameras are not known.

    Raises:
        UserError: a file lies outside the tree or does not exist, or an identity is in two splits.
    """
    splits: dict[int, str] = {}
    for origin, entry in entries:
        if splits.setdefault(entry.id, entry.split) != entry.split:
            raise UserError(
                f"{origin}: identity {entry.id} is in the splits {splits[entry.id]} and {entry.split}; "
                f"get {path.name} again, a test set must not be trained on"
            )
        image = image_file(inside(path.parent / folder, entry.file_path, origin), origin)
        yield RawSample(
            image=image,
            pid=str(entry.id),
            camid=-1 if camera is None else camera(image.path.name),
            split=entry.split,
            role="train" if entry.split == "train" else "gallery",
            captions=sentences(entry.captions),
            source=f"{folder}/{entry.file_path}" if folder else entry.file_path,
        )
