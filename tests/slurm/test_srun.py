"""Under a real SLURM the tasks of an `srun` are the ranks of one world, and the script around them is alone."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from reid_dist.distributed import free_port

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MEET = """
import json, os
from reid_dist import distributed
distributed.initialize(distributed.local_device(), timeout_s=60)
names = "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURMD_NODENAME"
place = [distributed.rank(), *(os.environ.get(name) for name in names)]
found = distributed.all_gather_object(place)
if distributed.rank() == 0:
    print(json.dumps(found))
distributed.shutdown()
"""
SCRIPT = f"""#!/bin/bash
unset {" ".join(LAUNCHER)}
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
'{sys.executable}' meet.py
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1) MASTER_PORT={{port}}
srun -K1 --ntasks=3 '{sys.executable}' meet.py
"""


def test_tasks_of_srun_are_ranks_and_the_script_is_alone(slurm: Any, tmp_path: Path) -> None:
    (tmp_path / "meet.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{MEET}")
    (tmp_path / "job.sh").write_text(SCRIPT.format(port=free_port()))
    job = slurm.submit("--nodes=2", "--ntasks=3", f"--output={tmp_path}/log", "job.sh", cwd=tmp_path)
    (fields,) = slurm.wait(job, 120).values()
    log = (tmp_path / "log").read_text()
    assert fields["ExitCode"] == "0:0", log
    alone, together = [json.loads(line) for line in log.splitlines()]
    assert len(alone) == 1 and alone[0][:3] == [0, "0", None]
    assert [place[0] for place in together] == [0, 1, 2]
    nodes = [place[3] for place in together]
    assert sorted(nodes.count(node) for node in set(nodes)) == [1, 2]
    for place in together:
        before = [other for other in together if other[3] == place[3] and other[0] < place[0]]
        assert place[1:3] == [str(len(before)), str(nodes.count(place[3]))]
