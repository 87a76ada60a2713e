"""A rank that trains nothing: steps with two collectives under all of the supervision, and one fault at step 5.

python training.py FOLDER FAULT RANK [HANG_S [GRACE_S]]
"""

import os
import sys
import time
from pathlib import Path

from reid_dist.supervision.leaving import leave
from reid_dist.supervision.parents import die_with_parent

STEPS = 2000  # of 20 ms: none is reached
FAULT_AT = 5


def main() -> int:
    import torch
    import torch.distributed as dist

    from reid_dist import distributed
    from reid_dist.supervision.agreement import StopAgreement
    from reid_dist.supervision.signals import StopRequest
    from reid_dist.supervision.watchdog import Watchdog

    folder, fault, faulty = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    hang_s, grace_s = [float(x) for x in sys.argv[4:6]] or (600, 60)
    distributed.initialize(torch.device("cpu"), timeout_s=60)
    rank = distributed.rank()
    with Watchdog(hang_s, folder / "hang") as watchdog, StopRequest(grace_s) as request:
        agreement, second = StopAgreement(request), dist.new_group()
        (folder / f"rank{rank}.partial").write_text(str(os.getpid()))
        (folder / f"rank{rank}.partial").rename(folder / f"rank{rank}")
        for step in range(STEPS):
            watchdog.at("data", step)
            time.sleep(0.02)
            at_fault = step == FAULT_AT and rank == faulty
            if at_fault and fault == "sleep":
                time.sleep(600)
            if at_fault and fault == "wrong":
                return 2
            try:
                watchdog.at("first", step)
                if not (at_fault and fault == "skip"):
                    dist.all_reduce(torch.ones(3))
                watchdog.at("second", step)
                dist.all_reduce(torch.ones(3), group=second)
            except RuntimeError as error:
                if not distributed.is_lost_peer(error):
                    raise
                return 70
            if name := agreement.poll():
                (folder / f"saved{rank}").write_text(f"{name} {step}")
                break
        else:
            return 0
    distributed.barrier()
    return 75


if __name__ == "__main__":
    die_with_parent()
    leave(main)
