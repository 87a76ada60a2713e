"""What a recipe would do, without its data: steps, samples, parameters and memory per GPU (`--dry-run`)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from reid_dist.config import EngineConfig, RunConfig, StageConfig
from reid_dist.data.sample import MANIFEST_NAME, Manifest
from reid_dist.distributed import environment_world_size
from reid_dist.inputs import check_batch
from reid_dist.models.architecture import build_dual_encoder
from reid_dist.stages import Batch, Stage, Surroundings, build_stage
from reid_dist.stages.identity_prompt import IDENTITY_TEXT
from reid_dist.stages.text_losses import IDENTITY_IMAGES
from reid_dist.step_memory import pass_bytes, peak_bytes

GIB = 2**30
UNKNOWN_IDENTITIES = 1000


@dataclass(frozen=True)
class StagePlan:
    """One stage in numbers.

    `state_bytes` are weights, gradients, masters and optimizer state of one GPU; `key_bytes` its queue and momentum
    encoders; `activation_bytes` what a forward of its micro-batch keeps for the backward. These do not peak together:
    `peak_bytes` is the most at any moment of a step, with what DeepSpeed and the optimizer make and let go in it.
    """

    name: str
    steps: int
    global_batch_size: int
    micro_batch_size: int
    trainable: int
    frozen: int
    state_bytes: float
    key_bytes: float
    activation_bytes: float
    peak_bytes: float


def describe(config: RunConfig) -> str:
    """The plan as a table, for the number of ranks that this process was launched with.

    Raises:
        UserError: a batch that the ranks cannot share, or an architecture that does not exist.
    """
    world_size = environment_world_size()
    rows = [plan_stage(config, stage, world_size) for stage in config.stages]
    lines = [
        f"plan for {world_size} rank{'s' if world_size > 1 else ''}"
        " (started under a launcher, or with WORLD_SIZE=N set, it is made for N)",
        f"{'stage':<12} {'steps':>9} {'samples':>13} {'batch':>7} {'per rank':>9} {'trainable':>12} {'frozen':>12}"
        f" {'state GiB':>10} {'queue, momentum GiB':>20} {'activations GiB':>16} {'per GPU GiB':>12}",
    ]
    for row in rows:
        lines.append(
            f"{row.name:<12} {row.steps:>9,} {row.steps * row.global_batch_size:>13,} {row.global_batch_size:>7}"
            f" {row.micro_batch_size:>9} {row.trainable:>12,} {row.frozen:>12,} {row.state_bytes / GIB:>10.2f}"
            f" {row.key_bytes / GIB:>20.2f} {row.activation_bytes / GIB:>16.2f} {row.peak_bytes / GIB:>12.2f}"
        )
    lines.append("not counted: CUDA's own memory (about 0.5-1 GiB), workspaces, fragmentation and evaluation")
    return "\n".join(lines)


def plan_stage(config: RunConfig, stage: StageConfig, world_size: int) -> StagePlan:
    """Numbers of one stage; its model is built and run without memory for any tensor."""
    rows = check_batch(stage, world_size)
    model = config.model
    with torch.device("meta"):  # some of timm's constructors look at values, which fake tensors refuse
        encoder = build_dual_encoder(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder.to_empty(device="cpu")
        encoder.set_grad_checkpointing(model.gradient_checkpointing)
        identities = stage.data.identities or _count_identities(stage)
        handed = dict.fromkeys((IDENTITY_TEXT, IDENTITY_IMAGES), torch.zeros(identities, encoder.features))
        run = Surroundings(rows, precision=stage.engine.precision, identities=identities, handed=handed)
        module = build_stage(stage, encoder, run).train()
        key_bytes = module.bytes_beside(world_size)
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in module.parameters()) - trainable
        batch = _batch(module, rows, model.image_size, _captioned_rows(stage, rows))
        bf16, adam = stage.engine.precision != "fp32", stage.optimizer.name != "sgd"
        activations = _activation_bytes(module, batch, bf16)
        passes = pass_bytes(module, batch, bf16)
    return StagePlan(
        stage.name,
        config.stage_steps(stage),
        stage.data.global_batch_size,
        rows,
        trainable,
        frozen,
        state_bytes(trainable, frozen, stage.engine, world_size, adam),
        key_bytes,
        activations,
        key_bytes + peak_bytes(trainable, frozen, passes, stage.engine, world_size, stage.optimizer.name),
    )


def state_bytes(trainable: int, frozen: int, engine: EngineConfig, world_size: int, adam: bool) -> float:
    """Bytes of weights, gradients, fp32 masters and optimizer state on one GPU (Rajbhandari et al. 2020, sec. 3).

    ZeRO 1 shards optimizer state and masters, 2 also gradients, 3 also weights. Below pure_bf16 weights are fp32; ZeRO
    keeps its own fp32 copy of them all the same.
    """
    zero = engine.zero_stage
    weight = 2 if engine.precision == "pure_bf16" else 4
    master = 4 if zero > 0 or engine.precision == "pure_bf16" else 0
    optimizer = (8 if adam else 4) + master
    sharded = [zero >= 3, zero >= 2, zero >= 1]
    per_trainable = [
        size / (world_size if shard else 1) for size, shard in zip((weight, weight, optimizer), sharded, strict=True)
    ]
    return trainable * sum(per_trainable) + frozen * weight / (world_size if zero >= 3 else 1)


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
    manifest = _manifest(stage, name)
    if manifest is not None:
        return manifest.splits["train"].captions > 0
    return name in stage.evaluation.t2i or name not in stage.evaluation.i2i


def _activation_bytes(stage: Stage, batch: Batch, bf16: bool) -> float:
    """Bytes that autograd saves in one forward: distinct storages that are not parameters."""
    seen: dict[int, int] = {}
    parameters = {p.untyped_storage()._cdata for p in stage.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            seen[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    held: list[Tensor] = []  # storages must stay alive, or their addresses would be used again
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        stage(batch)
    return float(sum(seen.values()))


def _count_identities(stage: StageConfig) -> int:
    """Training identities from the manifests, where the shards are there already."""
    manifests = [_manifest(stage, name) for name in stage.data.train]
    found = sum(manifest.splits["train"].identities for manifest in manifests if manifest is not None)
    return found if found and None not in manifests else UNKNOWN_IDENTITIES


def _manifest(stage: StageConfig, name: str) -> Manifest | None:
    path = Path(stage.data.location(name)) / MANIFEST_NAME
    return Manifest.model_validate_json(path.read_bytes()) if path.is_file() else None  # an address is not asked
