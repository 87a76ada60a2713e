"""The command line of checkpoints."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from reid_dist.checkpoint.manifest import MANIFEST_FILE, Manifest, TensorRecord
from reid_dist.checkpoint.portable import save_export
from reid_dist.checkpoint.private import BUFFER, private_sha256
from reid_dist.checkpoint.reader import Checkpoint, open_checkpoint, read_manifest
from reid_dist.checkpoint.resume import latest_checkpoint
from reid_dist.checkpoint.retention import saved_steps
from reid_dist.checkpoint.tensor_file import DTYPES
from reid_dist.config import ModelConfig
from reid_dist.errors import UserError
from reid_dist.models.weights import EXPORT_FILE


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for wrong input or damage, 1 for a full disk and the like."""
    options = _parser().parse_args(argv)
    try:
        if options.command == "inspect":
            inspect(options.path)
        elif options.command == "verify":
            return verify(options.path)
        else:
            export(options.path, options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def inspect(path: Path) -> None:
    """Prints what a checkpoint says of itself, or one line for each of a run's; only manifests are read.

    Raises:
        UserError: there is none, or a manifest is damaged.
    """
    found = find_checkpoints(path)
    if found == [path]:
        print("\n".join(_details(read_manifest(path)[0])))
        return
    for folder in found:
        manifest = read_manifest(folder)[0]
        loss = "no loss" if manifest.loss is None else f"loss {manifest.loss:.4f}"
        latest = ", latest" if folder == latest_checkpoint(folder.parent) else ""
        print(
            f"{folder}: {manifest.stage} after step {manifest.step} of {manifest.steps}, {loss},"
            f" {_megabytes(manifest)} of {manifest.world_size} ranks{latest}"
        )


def verify(path: Path) -> int:
    """Compares every file with its hash, and every part with its digest; a line for each checkpoint.

    Returns:
        Exit code: 2 if one is damaged.

    Raises:
        UserError: there is none.
    """
    code = 0
    found = find_checkpoints(path)
    for folder in found:
        try:
            manifest = _verified(folder)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        else:
            print(f"{folder}: good, {_megabytes(manifest)} in {len(manifest.files)} files")
    if found != [path]:
        for parent in sorted({folder.parent for folder in found}):
            latest_checkpoint(parent)  # refuses what names none
    return code


def _verified(folder: Path) -> Manifest:
    checkpoint = open_checkpoint(folder)
    manifest = checkpoint.manifest
    if checkpoint.digests() != manifest.digests:
        raise UserError(f"{folder}: its tensors do not have the digests of its manifest")
    for rank, expected in enumerate(manifest.private):
        own = checkpoint.private(rank)
        if own is None or private_sha256(own) != expected:
            raise UserError(f"{folder}: what rank {rank} had of its own does not have the hash of its manifest")
    return manifest


def export(path: Path, out: Path) -> None:
    """Writes the encoder as it was at a checkpoint, for `reid_dist.load` and `launch/export.py`.

    Args:
        path: of a checkpoint, or of a run or stage: its latest.
        out: a new folder.

    Raises:
        UserError: no checkpoint, a damaged one, several stages, or a folder that is there already.
    """
    if out.exists():
        raise UserError(f"--out {out}: is there already; name a new folder")
    found = find_checkpoints(path)
    folders = sorted({folder.parent for folder in found})
    if found != [path] and len(folders) > 1:
        raise UserError(f"{path}: several stages have checkpoints; name one of {', '.join(map(str, folders))}")
    checkpoint = open_checkpoint(path if found == [path] else latest_checkpoint(folders[0]) or found[-1])
    manifest = checkpoint.manifest
    try:
        model = ModelConfig.model_validate(manifest.model)
    except ValidationError as error:
        raise UserError(f"{checkpoint.folder}: model: {error.errors()[0]['msg']}; of another version") from error
    record = {
        "stage": manifest.stage,
        "kind": manifest.kind,
        "steps": manifest.step,
        # No finished stage has such a one: nobody takes the export for its result.
        "fingerprint": f"{manifest.fingerprint} after step {manifest.step} of {manifest.steps}",
        "trainable": manifest.trainable,
        "frozen": manifest.frozen,
    }
    save_export(out, _encoder(checkpoint), model, manifest.words, record)
    print(f"{checkpoint.folder} -> {out}: {manifest.stage} after step {manifest.step} of {manifest.steps}")


def _encoder(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Weights, frozen or not, and rank 0's buffers: what the export of a finished stage holds."""
    state = {name: checkpoint.whole(part, name) for part in ("weights", "frozen") for name in checkpoint.names(part)}
    own = checkpoint.private(0)
    assert own is not None  # some rank has saved
    buffers = {name.removeprefix(BUFFER): x for name, x in own.tensors.items() if name.startswith(BUFFER)}
    return {**state, **buffers}


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoints in the folder of a run, of a stage, or of its checkpoints, in order; or the folder itself.

    Raises:
        UserError: there is none.
    """
    if (path / EXPORT_FILE).is_file():
        raise UserError(f"{path}: an export, no checkpoint; launch/export.py takes it")
    if (path / MANIFEST_FILE).is_file():
        return [path]
    folders = [path, path / "checkpoints", *(sorted(path.glob("*/checkpoints")) if path.is_dir() else [])]
    found = [checkpoint for folder in folders for checkpoint in saved_steps(folder).values()]
    if not found:
        raise UserError(f"{path}: no checkpoint there; name the folder of a run, of a stage, or of a step")
    return found


def _details(manifest: Manifest) -> list[str]:
    lines = [
        f"stage        {manifest.stage} ({manifest.kind}), after step {manifest.step} of {manifest.steps}",
        f"samples      {manifest.samples:,}",
        f"loss         {'none' if manifest.loss is None else f'{manifest.loss:.6f}'}",
        f"fingerprint  {manifest.fingerprint}",
        f"saved by     {manifest.world_size} ranks, commit {manifest.commit or 'unknown'}",
        f"versions     {', '.join(f'{name} {found}' for name, found in manifest.versions.items() if found)}",
        f"parameters   {len(manifest.trainable)} train, {len(manifest.frozen)} do not",
    ]
    for group in manifest.groups:
        lines.append(f"group        {len(group.names)} of lr {group.lr:g}, weight decay {group.weight_decay:g}")
    lines.append(f"files        {len(manifest.files)}, {_megabytes(manifest)}")
    for part, table in manifest.tensors.items():
        size = sum(_bytes(record) for record in table.values())
        lines.append(f"part         {part}: {len(table)} tensors, {size / 1e6:,.1f} MB, {manifest.digests[part]}")
    return lines


def _bytes(record: TensorRecord) -> int:
    itemsize = next(dtype.itemsize for dtype, name in DTYPES.items() if name == record.dtype)
    return record.total * math.prod(record.row) * itemsize


def _megabytes(manifest: Manifest) -> str:
    return f"{sum(file.size for file in manifest.files.values()) / 1e6:,.1f} MB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reid_dist.checkpoint", description="Looks into checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (
        ("inspect", "say what a checkpoint holds, or which a run has"),
        ("verify", "compare every file with its hash"),
        ("export", "write the encoder as it was then, for reid_dist.load"),
    ):
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="folder of a run, a stage or a step")
        if name == "export":
            command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder to write")
    return parser
