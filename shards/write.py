"""`python -m shards.write NAME --root RAW --out DIR`: a raw data set to shards with index and manifest.

The folder appears whole or not at all, and the same raw files and options give the same bytes.
"""

import argparse
import difflib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from tqdm import tqdm

from reid_dist.data.sample import DATASET_PATTERN, MANIFEST_NAME, MAX_IMAGE_BYTES, Manifest, Sample
from reid_dist.errors import UserError
from shards import cuhk_pedes, img2dataset, market1501
from shards.index import ShardWriter, write_file
from shards.jpeg import clean_image
from shards.raw import Converter, Counts, RawSample, count_parts, sample_key

CONVERTERS: dict[str, Converter] = {
    "cuhk_pedes": cuhk_pedes,
    "market1501": market1501,
    "img2dataset": img2dataset,
}

# Not part of the shard contract: what the folder was made from, so that a second call can tell.
BUILD_NAME = "build.json"
WORLD_NAME = "world.json"


def find_converter(name: str) -> Converter:
    """The converter of a data set.

    Raises:
        UserError: unknown (the nearest name is offered) or refused.
    """
    if name in CONVERTERS:
        return CONVERTERS[name]
    if "duke" in name.lower():
        raise UserError(
            f"{name}: refused. DukeMTMC was filmed without the consent of the people in it and withdrawn in "
            f"2019; neither it nor sets made from it are supported"
        )
    near = difflib.get_close_matches(name.lower().replace("-", "_"), CONVERTERS, n=1, cutoff=0.4)
    offer = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"{name}: no such converter; {offer}There are: {', '.join(CONVERTERS)}")


def write(
    name: str,
    root: Path,
    out: Path,
    dataset: str | None = None,
    shard_bytes: int = 64_000_000,
    seed: int = 0,
    allow_mismatch: bool = False,
) -> Manifest:
    """Write a raw data set as shards, or keep those that are there when they were made from the same.

    Args:
        name: one of CONVERTERS.
        root: the raw tree; only read.
        out: folder to make; may exist when empty.
        dataset: name of the data set in samples and identities; None is `name`.
        shard_bytes: size above which a new tar is begun.
        seed: of the order of samples. They are shuffled here, so that a stream reads them mixed.
        allow_mismatch: go on when the counts are not the published ones.

    Raises:
        UserError: wrong name, tree, counts or image, or `out` holds something else.
    """
    converter = find_converter(name)
    dataset = dataset or name
    if not DATASET_PATTERN.fullmatch(dataset):
        raise UserError(f"--dataset {dataset!r}: at most 64 of [A-Za-z0-9_-]")
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder; it is the unpacked raw data set")
    if out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"--out {out}: lies inside --root {root}, which is only read; name a folder outside")
    build = {"converter": name, "dataset": dataset, "shard_bytes": shard_bytes, "seed": seed}
    build["tree"] = _tree_digest(root)
    existing = _existing(out, build)
    if existing is not None:
        print(f"{out}: up to date ({existing.samples} samples)")
        return existing
    listed = tqdm(converter.samples(root), desc=f"{name}: reading names", unit=" images", disable=None)
    samples = list(listed)
    card = _card(converter, root, samples, allow_mismatch)
    # By path first: the order of a folder's listing must not decide.
    samples.sort(key=lambda sample: sample.source)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(samples))
    with _folder_in_one_piece(out) as folder:
        writer = ShardWriter(folder, dataset, shard_bytes)
        try:
            manifest = _write_samples(writer, [samples[i] for i in order.tolist()], dataset, card)
        finally:
            writer.abort()
        text = json.dumps(build, indent=1) + "\n"
        write_file(folder / BUILD_NAME, lambda file: file.write(text.encode()))
    print(f"{out}: {manifest.samples} samples in {len(manifest.shards)} shards")
    return manifest


def _write_samples(writer: ShardWriter, samples: Sequence[RawSample], dataset: str, card: dict[str, Any]) -> Manifest:
    taken: set[str] = set()
    keys = {sample.source: sample_key(sample.source, taken) for sample in sorted(samples, key=lambda s: s.source)}
    for raw in tqdm(samples, desc=f"{dataset}: writing", unit=" images", disable=None):
        key = keys[raw.source]
        image, width, height = clean_image(_read_image(raw.image), str(raw.image))
        try:
            sample = Sample(
                dataset=dataset,
                pid=f"{dataset}:{key if raw.pid is None else raw.pid}",
                camid=raw.camid,
                split=raw.split,
                role=raw.role,
                captions=list(raw.captions),
                source=raw.source,
                width=width,
                height=height,
                sha256=hashlib.sha256(image).hexdigest(),
            )
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            raise UserError(f"{raw.image}: {problem['loc']}: {problem['msg']}; correct its entry") from None
        writer.add(key, sample, image)
    return writer.finish(card)


