"""Two hosts on this machine: namespaces with a name, a network card, processes and an sshd of their own.

They have no names in the system: all of a host is gone when its first process ends, at the latest with pytest.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}
ROOT = Path(__file__).parents[2]
# Debian puts daemons where an ordinary user's PATH does not look.
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
ADDRESSES = {"node-a": "10.201.77.1", "node-b": "10.201.77.2"}
UNSHARE = ("unshare", "--net", "--mount", "--uts", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc")
# What the first process of a host does; it lives as long as the host, and takes in the orphans.
FIRST = """
set -e
hostname {name}
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
echo ready
read -r wired
ip address add {address}/24 dev eth0
ip link set eth0 up
/usr/sbin/sshd -D -e -f {folder}/sshd_config &
echo listening
wait
"""
SSHD = """\
ListenAddress 0.0.0.0
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
SetEnv PATH={path} DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR={extensions}
"""
SSH = """\
IdentityFile {folder}/user_key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


@dataclass(frozen=True)
class Host:
    """A host that runs.

    Attributes:
        name: what `hostname` says there, and both hosts resolve.
        first: number, outside, of its first process.
        programs: folder that comes first on PATH: an `ssh` that knows the way to the other host.
    """

    name: str
    first: int
    programs: Path

    def command(self, *words: str) -> list[str]:
        """Runs there what is given, which ends when this is killed; what that has started goes with the host."""
        namespaces = ("--net", "--mount", "--uts", "--pid", "--ipc", f"--wdns={ROOT}")
        return ["nsenter", "--target", str(self.first), *namespaces, "setpriv", "--pdeathsig", "KILL", *words]

    def run(self, *words: str, timeout_s: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        """Output and exit code of a command on this host, in the folder of the repository."""
        with self.start(*words, **environment) as process:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def start(self, *words: str, **environment: str) -> "subprocess.Popen[str]":
        """As `run`, without waiting."""
        launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        own = {name: value for name, value in os.environ.items() if name not in launcher}
        own |= {"PATH": f"{self.programs}:{PATH}", **environment}
        return subprocess.Popen(
            self.command(*words), cwd=ROOT, env=own, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def cut(self) -> None:
        """Takes the cable out, without a word to either side."""
        self._link("down")

    def mend(self) -> None:
        """Puts it back in."""
        self._link("up")

    def processes(self) -> list[str]:
        """Command lines of what runs there beside its first process and sshd."""
        lines = self.run("ps", "-eo", "stat=,args=").stdout.splitlines()
        own = ("bash -c", "/usr/sbin/sshd", "sshd:", "ps -eo")
        return [text for state, _, text in (line.partition(" ") for line in lines) if _is_foreign(state, text, own)]

    def _link(self, state: str) -> None:
        subprocess.run(self.command("ip", "link", "set", "eth0", state), check=True, env={"PATH": PATH}, timeout=20)


def _is_foreign(state: str, text: str, own: tuple[str, ...]) -> bool:
    return not state.startswith("Z") and not text.strip().startswith(own)


@pytest.fixture(scope="session")
def hosts() -> Iterator[list[Host]]:
    """node-a and node-b, wired to each other; skips where one may not have them."""
    _skip_without_rights()
    # As with munge in tests/slurm: not pytest's folder, whose names may be long or hold spaces.
    with tempfile.TemporaryDirectory(prefix="hosts-", dir="/tmp") as name, ExitStack() as running:
        folder = Path(name)
        _write_files(folder)
        firsts = [running.enter_context(_host(name, folder)) for name in ADDRESSES]
        inside = [_only_child(first.pid) for first in firsts]
        wire = ("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(inside[1]))
        subprocess.run(["nsenter", "--target", str(inside[0]), "--net", *wire], check=True, env={"PATH": PATH})
        for first in firsts:
            assert first.stdin is not None and first.stdout is not None
            first.stdin.write("wired\n")
            first.stdin.flush()
            assert first.stdout.readline() == "listening\n", (folder / "said").read_text()
        found = [Host(name, pid, folder / "programs") for name, pid in zip(ADDRESSES, inside, strict=True)]
        _wait_for_ssh(found)
        yield found


def _skip_without_rights() -> None:
    missing = [f"{name} ({package})" for name, package in PROGRAMS.items() if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here; Debian: apt-get install --no-install-recommends <the package>")
    probe = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no right to make namespaces, which root has outside of containers: {probe.stderr.strip()}")


def _write_files(folder: Path) -> None:
    for key in ("host_key", "user_key"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(folder / key)]
        subprocess.run(keygen, check=True, timeout=20)
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in ADDRESSES.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR", str(ROOT / ".venv" / "torch_extensions"))
    values = {"folder": folder, "path": PATH, "extensions": extensions}
    (folder / "sshd_config").write_text(SSHD.format(**values))
    (folder / "ssh_config").write_text(SSH.format(**values))
    (folder / "programs").mkdir()
    ssh = folder / "programs" / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder}/ssh_config "$@"\n')
    ssh.chmod(0o755)


@contextmanager
def _host(name: str, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    script = FIRST.format(name=name, address=ADDRESSES[name], folder=folder)
    # It ends with pytest, even when that is killed.
    whole = ["setpriv", "--pdeathsig", "KILL", *UNSHARE, "bash", "-c", script]
    with (folder / "said").open("a") as said:
        process = subprocess.Popen(
            whole, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env={"PATH": PATH}
        )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", (folder / "said").read_text()
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


def _only_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def _wait_for_ssh(hosts: list[Host]) -> None:
    deadline = time.monotonic() + 20
    for host, other in (hosts, hosts[::-1]):
        while (answer := host.run("ssh", other.name, "hostname")).stdout != f"{other.name}\n":
            if time.monotonic() > deadline:
                raise TimeoutError(f"{host.name} cannot reach the sshd of {other.name}: {answer.stderr}")
            time.sleep(0.1)
