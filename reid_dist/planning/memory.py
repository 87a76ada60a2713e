"""What a recipe would do, without its data: steps, samples, parameters and memory per GPU (`--dry-run`)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from reid_dist.config import EngineConfig, RunConfig, StageConfig
from reid_dist.distributed import environment_world_size
from reid_dist.inputs import check_batch
from reid_dist.planning.building import pretended_ranks, stage_without_memory
from reid_dist.stages import Batch, Stage
from reid_dist.step_memory import PassBytes, pass_bytes, peak_bytes

GIB = 2**30


@dataclass(frozen=True)
class StagePlan:
    """One stage in numbers.

    `state_bytes` are weights, gradients, masters and optimizer state of one GPU; `key_bytes` its queue and momentum
    encoders; `activation_bytes` what a forward of its micro-batch keeps for the backward. These do not peak together:
    `peak_bytes` is the most at any moment of a step, with what DeepSpeed and the optimizer make and let go in it.
    `passes` are the peaks of a forward and backward, from which that of other ZeRO stages follows.
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
    passes: PassBytes


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
    bf16, adam = stage.engine.precision != "fp32", stage.optimizer.name != "sgd"
    with stage_without_memory(config, stage, rows) as (module, _):
        key_bytes = module.bytes_beside(world_size)
        trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in module.parameters()) - trainable
    with pretended_ranks(world_size), stage_without_memory(config, stage, rows) as (module, batch):
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
        passes,
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
