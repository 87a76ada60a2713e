"""How long a step of each stage should take on nodes that are not there, for each ZeRO stage."""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from reid_dist.config import RunConfig, StageConfig
from reid_dist.engine.deepspeed_engine import deepspeed_config
from reid_dist.inputs import check_batch
from reid_dist.optim import build_optimizer, parameter_groups
from reid_dist.planning.assumptions import Assumptions
from reid_dist.planning.building import pretended_ranks, read_manifest, stage_without_memory
from reid_dist.planning.memory import StagePlan, plan_stage
from reid_dist.planning.traffic import (
    Exchange,
    Listening,
    Sizes,
    engine_exchanges,
    parameter_sizes,
)
from reid_dist.planning.work import Work
from reid_dist.stages import Batch, Stage
from reid_dist.step_memory import peak_bytes

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Counted:
    """A stage's step on one rank of many, counted.

    Attributes:
        forward, backward: of a micro-batch.
        beside: queue and momentum encoders, once a step.
        updates: the optimizer's step, by how many ranks share it.
        heard: collectives of a micro-batch.
        sizes: of the parameters.
        averaged: elements and tensors that momentum encoders follow.
        input_bytes: that a micro-batch brings to the GPU.
    """

    forward: Work
    backward: Work
    beside: Work
    updates: dict[int, Work]
    heard: list[Exchange]
    sizes: Sizes
    averaged: tuple[int, int]
    input_bytes: int


@dataclass(frozen=True)
class Choice:
    """A stage under one ZeRO stage.

    Attributes:
        zero_stage: 0 to 3.
        refused: why it cannot be; empty where it can.
        peak_bytes: the most at any moment on one GPU.
        exchanges: of a step.
        compute_s, update_s, exchange_s: parts of a step: forwards and backwards, the optimizer and what follows it, and
            communication that nothing hides.
    """

    zero_stage: int
    refused: str = ""
    peak_bytes: float = 0.0
    exchanges: tuple[Exchange, ...] = ()
    compute_s: float = 0.0
    update_s: float = 0.0
    exchange_s: float = 0.0

    @property
    def step_s(self) -> float:
        """A whole optimizer step."""
        return self.compute_s + self.update_s + self.exchange_s

    def sent_bytes(self, kind: str, world: int) -> float:
        """By a rank in a step."""
        return sum(exchange.sent_bytes(world) for exchange in self.exchanges if exchange.kind == kind)


@dataclass(frozen=True)
class StageEstimate:
    """A stage on given nodes.

    Attributes:
        plan: memory and sizes.
        stage: its settings.
        counted: its work.
        sample_bytes: of a sample in the tars; measured: by the manifests, else as assumed.
        choices: by ZeRO stage.
    """

    plan: StagePlan
    stage: StageConfig
    counted: Counted
    sample_bytes: float
    measured: bool
    choices: list[Choice]


def estimate_stage(config: RunConfig, stage: StageConfig, nodes: int, gpus: int, assumed: Assumptions) -> StageEstimate:
    """The estimate of one stage.

    Raises:
        UserError: a batch that the ranks cannot share.
    """
    world = nodes * gpus
    return price(stage, plan_stage(config, stage, world), count_step(config, stage, world), nodes, gpus, assumed)


def price(
    stage: StageConfig, plan: StagePlan, counted: Counted, nodes: int, gpus: int, assumed: Assumptions
) -> StageEstimate:
    """What was counted, as times on given machines."""
    choices = [_choice(stage, zero, plan, counted, gpus, nodes * gpus, assumed) for zero in range(4)]
    sample, measured = _sample_bytes(stage, assumed)
    return StageEstimate(plan, stage, counted, sample, measured, choices)


def count_step(config: RunConfig, stage: StageConfig, world: int) -> Counted:
    """Runs a micro-batch and what follows it on tensors without memory, as rank 0 of `world`."""
    rows = check_batch(stage, world)
    with pretended_ranks(world), stage_without_memory(config, stage, rows) as (module, batch):
        groups = parameter_groups(module.trainable(), stage.optimizer)
        heard = Listening()
        with Work() as forward, heard, torch.autocast("cpu", torch.bfloat16, stage.engine.precision != "fp32"):
            output = module(batch)
        with Work() as backward, heard:
            output["loss"].backward()
        with Work() as beside:
            averaged = _after_step(module, output["state"])
        updates = {ranks: _update(groups, stage, ranks) for ranks in {1, world}}
        sizes = parameter_sizes(module, len(groups))
    return Counted(forward, backward, beside, updates, heard.found, sizes, averaged, _input_bytes(batch))


