"""What a key queue's communication should cost on 8, 64 and 1024 GPUs: arithmetic, not measurement (kernel.md 5).

Assumptions (`Links`, `Job`): inside a node of 8 GPUs a collective of N ranks takes log2(N) x 3 us and 360 GB/s per GPU,
across nodes 12 us and 45 GB/s; a ring of point-to-point messages pays its latency N - 1 times. A rank has 256 rows of
512 features, the queue 262144 keys. Keys travel in bfloat16, gradients and partial sums in float32. A GPU multiplies at
790 TFLOP/s. What lies behind an encoder's forward is hidden up to that forward's time.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from reid_dist.planning.links import H100_NODES, Links

WORLDS = (8, 64, 1024)
_KEY, _FLOAT, _ID = 2, 4, 4  # bytes
_STATISTICS = 8  # bytes a row: maximum and sum


@dataclass(frozen=True)
class Job:
    """What is trained.

    Attributes:
        rows: of a rank, b.
        features: D.
        size: keys of the queue, K.
        modalities: queues in step; 2 for image and text keys.
        ids: whether identities travel with the keys.
        life: steps that a key should stay, for the capped layout.
    """

    rows: int = 256
    features: int = 512
    size: int = 262144
    modalities: int = 2
    ids: bool = True
    life: int = 64

    def keys_bytes(self, rows: int) -> int:
        """Of packed keys and ids."""
        return rows * (self.modalities * _KEY * self.features + _ID * self.ids)

    @property
    def storage_bytes(self) -> int:
        """Of the whole queue."""
        return self.keys_bytes(self.size)


def collectives(job: Job, world: int, links: Links = H100_NODES) -> dict[str, float]:
    """Milliseconds and bytes of each way to share keys or gradients, for one modality of `job` each.

    gather: of the keys, which is all that a replicated queue needs. reduce_scatter: of trainable keys' gradients, as in
    CLIP. all_reduce: the same by DisCo-CLIP. ring: Inf-CL's, with its latency part. sharded: anchors out, partial sums
    back, and the rows' statistics as an all-reduce.
    """
    others = world - 1
    keys = others * job.rows * _KEY * job.features
    sums = others * job.rows * _FLOAT * job.features
    latency = others * links.latency_ms(world)
    gather, reduce_scatter = links.collective_ms(world, keys), links.collective_ms(world, sums)
    statistics = 2 * links.collective_ms(world, others * job.rows * _STATISTICS)
    return {
        "gather_bytes": keys,
        "gather_ms": gather,
        "reduce_scatter_ms": reduce_scatter,
        "all_reduce_ms": 2 * reduce_scatter,
        "ring_ms": latency + links.transfer_ms(world, keys),
        "ring_latency_ms": latency,
        "sharded_bytes": keys + sums + 2 * others * job.rows * _STATISTICS,
        "sharded_ms": gather + reduce_scatter + statistics,
    }


def layouts(job: Job, world: int, links: Links = H100_NODES) -> list[dict[str, Any]]:
    """One row for each layout of the queue: what a rank sends and waits for in a step, and what it stores.

    replicated: all keys to all ranks, behind the encoders. sharded: in addition the exchange of each modality's loss,
    which nothing hides. capped: replicated, but a rank enqueues only ceil(K / (life N)) of its rows; a model only,
    `FeatureQueue` enqueues all.
    """
    one = collectives(job, world, links)
    sent = job.keys_bytes((world - 1) * job.rows)
    capped_rows = min(job.rows, math.ceil(job.size / (job.life * world)))
    capped = job.keys_bytes((world - 1) * capped_rows)
    gather = links.collective_ms(world, sent)
    attend = job.modalities * 4 * job.rows * job.size * job.features / links.tflops / 1e9
    exchange = job.modalities * one["sharded_ms"]
    shard = math.ceil(job.storage_bytes / world)
    kinds = (
        ("replicated", job.rows, sent, gather, 0.0, job.storage_bytes),
        ("sharded", job.rows, sent + int(job.modalities * one["sharded_bytes"]), gather, exchange, shard),
        ("capped", capped_rows, capped, links.collective_ms(world, capped), 0.0, job.storage_bytes),
    )
    return [
        {
            "ranks": world,
            "layout": name,
            "rows": rows,
            "sent_bytes": int(total),
            "behind_encoder_ms": round(hidden, 4),
            "exposed_ms": round(exposed, 4),
            "attend_ms": round(attend, 4),
            "storage_bytes": stored,
            "steps_of_life": round(job.size / (rows * world), 2),
        }
        for name, rows, total, hidden, exposed, stored in kinds
    ]


def model(job: Job = Job(), links: Links = H100_NODES) -> dict[str, Any]:
    """The model with its assumptions, for the benchmark's file."""
    return {
        "measured": False,
        "assumptions": {"links": asdict(links), "job": asdict(job)},
        "rows": [row for world in WORLDS for row in layouts(job, world, links)],
        "collectives_of_one_modality": [{"ranks": world} | collectives(job, world, links) for world in WORLDS],
    }


def model_table(found: dict[str, Any]) -> str:
    """The model as text."""
    job, links = found["assumptions"]["job"], found["assumptions"]["links"]
    lines = [
        "cost model, NOT measured: "
        f"b={job['rows']} a rank, D={job['features']}, K={job['size']}, {job['modalities']} modalities in bfloat16;"
        f" {links['near_us']:g} us and {links['near_gbs']:g} GB/s per GPU up to {links['node']} ranks,"
        f" {links['far_us']:g} us and {links['far_gbs']:g} GB/s beyond; {links['tflops']:g} TFLOP/s",
        f"  {'ranks':>5} {'layout':<11}{'rows':>6}{'sent MB':>10}{'hidden ms':>11}{'exposed ms':>12}"
        f"{'attend ms':>11}{'stored MB':>11}{'steps of life':>15}",
    ]
    for row in found["rows"]:
        lines.append(
            f"  {row['ranks']:>5} {row['layout']:<11}{row['rows']:>6}{row['sent_bytes'] / 1e6:>10,.1f}"
            f"{row['behind_encoder_ms']:>11.3f}{row['exposed_ms']:>12.3f}{row['attend_ms']:>11.3f}"
            f"{row['storage_bytes'] / 1e6:>11,.1f}{row['steps_of_life']:>15,.1f}"
        )
    lines.append(
        "  hidden: behind the encoders' forward. Below 4 steps of life a queue holds little that the batch lacks."
    )
    return "\n".join(lines)
