"""The command line of exports."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reid_dist.errors import UserError
from reid_dist.export.card import CARD_FILE, earlier_card, model_card
from reid_dist.export.folder import new_folder
from reid_dist.export.onnx_files import write_onnx
from reid_dist.export.open_clip_folder import write_open_clip
from reid_dist.export.provenance import find_provenance
from reid_dist.export.tensors import write_safetensors, write_torch
from reid_dist.trained import TrainedModel, load

FORMATS = ("open_clip", "safetensors", "onnx", "torch")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for wrong input, 1 for a full disk and the like."""
    arguments = export_parser().parse_args(argv)
    try:
        export(arguments.run, arguments.format, arguments.out, arguments.opset)
    except UserError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 1
    return 0


def export(run: Path, form: str, out: Path, opset: int | None = None) -> None:
    """Writes a trained model into a folder of its own, with a model card; the folder appears only when all is checked.

    Args:
        run: folder of a run (its last finished stage counts), of one of its stages, or an export.
        form: one of `FORMATS`.
        out: a new folder, an empty one, or an earlier export, which is replaced but for the scores in it.
        opset: of ONNX; None: the one that torch prefers.

    Raises:
        UserError: no model there, a format that cannot hold it, or a folder that holds something else.
        OSError: the disk is full, and the like.
    """
    if opset is not None and form != "onnx":
        raise UserError(f"--opset {opset}: only --format onnx has operators; leave it out")
    model, here = load(run, "cpu"), Path.cwd()
    out = Path(os.path.realpath(out))  # a link stays one, and `.` has a name
    _require_finite(model)
    provenance = find_provenance(model.folder, model.digest)
    earlier = earlier_card(model.folder)
    description: dict[str, Any] = {"format": form, "sha256": model.digest, "stage": model.manifest.get("stage")}
    with new_folder(out, model.folder, description) as folder:
        description.update(_write(model, form, folder, opset))
        (folder / CARD_FILE).write_text(model_card(model, provenance, form, earlier), encoding="utf-8")
    for problem in [] if earlier else provenance.problems:
        print(f"note: {problem}")
    written = ", ".join(
        f"{file.name} {file.stat().st_size / 1e6:.3g} MB" for file in sorted(out.iterdir()) if file.is_file()
    )
    print(f"{model.folder} -> {out}: {written}")
    if out == here:
        print("note: the folder that you are in was replaced; enter it again: cd .")
    if "largest_difference" in description:
        print(f"features differ from those of the run by at most {description['largest_difference']:.1e}")


def _require_finite(model: TrainedModel) -> None:
    for name, tensor in model.encoder.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{model.folder}: {name} holds nan or inf; the model diverged in training, train it again")


def _write(model: TrainedModel, form: str, folder: Path, opset: int | None) -> dict[str, Any]:
    """Writes one format; returns what the description should say of it."""
    if form == "onnx":
        difference, notes = write_onnx(model, folder, opset)
        return {"largest_difference": difference, **notes}
    if form == "open_clip":
        return {"largest_difference": write_open_clip(model, folder)}
    if form == "torch":
        return write_torch(model, folder)
    write_safetensors(model, folder)
    return {}


def export_parser() -> argparse.ArgumentParser:
    """Arguments of `launch/export.py`."""
    parser = argparse.ArgumentParser(prog="export.py", description="Writes a trained model for use elsewhere.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, of a stage, or an export")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what is written")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; replaced if an export")
    parser.add_argument("--opset", type=int, help="version of ONNX's operators (default: the one that torch prefers)")
    return parser
