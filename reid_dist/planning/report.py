"""The plan for a cluster as text: `launch/train.py CONFIG --plan 8x8`."""

from collections.abc import Sequence

from reid_dist.config import RunConfig
from reid_dist.planning.assumptions import Assumptions, read_assumptions, read_cluster
from reid_dist.planning.estimate import Choice, StageEstimate, estimate_stage
from reid_dist.planning.memory import GIB
from reid_dist.planning.traffic import KINDS

_HEAD = ("ZeRO", "GPU GiB", *(f"{kind} MB" for kind in KINDS), "compute ms", "update ms", "exchange ms", "step ms")
_RATES = ("samples/s", "data MB/s", "of a node", "hours")


def describe_cluster(config: RunConfig, cluster: str, settings: Sequence[str] = ()) -> str:
    """The plan of every stage that trains.

    Args:
        config: the recipe.
        cluster: nodes x GPUs of each, `8x8`.
        settings: assumptions that are replaced, `key=value` each.

    Raises:
        UserError: an argument of another form, or a batch that so many ranks cannot share.
    """
    nodes, gpus = read_cluster(cluster)
    assumed = read_assumptions(settings)
    parts = [_head(nodes, gpus, assumed, config)]
    for stage in config.stages:
        if config.stage_steps(stage):
            parts.append(_stage(estimate_stage(config, stage, nodes, gpus, assumed), nodes, gpus))
    return "\n\n".join([*parts, _NOT_COUNTED])


_NOT_COUNTED = (
    "GPU GiB: the most at any moment of a step, without CUDA's own (about 0.5-1 GiB), workspaces and fragmentation.\n"
    "MB: what each rank sends in a step. exchange ms: what nothing hides; ZeRO 3 sends beside forward and backward.\n"
    "Not counted: waiting for data, evaluation, saving, what DeepSpeed's and our own code take beside the operations."
)


def _head(nodes: int, gpus: int, assumed: Assumptions, config: RunConfig) -> str:
    lines = [
        f"plan for {nodes} x {gpus} GPUs, {nodes * gpus} ranks: work and messages counted, times ARITHMETIC from",
        f"  {assumed.text()}",
        "  (another with --plan-set key=value; sample_kb is replaced by manifests where the shards are there)",
    ]
    if any(stage.engine.backend != "deepspeed" for stage in config.stages):
        lines.append("  engine.backend is torch: memory and messages below are those of DeepSpeed's ZeRO all the same")
    return "\n".join(lines)


def _stage(found: StageEstimate, nodes: int, gpus: int) -> str:
    plan, engine, work = found.plan, found.stage.engine, found.counted
    micro = engine.gradient_accumulation_steps
    forwards = micro * (2 if engine.cached_gradients else 1)
    flops = forwards * work.forward.flops + micro * work.backward.flops
    moved = forwards * work.forward.moved_bytes + micro * work.backward.moved_bytes
    count = forwards * work.forward.count + micro * work.backward.count
    steps = f"{plan.steps:,} steps of {plan.global_batch_size:,} samples, {plan.micro_batch_size} a rank"
    source = "by the manifests" if found.measured else "assumed"
    lines = [
        f"{plan.name}: {steps}{f' x {micro} micro-batches' if micro > 1 else ''}, {engine.precision};"
        f" {plan.trainable:,} parameters train, {plan.frozen:,} do not",
        f"  of a rank and step: {flops / 1e12:.3g} TFLOP, {moved / 1e9:.3g} GB moved, {count:,} operations;"
        f" {micro * work.input_bytes / 1e6:.3g} MB to the GPU; a sample: {found.sample_bytes / 1e3:.3g} kB ({source})",
        "  " + _row(_HEAD + _RATES),
    ]
    lines += [_line(choice, found, nodes, gpus) for choice in found.choices]
    return "\n".join(lines)


def _line(choice: Choice, found: StageEstimate, nodes: int, gpus: int) -> str:
    mark = "*" if choice.zero_stage == found.stage.engine.zero_stage else ""
    if choice.refused:
        return f"  {f'{choice.zero_stage}{mark}':>5}  refused: {choice.refused}"
    rate = found.plan.global_batch_size / choice.step_s
    data = rate * found.sample_bytes / 1e6
    sent = (f"{choice.sent_bytes(kind, nodes * gpus) / 1e6:,.1f}" for kind in KINDS)
    parts = (choice.compute_s, choice.update_s, choice.exchange_s, choice.step_s)
    rates = (f"{rate:,.0f}", f"{data:,.1f}", f"{data / nodes:,.1f}", f"{found.plan.steps * choice.step_s / 3600:,.1f}")
    milliseconds = (f"{1e3 * part:,.1f}" for part in parts)
    return "  " + _row((f"{choice.zero_stage}{mark}", f"{choice.peak_bytes / GIB:.2f}", *sent, *milliseconds, *rates))


def _row(cells: Sequence[str]) -> str:
    return "  ".join(f"{cell:>{max(len(head), 5)}}" for cell, head in zip(cells, _HEAD + _RATES, strict=True))
