"""The weights themselves: a copy of the run's own export, or one file of torch's, both without the stage's heads.

Neither holds an identity classifier, a queue or what a stage hands to the next (prompts of single people): those are
about the people of the training data. A run's export leaves the first two behind, this one the last.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from reid_dist.checkpoint.portable import ARCHITECTURE_FILE
from reid_dist.errors import UserError
from reid_dist.files import content_sha256
from reid_dist.models.architecture import read_architecture
from reid_dist.models.weights import EXPORT_FILE, MANIFEST_FILE, read_state_dict
from reid_dist.trained import TrainedModel

TORCH_FILE = "model.pt"


def write_safetensors(model: TrainedModel, folder: Path) -> None:
    """Writes what `reid_dist.load(folder)` reads: the same weights, byte for byte, and how to build their encoder.

    Raises:
        UserError: the weights changed on the disk meanwhile.
    """
    shutil.copyfile(model.folder / EXPORT_FILE, folder / EXPORT_FILE)
    if content_sha256(folder / EXPORT_FILE) != model.digest:
        raise UserError(f"{model.folder / EXPORT_FILE}: was changed while it was copied; export again")
    manifest = _portable_manifest(model)
    if str(manifest["model"]["architecture"]).endswith(".json"):
        (folder / ARCHITECTURE_FILE).write_text(json.dumps(architecture_of(model), indent=1) + "\n")
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")


def write_torch(model: TrainedModel, folder: Path) -> dict[str, Any]:
    """Writes a plain state dict, which `torch.load(weights_only=True)` reads.

    No torch.export program: reading one unpickles what the file says (the warning at `torch.export.load`).

    Returns:
        How to build its encoder.

    Raises:
        UserError: what is read back differs.
        OSError: the disk is full, and the like.
    """
    state = load_file(model.folder / EXPORT_FILE)
    try:
        torch.save(state, folder / TORCH_FILE)
    except RuntimeError as error:  # what torch makes of a full disk
        reason = str(error).splitlines()[0]
        raise OSError(f"{folder / TORCH_FILE}: cannot be written ({reason}); is the disk full?") from error
    found = read_state_dict(folder / TORCH_FILE)
    if found.keys() != state.keys() or any(not torch.equal(found[name], state[name]) for name in state):
        raise UserError(f"--format torch: {TORCH_FILE} does not hold what was written; check the disk")
    manifest = _portable_manifest(model)
    return {"model": manifest["model"], "architecture": architecture_of(model), "words": manifest["words"]}


def architecture_of(model: TrainedModel) -> dict[str, Any]:
    """The JSON description of a model's towers: the one in its export where there is one."""
    own = model.folder / ARCHITECTURE_FILE
    return read_architecture(str(own) if own.is_file() else str(model.manifest["model"]["architecture"]))


def _portable_manifest(model: TrainedModel) -> dict[str, Any]:
    """What an export says of itself, without paths of this machine and without what is not handed on."""
    settings = dict(model.manifest["model"])
    if str(settings["architecture"]).endswith(".json"):
        settings["architecture"] = Path(settings["architecture"]).name
    return {**model.manifest, "handover_sha256": None, "model": settings}
