"""A rank that does nothing, without torch: it registers, waits until it is told to stop, and ends with 75.

python idling.py FOLDER [FAULT], where FAULT is `wrong` (the last rank ends with 2), `deaf` (it never ends by itself),
`fork` (it has a child process, as a loader has) or `once` (the last kills itself, but the second time all end with 0).
"""

import os
import signal
import sys
import time
from pathlib import Path

from reid_dist.supervision.leaving import leave
from reid_dist.supervision.parents import die_with_parent
from reid_dist.supervision.signals import StopRequest


def main() -> int:
    folder, fault = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    rank, last = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")) - 1
    if os.environ.get("LEAVE_SHM"):
        shared = f"deepspeed_allreduce_buffer_{os.getuid()}_x_{os.environ['MASTER_PORT']}_{os.environ['LOCAL_RANK']}"
        Path("/dev/shm", shared).touch()
    with StopRequest(grace_s=60) as request:
        if fault == "fork" and (child := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
        if fault == "fork":
            (folder / f"child{rank}").write_text(str(child))
        (folder / f"rank{rank}.partial").write_text(str(os.getpid()))
        (folder / f"rank{rank}.partial").rename(folder / f"rank{rank}")
        if rank == last and fault == "wrong":
            return 2
        if fault == "once" and (folder / f"begun{rank}").exists():
            return 0
        (folder / f"begun{rank}").touch()
        if rank == last and fault == "once":
            os.kill(os.getpid(), signal.SIGKILL)
        deadline = time.monotonic() + 120  # whatever becomes of the test
        while (request.name is None or fault == "deaf") and time.monotonic() < deadline:
            time.sleep(0.02)
        (folder / f"saved{rank}").write_text(str(request.name))
    return 70 if fault == "once" else 75


if __name__ == "__main__":
    die_with_parent()
    leave(main)
