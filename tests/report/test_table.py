"""Tables say what they should, aligned."""

from reid_dist.report.table import result_table

METRICS = {"R1": 42.5, "R5": 60.0, "R10": 71.0, "mAP": 47.0, "mINP": 30.0}
FULL = METRICS | {"queries": 3200.0, "skipped": 2.0, "tied": 0.5}


def test_table_is_aligned_and_says_na() -> None:
    table = result_table(
        [
            ("chance", {"t2i": FULL, "i2i": None}),
            ("after the T2I stage", {"t2i": FULL, "i2i": FULL}),
        ]
    )
    lines = table.splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[2].count("n/a") == 5 and lines[3].count("42.5") == 2
    assert "rectangular" in lines[-1] and "3200 queries, 2 skipped" in lines[-1] and "0.5 % tied" in lines[-1]
    assert "I2I: not measured" in result_table([("x", {"t2i": FULL, "i2i": None})])
