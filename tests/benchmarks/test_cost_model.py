"""The cost model of the queue against the figures of kernel.md section 5."""

import math
from dataclasses import replace

import pytest

from reid_dist.benchmarks.cost_model import WORLDS, Job, collectives, layouts, model, model_table
from reid_dist.planning.links import Links

# Section 5: b=256, D=512, K=262144, one modality without ids; ms, and MB of the gather.
TABLE = {
    #      MB,  gather, reduce_scatter, all_reduce, ring, its latency, sharded
    8: (1.8, 0.014, 0.019, 0.038, 0.026, 0.021, 0.05),
    64: (16.5, 0.44, 0.81, 1.6, 1.1, 0.76, 1.4),
    1024: (268, 6.1, 12.0, 24.1, 18.2, 12.3, 18.5),
}
COLUMNS = ("gather_ms", "reduce_scatter_ms", "all_reduce_ms", "ring_ms", "ring_latency_ms", "sharded_ms")
ONE = Job(modalities=1, ids=False)


def as_printed(value: float, printed: float) -> bool:
    """Whether a value rounds to a figure as the table prints it."""
    digits = len(str(printed).partition(".")[2])
    return round(value, digits) == printed


@pytest.mark.parametrize("world", WORLDS)
def test_the_table_of_section_5(world: int) -> None:
    megabytes, *times = TABLE[world]
    found = collectives(ONE, world)
    assert as_printed(found["gather_bytes"] / 1e6, megabytes)
    for name, printed in zip(COLUMNS, times, strict=True):
        assert as_printed(found[name], printed), name


def test_the_text_of_section_5() -> None:
    ways = {row["layout"]: row for row in layouts(ONE, 1024)}
    assert as_printed(ways["replicated"]["attend_ms"], 0.17)
    # "K/64 per step = 4 MB, 0.2 ms"
    assert as_printed(ways["capped"]["sent_bytes"] / 1e6, 4) and as_printed(ways["capped"]["behind_encoder_ms"], 0.2)
    assert ways["capped"]["rows"] == 4 and ways["capped"]["steps_of_life"] == 64
    assert ways["replicated"]["steps_of_life"] == 1  # "B_g >= K replaces the queue every step"
    # "1M x 512 = 1 GB, 8M x 512 = 8 GB"
    assert [round(replace(ONE, size=size * 2**20).storage_bytes / 2**30) for size in (1, 8)] == [1, 8]
    # "3x the gather bytes every step": anchors out in two bytes, partial sums back in four.
    assert 3 <= collectives(ONE, 64)["sharded_bytes"] / collectives(ONE, 64)["gather_bytes"] < 3.02


def test_both_modalities_and_ids() -> None:
    """What `FeatureQueue` sends: (N - 1) b (2 x 2D + 4) bytes."""
    for world in WORLDS:
        replicated, sharded, capped = layouts(Job(), world)
        assert replicated["sent_bytes"] == (world - 1) * 256 * (4 * 512 + 4)
        assert replicated["exposed_ms"] == capped["exposed_ms"] == 0 < sharded["exposed_ms"]
        assert sharded["exposed_ms"] == pytest.approx(2 * collectives(Job(), world)["sharded_ms"], abs=1e-4)
        assert sharded["storage_bytes"] == math.ceil(replicated["storage_bytes"] / world)
        assert capped["rows"] <= 256 and capped["sent_bytes"] <= replicated["sent_bytes"]
    assert layouts(Job(rows=16), 8)[2]["rows"] == 16  # few enough rows are not capped


def test_links() -> None:
    links = Links(node=4, near_us=1.0, far_us=100.0, near_gbs=100.0, far_gbs=1.0)
    assert links.collective_ms(4, 1e6) == pytest.approx(2 * 0.001 + 0.01)
    assert links.collective_ms(8, 1e6) == pytest.approx(3 * 0.1 + 1.0)


def test_model_states_its_assumptions() -> None:
    found = model()
    assert found["measured"] is False and found["assumptions"]["links"]["near_us"] == 3.0
    assert [(row["ranks"], row["layout"]) for row in found["rows"]] == [
        (world, layout) for world in (8, 64, 1024) for layout in ("replicated", "sharded", "capped")
    ]
    text = model_table(found)
    assert "NOT measured" in text and "3 us and 360 GB/s" in text and "12 us and 45 GB/s" in text
    assert len(text.splitlines()) == 2 + 9 + 1