def _read_image(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore the file or remove its entry") from None


def _card(converter: Converter, root: Path, samples: Sequence[RawSample], allow_mismatch: bool) -> dict[str, Any]:
    """Print found beside published counts, stop when they differ, and return the manifest's card."""
    found = count_parts(samples, converter)
    if not found:
        raise UserError(f"{root}: no images found; check --root")
    world = _world(root)
    expected = {} if world is not None else converter.EXPECTED
    print(_count_table(found, expected))
    if world is not None:
        print("published counts: do not apply, the tree was exported from the procedural world")
        return {
            "title": f"procedural world in the form of {converter.CARD['title']}",
            "licence": "Apache-2.0, as the program that drew it",
            "consent": "drawn by a program; shows no people",
            "matches_published": None,
            "world": world,
        }
    differing = [part for part in expected if not _matches(found.get(part, Counts(0, 0, 0)), expected[part])]
    if differing and not allow_mismatch:
        raise UserError(
            f"{root}: counts of {', '.join(differing)} are not the published ones (table above); "
            f"complete the data set, or pass --allow-mismatch"
        )
    return {**converter.CARD, "matches_published": not differing if expected else None}


def _matches(found: Counts, expected: Counts) -> bool:
    pairs = zip(astuple(found), astuple(expected), strict=True)
    return all(published is None or here == published for here, published in pairs)


def _count_table(found: dict[str, Counts], expected: dict[str, Counts]) -> str:
    lines = [f"{'':10}{'identities':>22}{'images':>22}{'captions':>22}   (found / published)"]
    for part in dict.fromkeys([*expected, *found]):
        here, published = found.get(part, Counts(0, 0, 0)), expected.get(part, Counts())
        cells = zip(astuple(here), astuple(published), strict=True)
        text = "".join(f"{f'{a:,} / ' + ('-' if b is None else f'{b:,}'):>22}" for a, b in cells)
        lines.append(f"{part:10}{text}")
    return "\n".join(lines)


def _world(root: Path) -> dict[str, Any] | None:
    """The parameters of a procedural tree; None for a tree that is not one."""
    path = root / WORLD_NAME
    if not path.is_file():
        return None
    try:
        world = json.loads(path.read_bytes())
        return {"version": world["version"], "parameters": world["parameters"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a file of the procedural world; export the tree again") from None


def _tree_digest(root: Path) -> str:
    """A hash over names, sizes and times of all files of the raw tree and over its own place."""
    digest = hashlib.sha256(str(root.resolve()).encode())
    for folder, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            path = os.path.join(folder, file)
            state = os.lstat(path)
            line = f"{os.path.relpath(path, root)}\0{state.st_size}\0{state.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _existing(out: Path, build: dict[str, Any]) -> Manifest | None:
    """The manifest of a folder that was made from the same; None when there is nothing yet.

    Raises:
        UserError: the folder holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    remedy = "remove it or choose another --out"
    try:
        manifest = Manifest.model_validate_json((out / MANIFEST_NAME).read_bytes())
        old = json.loads((out / BUILD_NAME).read_bytes())
        whole = all((out / shard.name).stat().st_size == shard.bytes for shard in manifest.shards)
    except (OSError, ValidationError, ValueError):
        raise UserError(f"{out}: exists, but is not a complete shard set of this program; {remedy}") from None
    if not whole:
        raise UserError(f"{out}: a shard has another size than its manifest says; {remedy}")
    differing = [key for key in build if old.get(key) != build[key]]
    if differing:
        what = ", ".join("raw files" if key == "tree" else key for key in differing)
        raise UserError(f"{out}: holds shards made otherwise (differs: {what}); {remedy}")
    return manifest


@contextmanager
def _folder_in_one_piece(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when all went well and vanishes otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        folder.chmod(0o755)
        yield folder
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m shards.write", description="A raw data set to shards.")
    parser.add_argument("name", help=f"converter: {', '.join(CONVERTERS)}")
    parser.add_argument("--root", required=True, type=Path, help="folder of the raw data set; only read")
    parser.add_argument("--out", required=True, type=Path, help="shard folder to make")
    parser.add_argument("--dataset", help="name in samples and identities (default: the converter's)")
    parser.add_argument("--shard-mb", type=float, default=64, help="size of a shard in megabytes")
    parser.add_argument("--seed", type=int, default=0, help="of the order of samples")
    parser.add_argument("--allow-mismatch", action="store_true", help="accept other counts than the published")
    options = parser.parse_args(arguments)
    try:
        if options.shard_mb <= 0 or options.seed < 0:
            raise UserError("--shard-mb must be above 0 and --seed not below 0")
        write(
            options.name,
            options.root,
            options.out,
            dataset=options.dataset,
            shard_bytes=int(options.shard_mb * 1_000_000),
            seed=options.seed,
            allow_mismatch=options.allow_mismatch,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, missing rights
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
