"""`launch/environment.sh` where something is absent: one line with the command and exit code 2, or it is installed."""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = (
    "bash", "dirname", "cat", "cut", "flock", "find", "grep", "mkdir", "mv", "rm", "sha256sum", "sleep", "touch",
)  # fmt: skip

# Interpreters of this machine: "old" is too old, "venv" and "headers" say whether a package's files are there. A made
# environment gets the same interpreter, which notes what pip and DeepSpeed are asked for.
PYTHON = """
state={state}
case "$*" in
    *version_info\\ *) [ ! -f $state/old ] ;;
    *version_info*) echo 3.9 ;;
    *ensurepip*) [ -f $state/venv ] ;;
    *Python.h*) [ -f $state/headers ] ;;
    "-m venv "*)
        rm -rf .venv
        mkdir -p .venv/bin
        echo "#!$PWD/.venv/bin/python" >.venv/bin/pip
        cat "$0" >.venv/bin/python
        {chmod} 755 .venv/bin/python
        echo venv >>$state/log ;;
    "-m pip install"*) echo pip >>$state/log ;;
    "")
        echo compile >>$state/log
        folder=$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm
        mkdir -p $folder
        [ ! -f $folder/lock ] || {{ echo "waits for ever" >&2; exit 1; }}
        touch $folder/lock
        [ ! -f $state/broken ] || {{ echo "fatal error: a page of the compiler" >&2; exit 1; }}
        touch $folder/deepspeed_shm_comm.so ;;
esac
"""
# apt-get notes what it is asked for and, where it works, brings everything.
APT = 'echo "$@" >>{state}/apt; [ ! -f {state}/apt_works ] || touch {state}/venv {state}/headers'


class Machine:
    """A copy of the launch folder and a PATH that has only what is named, a package manager and a user by number."""

    def __init__(self, folder: Path, present: str, state: str = "venv headers", user: int = 1000) -> None:
        self.project, self.programs, self.state = folder / "project", folder / "bin", folder / "state"
        shutil.copytree(ROOT / "launch", self.project / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.project)
        self.programs.mkdir()
        self.state.mkdir()
        for name in state.split():
            (self.state / name).touch()
        for name in TOOLS:
            found = shutil.which(name)
            assert found, name
            (self.programs / name).symlink_to(found)
        python = PYTHON.format(state=self.state, chmod=shutil.which("chmod"))
        bodies = {name: python for name in present.split() if name.startswith("python")}
        bodies |= {name: "exit 0" for name in present.split() if name not in bodies}
        bodies |= {"id": f"echo {user}", "apt-get": APT.format(state=self.state)}
        for name, body in bodies.items():
            script = self.programs / name
            script.write_text(f"#!{shutil.which('bash')}\n{body}\n")
            script.chmod(0o755)

    def set_up(self, project: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = ["bash", "launch/environment.sh", "--cpu"]
        environment = {"PATH": str(self.programs)}
        return subprocess.run(command, cwd=project or self.project, env=environment, capture_output=True, text=True)

    def log(self) -> list[str]:
        """What was made, in order."""
        file = self.state / "log"
        return file.read_text().split() if file.exists() else []


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a set-up that stops."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr.strip()


@pytest.mark.parametrize(
    ("present", "state", "absent"),
    [
        ("git python3", "venv headers", "g++"),
        ("git g++", "", "python3 python3-venv python3-dev"),
        ("", "", "python3 python3-venv python3-dev git g++"),
        ("git g++ python3", "venv", "python3-dev"),
        ("git g++ python3", "headers", "python3-venv"),
        ("git g++ python3.12", "", "python3.12-venv python3.12-dev"),
    ],
)
def test_a_user_is_told_the_command(tmp_path: Path, present: str, state: str, absent: str) -> None:
    machine = Machine(tmp_path, present, state)
    assert refused(machine.set_up()) == f"environment.sh: run: sudo apt-get install -y {absent}"
    assert not (machine.project / ".venv").exists()
    assert not (machine.state / "apt").exists()


def test_a_python_that_is_too_old_is_told(tmp_path: Path) -> None:
    line = refused(Machine(tmp_path, "git g++ python3", "old venv headers", user=0).set_up())
    assert "python3 is 3.9, older than 3.10" in line
    assert "apt-get install -y python3.12 python3.12-venv python3.12-dev" in line


def test_root_installs_what_is_absent_and_checks_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "git g++ python3", "apt_works", user=0)
    assert machine.set_up().returncode == 0
    assert (machine.state / "apt").read_text().endswith("--no-install-recommends python3-venv python3-dev\n")
    assert machine.log() == ["venv", "pip", "compile"]