def _after_step(module: Stage, state: dict[str, Any]) -> tuple[int, int]:
    """What a stage with a queue does behind the step; elements and tensors that it averages."""
    if module.moco is None:
        return 0, 0
    parameters = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    names = module.moco.key_encoder.names
    module.moco.queue.commit([state["pending"]])
    module.moco.key_encoder.update((name, parameters[name].detach()) for name in names)
    trained = [parameters[name] for name in names if parameters[name].requires_grad]
    return sum(p.numel() for p in trained), len(trained)


def _update(groups: Groups, stage: StageConfig, ranks: int) -> Work:
    """The second step of the optimizer (the first makes its state) on what one of `ranks` updates.

    Each group is one flat tensor, as engines and fused kernels hold it.
    """
    flat = []
    for group in groups:
        parameter = nn.Parameter(torch.empty(-(-sum(p.numel() for p in group["params"]) // ranks)))
        parameter.grad = torch.empty_like(parameter)
        flat.append({**group, "params": [parameter]})
    optimizer, work = build_optimizer(flat, stage.optimizer), Work()
    optimizer.step()
    with work:
        optimizer.step()
    return work


def _input_bytes(batch: Batch) -> int:
    names = [name for name in batch if not name.startswith("masked")]
    return sum(batch[name].numel() * batch[name].element_size() for name in names)


def _choice(
    stage: StageConfig, zero: int, plan: StagePlan, counted: Counted, gpus: int, world: int, assumed: Assumptions
) -> Choice:
    try:
        stage = _under_zero(stage, zero)
    except ValidationError as error:
        return Choice(zero, refused=error.errors()[0]["msg"].removeprefix("Value error, "))
    engine = stage.engine
    memory = plan.key_bytes + peak_bytes(plan.trainable, plan.frozen, plan.passes, engine, world, stage.optimizer.name)
    micro = engine.gradient_accumulation_steps
    forwards = micro * (2 if engine.cached_gradients else 1)
    compute = forwards * counted.forward.seconds(assumed) + micro * counted.backward.seconds(assumed)
    update = counted.updates[world if zero else 1].seconds(assumed) + counted.beside.seconds(assumed)
    own = engine_exchanges(counted.sizes, engine, *counted.averaged)
    losses = [_repeated(exchange, micro) for exchange in counted.heard]
    links = assumed.links(gpus)
    # Behind the backward gradients can travel, and under ZeRO 3 weights, but not weights that a step has just made.
    hidden = [x for x in own if _overlaps(stage) and (zero == 3 or x.kind == "gradients")]
    exposed = max(0.0, sum(x.seconds(world, links) for x in hidden) - compute)
    waited = sum(x.seconds(world, links) for x in (*own, *losses) if x not in hidden)
    return Choice(zero, "", memory, (*own, *losses), compute, update, exposed + waited)


def _under_zero(stage: StageConfig, zero: int) -> StageConfig:
    """The stage with another `zero_stage`.

    Raises:
        ValidationError: it cannot be.
    """
    raw = stage.model_dump()
    raw["engine"]["zero_stage"] = zero
    return type(stage).model_validate(raw)


def _overlaps(stage: StageConfig) -> bool:
    """Whether DeepSpeed communicates beside forward and backward: at ZeRO 3 unless told otherwise."""
    zero = deepspeed_config(stage.engine, 1)["zero_optimization"]
    return bool(zero.get("overlap_comm", zero["stage"] == 3))


def _repeated(exchange: Exchange, times: int) -> Exchange:
    return Exchange(exchange.kind, times * exchange.whole_bytes, times * exchange.calls, exchange.rounds)


def _sample_bytes(stage: StageConfig, assumed: Assumptions) -> tuple[float, bool]:
    """Bytes of a training sample in its tars, and whether manifests told all of it."""
    sizes: list[float] = []
    weights: list[float] = []
    for place, name in enumerate(stage.data.train):
        manifest = read_manifest(stage, name)
        if manifest is None or not manifest.samples:
            return assumed.sample_kb * 1e3, False
        sizes.append(sum(shard.bytes for shard in manifest.shards) / manifest.samples)
        weights.append(stage.data.weights[place] if stage.data.weights else manifest.samples)
    if not sizes:
        return assumed.sample_kb * 1e3, False
    return sum(x * y for x, y in zip(sizes, weights, strict=True)) / sum(weights), True
