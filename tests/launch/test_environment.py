"""`launch/environment.sh` on a machine that lacks something: one line with the command, exit code 2, nothing made."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bare_machine(tmp_path: Path, present: list[str], user: str) -> tuple[Path, Path]:
    """A copy of the launch folder and a PATH that has only `present`, a package manager and a user of our choice."""
    project, programs = tmp_path / "project", tmp_path / "bin"
    shutil.copytree(ROOT / "launch", project / "launch")
    shutil.copy(ROOT / "pyproject.toml", project)
    programs.mkdir()
    for name in ("bash", "dirname", "cat", "sha256sum", "cut", *present):
        found = shutil.which(name)
        assert found, name
        (programs / name).symlink_to(found)
    for name, body in (("id", f"echo {user}"), ("apt-get", f'echo "$@" >>{tmp_path}/asked; exit 0')):
        script = programs / name
        script.write_text(f"#!{shutil.which('bash')}\n{body}\n")
        script.chmod(0o755)
    return project, programs


@pytest.mark.parametrize(
    ("present", "absent"),
    [(["git", "python3"], "g++"), (["git", "g++"], "python3 python3-venv python3-dev"), ([], "git")],
)
def test_a_user_is_told_the_command(tmp_path: Path, present: list[str], absent: str) -> None:
    project, programs = bare_machine(tmp_path, present, user="1000")
    result = subprocess.run(
        ["bash", "launch/environment.sh"], cwd=project, env={"PATH": str(programs)}, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "sudo apt-get install -y" in result.stderr
    assert absent in result.stderr
    assert not (project / ".venv").exists()


def test_root_installs_what_is_absent(tmp_path: Path) -> None:
    project, programs = bare_machine(tmp_path, ["git"], user="0")
    result = subprocess.run(
        ["bash", "launch/environment.sh"], cwd=project, env={"PATH": str(programs)}, capture_output=True, text=True
    )
    assert "g++" in (tmp_path / "asked").read_text()
    # This machine's apt-get only pretends, so no Python appears: that is told, too.
    assert result.returncode == 2
    assert "older than 3.10" in result.stderr