def test_what_apt_did_not_bring_is_told(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "git g++ python3", "venv", user=0)
    assert refused(machine.set_up()) == "environment.sh: still absent after apt-get install: python3-dev"


def test_the_second_time_nothing_is_done(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "git g++ python3")
    assert machine.set_up().returncode == 0
    again = machine.set_up()
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert machine.log() == ["venv", "pip", "compile"]


def test_changed_requirements_are_installed_into_the_same_environment(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "git g++ python3")
    machine.set_up()
    with (machine.project / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert machine.set_up().returncode == 0
    assert machine.log() == ["venv", "pip", "compile", "pip"]


def test_an_environment_without_its_interpreter_is_made_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "git g++ python3")
    machine.set_up()
    python = machine.project / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python3.9")
    assert machine.set_up().returncode == 0
    assert machine.log() == ["venv", "pip", "compile"] * 2


def test_a_copied_folder_gets_its_own_environment(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "git g++ python3")
    machine.set_up()
    copy = tmp_path / "copy"
    shutil.copytree(machine.project, copy)
    assert machine.set_up(copy).returncode == 0
    assert machine.log() == ["venv", "pip", "compile"] * 2
    assert str(copy) in (copy / ".venv/bin/pip").read_text()


def test_a_folder_with_a_space_is_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "git g++ python3")
    machine.project.rename(tmp_path / "my project")
    assert "my project: " in refused(machine.set_up(tmp_path / "my project"))


def test_two_set_ups_at_once_make_one_environment(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "git g++ python3")
    with (machine.project / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["bash", "launch/environment.sh", "--cpu"]
        environment = {"PATH": str(machine.programs)}
        pair = [subprocess.Popen(command, cwd=machine.project, env=environment, stdout=subprocess.PIPE) for _ in "ab"]
        for process in pair:
            assert process.stdout is not None
            assert b"waiting for another set-up" in process.stdout.readline()
        assert machine.log() == []
    for process in pair:
        process.communicate(timeout=20)
        assert process.returncode == 0
    assert machine.log() == ["venv", "pip", "compile"]


def test_collectives_that_do_not_compile_are_told_in_one_line(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "git g++ python3", "venv headers broken")
    line = refused(machine.set_up())
    log = ".venv/build_collectives.log"
    assert all(word in line for word in ("g++", "Python.h", log))
    assert "a page of the compiler" in (machine.project / log).read_text()


def test_a_killed_build_is_taken_up_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "git g++ python3", "venv headers broken")
    assert machine.set_up().returncode == 2
    (machine.state / "broken").unlink()
    assert machine.set_up().returncode == 0
    assert machine.log() == ["venv", "pip", "compile", "compile"]


def test_a_lock_left_by_a_killed_training_is_removed(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "git g++ python3")
    machine.set_up()
    lock = machine.project / ".venv/torch_extensions/deepspeed_shm_comm/lock"
    machine.set_up()
    assert lock.exists()  # young: somebody may hold it
    os.utime(lock, (0, 0))
    machine.set_up()
    assert not lock.exists()
    assert machine.log() == ["venv", "pip", "compile"]


def test_collectives_of_another_torch_are_compiled_again(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "git g++ python3")
    machine.set_up()
    (machine.project / ".venv/lib/python3.11/site-packages/torch-9.9.dist-info").mkdir(parents=True)
    assert machine.set_up().returncode == 0
    assert machine.log() == ["venv", "pip", "compile", "compile"]


def test_scripts_are_read_by_bash() -> None:
    for script in sorted((ROOT / "launch").glob("*.sh")):
        assert subprocess.run(["bash", "-n", str(script)], env=os.environ).returncode == 0
