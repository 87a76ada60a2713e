"""A stage and a micro-batch on tensors without memory, on ranks that do not exist: plans run them only to count."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch._subclasses.fake_tensor import FakeTensorMode

from reid_dist.config import RunConfig, StageConfig
from reid_dist.data.sample import MANIFEST_NAME, Manifest
from reid_dist.errors import UserError
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.stages import Batch, Stage, Surroundings, build_stage
from reid_dist.stages.identity_prompt import IDENTITY_TEXT
from reid_dist.stages.text_losses import IDENTITY_IMAGES

UNKNOWN_IDENTITIES = 1000


@contextmanager
def stage_without_memory(config: RunConfig, stage: StageConfig, rows: int) -> Iterator[tuple[Stage, Batch]]:
    """A stage in training mode and a micro-batch for it; whatever is made of them within has no memory either.

    Args:
        config: of the run.
        stage: one of its stages.
        rows: of the micro-batch.
    """
    model = config.model
    with torch.device("meta"):  # some of timm's constructors look at values, which fake tensors refuse
        encoder = build_dual_encoder(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder.to_empty(device="cpu")
        encoder.set_grad_checkpointing(model.gradient_checkpointing)
        identities = stage.data.identities or count_identities(stage)
        handed = dict.fromkeys((IDENTITY_TEXT, IDENTITY_IMAGES), torch.zeros(identities, encoder.features))
        run = Surroundings(rows, precision=stage.engine.precision, identities=identities, handed=handed)
        module = build_stage(stage, encoder, run).train()
        yield module, _batch(module, rows, model.image_size, _captioned_rows(stage, rows))


@contextmanager
def pretended_ranks(world_size: int) -> Iterator[None]:
    """Within, this process is rank 0 of so many, and collectives give results of the right shape and no meaning.

    Raises:
        RuntimeError: the process belongs to a group already.
    """
    if dist.is_initialized():
        raise RuntimeError("a plan for other ranks is made outside of a process group")
    if world_size == 1:
        yield
        return
    # Importing it registers the backend "fake"; torch offers no other way to run as one of many alone.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _batch(stage: Stage, rows: int, image_size: tuple[int, int], captioned: int) -> Batch:
    texts = (captioned, stage.encoder.text_shape.context_length)
    batch = {
        "image_BCHW": torch.zeros(rows, 3, *image_size, dtype=torch.uint8),
        "token_BL": torch.zeros(texts, dtype=torch.int64),
        "masked_token_BL": torch.zeros(texts, dtype=torch.int64),
        "masked_label_BL": torch.zeros(texts, dtype=torch.int64),
        "pid_B": torch.zeros(rows, dtype=torch.int64),
        "sample_id_B": torch.zeros(rows, dtype=torch.int64),
    }
    return batch if captioned == rows else {**batch, "captioned_B": torch.arange(rows) < captioned}


def _captioned_rows(stage: StageConfig, rows: int) -> int:
    """Rows of a micro-batch that have captions; all, unless sets with and without share every batch."""
    data = stage.data
    if data.mixing != "mixed" or not data.weights:
        return rows
    own = sum(weight for name, weight in zip(data.train, data.weights, strict=True) if _is_captioned(stage, name))
    return round(rows * own / sum(data.weights)) or rows  # of sets without captions no text is read


def _is_captioned(stage: StageConfig, name: str) -> bool:
    """By the manifest; where that is not there yet, all but what the stage scores by images alone."""
    manifest = read_manifest(stage, name)
    if manifest is not None:
        return manifest.splits["train"].captions > 0
    return name in stage.evaluation.t2i or name not in stage.evaluation.i2i


def count_identities(stage: StageConfig) -> int:
    """Training identities from the manifests, where the shards are there already."""
    manifests = [read_manifest(stage, name) for name in stage.data.train]
    found = sum(manifest.splits["train"].identities for manifest in manifests if manifest is not None)
    return found if found and None not in manifests else UNKNOWN_IDENTITIES


def read_manifest(stage: StageConfig, name: str) -> Manifest | None:
    """The manifest of a training set; None where it is not there yet, or at an address, which is not asked."""
    path = Path(stage.data.location(name)) / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read ({first}); index the set again, or move it away") from error
