"""What `csv` and `jsonl` share: one's own images, described by rows with a path and whatever else is known."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, Field

from reid_dist.data.sample import Role, Split
from reid_dist.errors import UserError
from shards.forms.annotation import Text, sentences
from shards.raw import RawSample, image_file, inside


class Row(BaseModel):
    """What a row may tell; only the path must be there.

    Attributes:
        path: of the image, relative to the root, with slashes.
        pid: identity; without it the image is its own.
        camid: camera, from 0; -1 is unknown.
        split: train, val or test.
        role: query, gallery, distractor or junk in val and test; without it gallery.
        caption: a sentence.
        captions: more of them.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    path: Text = Field(min_length=1)
    pid: Text | int | None = None
    camid: int = Field(default=-1, ge=-1, lt=2**31)
    split: Split = "train"
    role: Role | None = None
    caption: Text | None = None
    captions: list[Text] = []


@dataclass
class _Image:
    """The rows of one path."""

    origin: str
    facts: tuple[str | None, int, Split, Role]
    captions: list[str] = field(default_factory=list)


def tables_in(root: Path, suffix: str) -> list[Path]:
    """The files directly in a folder that end in `suffix`, by name.

    Raises:
        UserError: there are none.
    """
    found = sorted(root.glob(f"[!.]*{suffix}"))
    if not found:
        raise UserError(f"{root}: holds no *{suffix}; --root is the folder of the table, paths are relative to it")
    return found


def table_samples(root: Path, rows: Iterable[tuple[str, Row]]) -> Iterator[RawSample]:
    """The images in the order of their first rows; later rows of the same path add captions.

    Args:
        root: what paths are relative to.
        rows: each with its place, for messages.

    Raises:
        UserError: a path outside the root or a missing file, a role that does not belong to its split, rows of
            one path that differ in more than captions, or a person of the test set in another one.
    """
    images: dict[str, _Image] = {}
    people: dict[str, tuple[str, Split]] = {}
    for origin, row in rows:
        path = PurePosixPath(row.path).as_posix()
        facts = (None if row.pid is None else str(row.pid), row.camid, row.split, _role(row, origin))
        image = images.setdefault(path, _Image(origin, facts))
        if image.facts != facts:
            raise UserError(
                f"{origin}: {row.path[:200]!r} has another pid, camid, split or role than in {image.origin}; "
                f"correct one"
            )
        _check_split(people, row, origin)
        image.captions += sentences([*([] if row.caption is None else [row.caption]), *row.captions])
    for path, image in images.items():
        pid, camid, split, role = image.facts
        yield RawSample(
            image=image_file(inside(root, path, image.origin), image.origin),
            pid=pid,
            camid=camid,
            split=split,
            role=role,
            captions=tuple(image.captions),
            source=path,
        )


def _check_split(people: dict[str, tuple[str, Split]], row: Row, origin: str) -> None:
    """A person of the test set may be in no other; train and val may share people, as in MSMT17."""
    if row.pid is None:
        return
    earlier, split = people.setdefault(str(row.pid), (origin, row.split))
    if split != row.split and "test" in (split, row.split):
        raise UserError(
            f"{origin}: pid {str(row.pid)[:100]!r} is in {row.split} and, in {earlier}, in {split}; "
            f"give the persons different names or one split"
        )


def _role(row: Row, origin: str) -> Role:
    role = row.role or ("train" if row.split == "train" else "gallery")
    if (role == "train") != (row.split == "train"):
        raise UserError(f"{origin}: the role {role} does not go with the split {row.split}; correct one of them")
    return role
