"""The state of a shard folder between the first call and the manifest: what it is made from and what is there.

`build.json` comes first and names the options and the raw tree; a second call with the same continues, another one
is refused. `manifest.json` comes last.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from reid_dist.data.sample import MANIFEST_NAME, Manifest
from reid_dist.errors import UserError
from shards.writing.files import is_temporary, remove_leftovers, write_file
from shards.writing.jpeg import ENCODED_QUALITY
from shards.writing.merge import write_index
from shards.writing.tar_shard import PARTIAL_NAME, ShardPart, read_part

BUILD_NAME = "build.json"

# To be raised when the same raw files and options come to give other bytes.
WRITER_VERSION = 2

_WORDS = {"tree": "raw files", "writer": "version of this program", "exclude": "exclusion list"}
_SHOWN = 8


class Build(BaseModel):
    """What a folder is made from; the parts of one set agree on it.

    Attributes:
        made_from: options and digests that decide the bytes of the shards.
        samples: planned.
        names: of the shards, in order.
        excluded: samples left out because of their identity.
        card: of the manifest, but for what only the finished shards tell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    made_from: dict[str, str | int]
    samples: int
    names: list[str]
    excluded: int
    card: dict[str, Any]


def find_build(folder: Path, made_from: dict[str, str | int]) -> Build | None:
    """What a folder holds, when it was made from the same; None when there is nothing yet.

    Raises:
        UserError: it holds something else.
    """
    remedy = "remove it or choose another --out"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; {remedy}")
    if not (folder / BUILD_NAME).exists() and folder.is_dir():
        remove_leftovers(folder)
        foreign = any(map(_is_foreign, folder.iterdir()))
        # Unless another part has begun in the meantime.
        if foreign and not (folder / BUILD_NAME).exists():
            raise UserError(f"{folder}: exists, but holds no shard set of this program; {remedy}")
    if not (folder / BUILD_NAME).exists():
        return None
    build = _read(folder)
    differing = [key for key in made_from if build.made_from.get(key) != made_from[key]]
    if differing:
        what = ", ".join(_WORDS.get(key, key) for key in differing)
        raise UserError(f"{folder}: holds shards made otherwise (differs: {what}); {remedy}")
    return build


def _is_foreign(path: Path) -> bool:
    """Not of a call that has not come to `build.json` yet."""
    if path.name == PARTIAL_NAME and path.is_dir():
        return any(path.iterdir())
    return not is_temporary(path)


def start_build(folder: Path, build: Build) -> None:
    """Write `build.json`; parts that start at the same time write the same."""
    (folder / PARTIAL_NAME).mkdir(parents=True, exist_ok=True)
    text = build.model_dump_json(indent=1) + "\n"
    write_file(folder / BUILD_NAME, lambda file: file.write(text.encode()))


def finished(folder: Path) -> Manifest | None:
    """The manifest of a folder that is complete; None when it is not there yet.

    Raises:
        UserError: the manifest is damaged, or a shard is not as it says.
    """
    path = folder / MANIFEST_NAME
    remedy = f"remove {folder} and write it again"
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise UserError(f"{path}: not a valid manifest; {remedy}") from None
    for shard in manifest.shards:
        tar = folder / shard.name
        if not tar.is_file() or tar.stat().st_size != shard.bytes:
            raise UserError(f"{tar}: is missing or has another size than {MANIFEST_NAME} says; {remedy}")
    return manifest


def done_parts(folder: Path, names: list[str]) -> Iterator[ShardPart]:
    """The parts of those shards that are there."""
    for name in names:
        part = read_part(folder, name)
        if part is not None:
            yield part


def merge(folder: Path) -> Manifest:
    """Make a set of the finished shards; the same again when that was done.

    Several processes may do this at once: they write the same.

    Raises:
        UserError: not a folder of `python -m shards.write`, or shards are missing.
    """
    if not (folder / BUILD_NAME).is_file():
        raise UserError(f"{folder}: no {BUILD_NAME}; it is the --out of `python -m shards.write NAME --part i/n`")
    build = _read(folder)
    manifest = finished(folder)
    if manifest is None:
        missing = set(build.names) - {part.file.name for part in done_parts(folder, build.names)}
        # Another process may have merged and removed the parts meanwhile.
        manifest = finished(folder)
        if missing and manifest is None:
            raise UserError(f"{folder}: {describe_missing(folder, build, missing)}")
        manifest = manifest or _merge(folder, build)
    shutil.rmtree(folder / PARTIAL_NAME, ignore_errors=True)
    remove_leftovers(folder)
    return manifest


def describe_missing(folder: Path, build: Build, missing: set[str]) -> str:
    """Which shards are missing, and the command that writes them."""
    listed = sorted(missing)
    more = ", …" if len(listed) > _SHOWN else ""
    return (
        f"{len(listed)} of {len(build.names)} shards are missing ({', '.join(listed[:_SHOWN])}{more}); "
        f"write them with `{_command(folder, build)}` or what is left of its parts"
    )


def _command(folder: Path, build: Build) -> str:
    made = build.made_from
    options = {
        "--dataset": made["dataset"],
        "--variant": made["variant"],
        "--shard-mb": int(made["shard_bytes"]) / 1_000_000,
        "--seed": made["seed"],
        "--order": made["order"],
        **({"--exclude": "FILE"} if made["exclude"] else {}),
    }
    text = " ".join(f"{name} {value}" for name, value in options.items())
    return f"python -m shards.write {made['converter']} --root RAW --out {folder} {text}"


def _merge(folder: Path, build: Build) -> Manifest:
    try:
        card = {**build.card, **_totals(folder, build)}
        return write_index(folder, str(build.made_from["dataset"]), _all_parts(folder, build), card)
    except FileNotFoundError:
        # Another process was faster and has removed the parts.
        manifest = finished(folder)
        if manifest is None:
            raise
        return manifest


def _totals(folder: Path, build: Build) -> dict[str, Any]:
    """What the card tells of all shards."""
    images = encoded = 0
    excluded = build.excluded
    skipped: list[str] = []
    for part in _all_parts(folder, build):
        images += part.file.samples
        encoded += part.encoded
        excluded += part.excluded
        skipped += part.skipped
    return {
        "images": {"copied": images - encoded, "encoded": encoded, "quality": ENCODED_QUALITY},
        "excluded": excluded,
        "skipped": skipped,
    }


def _all_parts(folder: Path, build: Build) -> Iterator[ShardPart]:
    for name in build.names:
        part = read_part(folder, name)
        if part is None:
            raise FileNotFoundError(f"{folder / name}: vanished during the merge")
        yield part


def _read(folder: Path) -> Build:
    path = folder / BUILD_NAME
    try:
        return Build.model_validate_json(path.read_bytes())
    except ValidationError:
        raise UserError(
            f"{path}: not of this version of the program; remove {folder} and write it again, or choose another --out"
        ) from None


def tree_digest(root: Path) -> str:
    """A hash over the relative names, sizes and times of all files of a raw tree."""
    digest = hashlib.sha256()
    with tqdm(desc=f"{root}: listing", unit=" files", disable=None, leave=False) as bar:
        for folder, folders, files in os.walk(root):
            folders.sort()
            for file in sorted(files):
                path = os.path.join(folder, file)
                state = os.lstat(path)
                line = f"{os.path.relpath(path, root)}\0{state.st_size}\0{state.st_mtime_ns}\n"
                digest.update(line.encode(errors="surrogateescape"))
                bar.update()
    return digest.hexdigest()
