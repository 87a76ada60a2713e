"""A real SLURM on this machine: a controller and two nodes of two processors, without root or system services."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue", "setpriv")
# Loopback addresses as names: `scontrol show hostnames` then gives what a MASTER_ADDR can be.
NODES = ("127.0.1.1", "127.0.1.2")
PROCESSORS = 2


@dataclass(frozen=True)
class Slurm:
    """A running cluster: NODES in the partitions `main` (default) and `high` (preempts by requeue).

    Attributes:
        environment: for commands that talk to it, and so of the jobs.
    """

    environment: dict[str, str] = field(repr=False)

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """Output of a command such as `scontrol`; a failure raises with what it printed."""
        result = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=60)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {result.returncode}\n{result.stdout}{result.stderr}")
        return result.stdout.strip()

    def submit(self, *arguments: str, cwd: Path | None = None) -> str:
        """Number of the job that `sbatch` makes of its arguments."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd)

    def tasks(self, job: str) -> dict[str, dict[str, str]]:
        """Fields that `scontrol` shows, by array task (`ArrayTaskId`; "" without an array)."""
        lines = self.run("scontrol", "show", "job", "--oneliner", job).splitlines()
        shown = [dict(field.split("=", 1) for field in line.split() if "=" in field) for line in lines]
        return {fields.get("ArrayTaskId", ""): fields for fields in shown}

    def wait(self, job: str, timeout_s: float = 60) -> dict[str, dict[str, str]]:
        """Its tasks once the whole job has left the queue; `ExitCode` is "exit code:signal"."""
        wait_until(lambda: not self.run("squeue", "--noheader", "--jobs", job), f"job {job} to end", timeout_s)
        return self.tasks(job)


def wait_until(done: Callable[[], object], what: str, timeout_s: float = 30) -> None:
    """Ask again and again, and say what did not happen in time."""
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.05)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """The cluster of all tests of a session; skips where its programs are not installed."""
    # Debian puts the daemons where an ordinary user's PATH does not look.
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here; Debian: apt-get install --no-install-recommends slurm-wlm munge")
    # Of a cluster that the tests themselves run on.
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    # Not pytest's folder: the path of munge's socket may have 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as name, ExitStack() as daemons:
        folder = Path(name)
        folder.chmod(0o755)
        configuration = _configure(folder)
        slurm = Slurm({**own, "PATH": path, "SLURM_CONF": str(configuration)})
        munge = [f"--{option}={folder}/munge/{option}" for option in ("key-file", "socket", "pid-file", "seed-file")]
        started = [
            daemons.enter_context(_daemon(command, folder, slurm.environment))
            for command in (
                ("munged", "--foreground", *munge, f"--log-file={folder}/munge/log"),
                ("slurmctld", "-D", "-c", "-f", str(configuration)),
                *(("slurmd", "-D", "-N", node, "-f", str(configuration)) for node in NODES),
            )
        ]
        wait_until(lambda: _ready(slurm, started, folder), "two idle nodes")
        yield slurm
        slurm.run("scancel", "--user", _user())
        wait_until(lambda: not slurm.run("squeue", "--noheader"), "an empty queue")


def _configure(folder: Path) -> Path:
    """Write munge's key and the configuration."""
    (folder / "munge").mkdir(mode=0o755)
    key = folder / "munge" / "key-file"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    host = socket.gethostname().split(".")[0]
    controller, *ports = _free_ports(1 + len(NODES))
    size = f"NodeHostname={host} CPUs={PROCESSORS} RealMemory=4000"
    nodes = [f"NodeName={name} NodeAddr={name} Port={port} {size}" for name, port in zip(NODES, ports, strict=True)]
    path = folder / "slurm.conf"
    template = Path(__file__).with_name("slurm.conf").read_text()
    values = {"host": host, "user": _user(), "controller": controller, "nodes": "\n".join(nodes), "folder": folder}
    path.write_text(template.format(**values))
    return path


def _free_ports(count: int) -> list[int]:
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in sockets]


@contextmanager
def _daemon(command: tuple[str, ...], folder: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    # It ends with pytest, even when that is killed.
    whole = ["setpriv", "--pdeathsig", "TERM", *command]
    with (folder / f"{command[0]}.out").open("ab") as out:
        process = subprocess.Popen(whole, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def _ready(slurm: Slurm, daemons: list[subprocess.Popen[bytes]], folder: Path) -> bool:
    """Whether all nodes are idle; a daemon that ended raises with what it printed."""
    for daemon in daemons:
        if daemon.poll() is not None:
            printed = "".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.out")))
            raise RuntimeError(f"{daemon.args}: ended with exit code {daemon.returncode}\n{printed[-4000:]}")
    try:
        states = slurm.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()
    except RuntimeError:  # The controller does not listen yet.
        return False
    return states == ["idle"] * len(NODES)


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name
