"""Real launchers with two ranks, started as a person starts them; whatever happens, none of it outlives its test."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from reid_dist.distributed import free_port
from reid_dist.supervision.processes import Process, descendants, find

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CLEAN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR", "REID_DIST_SUPERVISION"}


class Launch:
    """A launcher in a session of its own and its two ranks; a context manager.

    Args:
        launcher: `deepspeed`, `torchrun` or `python`; the last starts one rank.
        program: of this folder.
        folder: the ranks', their first argument.
        arguments: their others.
        around: a command in front, such as the supervisor's.
    """

    def __init__(
        self, launcher: str, program: str, folder: Path, *arguments: str, around: list[str] | None = None
    ) -> None:
        self.folder, self.port = folder, free_port()
        self.ranks = 1 if launcher == "python" else 2
        options = {
            "python": [sys.executable],
            "torchrun": ["torchrun", "--nproc_per_node=2", f"--master_port={self.port}"],
            "deepspeed": ["deepspeed", "--num_accelerators=2", f"--master_port={self.port}", "--no_local_rank"],
        }
        self._command = [*(around or []), *options[launcher], str(HERE / program), str(folder), *arguments]
        self._seen: dict[int, Process] = {}

    def __enter__(self) -> "Launch":
        environment = {name: value for name, value in os.environ.items() if name not in CLEAN}
        environment |= {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        environment["TMPDIR"] = str(self.folder)  # what a killed guardian leaves goes with the test
        self.process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._look()
        for process in self._seen.values():
            process.signal(9)
        self.process.kill()
        self.process.communicate()

    def wait_for(self, what: Callable[[], bool], seconds: float = 60) -> float:
        """Waits until something is so; returns how long it took."""
        began = looked = time.monotonic()
        while not what():
            now = time.monotonic()
            assert now - began < seconds, "not so in time"
            if now - looked > 0.2:
                looked = now
                self._look()
            time.sleep(0.02)
        return time.monotonic() - began

    def pids(self, name: str = "rank") -> list[int]:
        """The ranks' process ids, once they all are ready."""
        files = [self.folder / f"{name}{rank}" for rank in range(self.ranks)]
        self.wait_for(lambda: self.process.poll() is not None or all(file.exists() for file in files))
        assert all(file.exists() for file in files), self.process.communicate()[0]
        return [int(file.read_text()) for file in files]

    def until_gone(self, *pids: int, seconds: float = 30) -> float:
        """Waits until these processes, or all that was ever seen of this launch, have ended; returns how long."""
        self._look()
        waited_for = pids or tuple(self._seen)
        return self.wait_for(lambda: all(not self._runs(pid) for pid in waited_for), seconds)

    def end(self, seconds: float = 40) -> tuple[int, str]:
        """The launcher's exit code and all that was said."""
        said, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, said

    def _runs(self, pid: int) -> bool:
        process = self._seen.get(pid)
        return process.runs() if process else find(pid) is not None

    def _look(self) -> None:
        """Notes what belongs to this launch now: later it may have another parent."""
        below = {self.process.pid}
        for process in descendants():  # parents first
            if process.pid in below or process.parent in below:
                below.add(process.pid)
                self._seen.setdefault(process.pid, process)
