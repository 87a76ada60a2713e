"""Another number of ranks after a kill: the same state, the same samples, nearly the same losses."""

from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

from reid_dist.exit_codes import ExitCode
from reid_dist.ledger import read_ledger
from tests.faults.rig import STEPS, Run, assert_clean, saves

pytestmark = [pytest.mark.every, pytest.mark.fault("another number of ranks")]
# Identities in threes and twos; no dropped patches: each rank draws its own.
OVERRIDES = ["data.global_batch_size=12", "stages.pretrain.patch_dropout=0"]
KILLED_AT = 7


@pytest.fixture(scope="module")
def whole(reference: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """Never stopped, on one rank and on two."""
    runs = {}
    for ranks in (1, 2):
        runs[ranks] = Run(tmp_path_factory.mktemp(f"of {ranks}"), reference.world, [*OVERRIDES, "checkpoint.every=1"])
        ended = runs[ranks].fork(ranks=ranks)
        assert ended.codes == [0] * ranks, ended
    return runs


@pytest.mark.kill
@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (1, 2)])
def test_resumed_on_others(whole: dict[int, Run], tmp_path: Path, before: int, after: int) -> None:
    run = Run(tmp_path / "run", whole[before].world, OVERRIDES)
    kill = {"rank": before - 1, "stage": "i2i", "step": KILLED_AT, "phase": "step", "kind": "kill"}
    ended = run.fork("checkpoint.asynchronous=false", faults=[kill], ranks=before)
    assert -9 in ended.codes and set(ended.codes) <= {-9, ExitCode.LOST_PEER}, ended
    again = run.fork(ranks=after)  # compares the digests of all parts with the manifest's itself
    assert again.codes == [0] * after, again
    assert "i2i: goes on after step 6" in again.out
    assert_clean(run, ended, again)
    found, expected = rows(run), rows(whole[before])
    assert sorted(found) == list(range(STEPS["i2i"]))
    for step in found:
        assert found[step][0] == expected[step][0], f"other samples in step {step}"
        if step < 11:
            assert found[step][1] == pytest.approx(expected[step][1], rel=1e-5)
    queues = [saves(each)["parts", "i2i", 9] for each in (run, whole[before])]
    assert queues[0]["step"] == queues[1]["step"] and queues[0]["groups"] == queues[1]["groups"]


def rows(run: Run) -> dict[int, tuple[list[int], float]]:
    """For each step its samples on all ranks that made it, sorted, and their mean loss."""
    samples: dict[int, list[int]] = defaultdict(list)
    losses: dict[int, list[float]] = defaultdict(list)
    for path in (run.output / "i2i/ledger").glob("*.jsonl"):
        for line in read_ledger(path):
            samples[line["step"]] += [x for each in line["samples"] for x in each]
            losses[line["step"]].append(fmean(map(float.fromhex, line["losses"])))
    return {step: (sorted(samples[step]), fmean(losses[step])) for step in samples}
