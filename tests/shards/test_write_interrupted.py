"""Calls that are killed anywhere, and several at once: the set that comes out is always the same."""

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reid_dist.data.reader import ShardSet
from reid_dist.errors import UserError
from shards.index import main as index_main
from shards.write import main
from shards.writing import files
from shards.writing.files import file_sha256

OPTIONS = ("--allow-mismatch", "--shard-mb", "0.005", "--workers", "1")
COMMAND = (sys.executable, "-m", "shards.write")


def _arguments(root: Path, out: Path, *more: str) -> list[str]:
    return ["market1501", "--root", str(root), "--out", str(out), *OPTIONS, *more]


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.iterdir()}


@pytest.fixture
def whole(market: Path, tmp_path: Path) -> dict[str, str]:
    """Hashes of the files of an uninterrupted call."""
    assert main(_arguments(market, tmp_path / "whole")) == 0
    hashes = _hashes(tmp_path / "whole")
    assert len(hashes) > 6 and {"build.json", "index.npy", "manifest.json"} < hashes.keys()
    return hashes


def _killed(step: int, call: Callable[[], Any]) -> bool:
    """Run a call in a forked process that kills itself before its n-th change of the disk; False: it ended well."""
    child = os.fork()
    if not child:
        steps = itertools.count(1)
        for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (os, "unlink"), (Path, "unlink")):
            original = getattr(module, name)

            def counted(*arguments: Any, original: Callable[..., Any] = original, **options: Any) -> Any:
                if next(steps) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            setattr(module, name, counted)
        os._exit(call())
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_killed_at_every_step(market: Path, tmp_path: Path) -> None:
    """Each call is really killed (SIGKILL) at one step; the next one makes the same set as an undisturbed one."""
    two_shards = ("--shard-mb", "0.012")
    assert main(_arguments(market, tmp_path / "whole", *two_shards)) == 0
    whole = _hashes(tmp_path / "whole")
    assert len(whole) == 5
    out = tmp_path / "a"
    step = 1
    while _killed(step, lambda: main(_arguments(market, out, *two_shards))):
        if "manifest.json" not in {path.name for path in out.iterdir()}:
            with pytest.raises(UserError, match=r"manifest\.json: missing"):
                ShardSet(out)
        else:
            assert len(ShardSet(out)) == 9
        for tar in out.glob("*.tar"):  # what has its name is whole
            assert file_sha256(tar) == whole[tar.name]
        assert main(_arguments(market, out, *two_shards)) == 0
        assert _hashes(out) == whole
        shutil.rmtree(out)
        step += 1
    assert step > 30


def test_killed_again_and_again(market: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """A job that is killed a few steps after every start gets through, as finished shards stay."""
    out = tmp_path / "a"
    killed = 0
    while _killed(random.Random(killed).randint(4, 12), lambda: main(_arguments(market, out))):
        killed += 1
        assert killed < 60
    assert killed > 2
    assert main(_arguments(market, out)) == 0 and _hashes(out) == whole


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_real_processes_with_workers(number: int, market: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """`python -m shards.write` with two workers is ended from outside at different times."""
    arguments = [*COMMAND, *_arguments(market, tmp_path / "a", "--workers", "2")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for delay in (0, 0.4):
        process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment,
        )
        assert process.stdout is not None and "(found / published)" in process.stdout.readline()
        time.sleep(delay)
        process.send_signal(number)
        errors = process.communicate(timeout=30)[1]
        # 0: it was faster.
        ended = -number if number == signal.SIGKILL else 128 + number
        assert process.returncode in (0, ended)
        if process.returncode == 128 + number:
            assert errors.splitlines()[-1].startswith("error: interrupted") and "Traceback" not in errors
            assert not list(tmp_path.rglob("*.partial"))
        assert _gone(process.pid)
    assert main(_arguments(market, tmp_path / "a")) == 0 and _hashes(tmp_path / "a") == whole


def _gone(process: int) -> bool:
    """No process that the call started is left after a moment; they are known by its session."""
    for _ in range(50):
        if not [pid for pid in os.listdir("/proc") if pid.isdigit() and _session(pid) == process]:
            return True
        time.sleep(0.1)
    return False


def _session(pid: str) -> int:
    try:
        return os.getsid(int(pid))
    except ProcessLookupError:
        return 0


def test_parts_at_the_same_time(market: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """Parts that overlap and a call for everything run at once and do not disturb each other."""
    out = tmp_path / "a"
    calls = [("--part", "1/2"), ("--part", "2/2"), ("--part", "2/2"), ()]
    running = [
        subprocess.Popen([*COMMAND, *_arguments(market, out, *more)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for more in calls
    ]
    for process in running:
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 0, output
    assert _hashes(out) == whole


def test_parts_one_after_the_other(
    market: Path, whole: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    assert main(_arguments(market, out, "--part", "2/2")) == 0
    tars = sorted(name for name in whole if name.endswith(".tar"))
    printed = capsys.readouterr().out
    assert f"part 2/2 is written. {(len(tars) + 1) // 2} of {len(tars)} shards are missing ({tars[0]}, " in printed
    assert sorted(path.name for path in out.glob("*.tar")) == tars[1::2]
    assert index_main(["merge", str(out)]) == 2
    error = capsys.readouterr().err
    assert tars[0] in error and tars[1] not in error and error.count("\n") == 1
    command = error.split("`")[1].replace("RAW", str(market)).split()
    assert command[:3] == ["python", "-m", "shards.write"]
    assert main([*command[3:], "--allow-mismatch", "--workers", "1"]) == 0
    assert _hashes(out) == whole
    assert index_main(["merge", str(out)]) == 0  # again: the same
    assert _hashes(out) == whole


def test_merge_by_hand(market: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the last part did not see the others' files (a slow network file system), one merges by hand."""
    out = tmp_path / "a"
    assert main(_arguments(market, out, "--part", "1/2")) == 0
    with monkeypatch.context() as patch:
        patch.setattr("shards.writing.shard_set._finish", lambda out, build, options: None)
        assert main(_arguments(market, out, "--part", "2/2")) == 0
    assert not (out / "manifest.json").exists()
    assert index_main(["merge", str(out)]) == 0
    assert _hashes(out) == whole


def test_damaged_shards_of_an_unfinished_set_are_written_again(
    market: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "a"
    assert main(_arguments(market, out, "--part", "1/2")) == 0
    first, second = sorted(out.glob("*.tar"))[:2]
    first.write_bytes(first.read_bytes()[:-512])
    second.unlink()
    part = next((out / "partial").glob("*.json"))
    part.write_bytes(part.read_bytes()[:-300])
    assert main(_arguments(market, out)) == 0
    assert _hashes(out) == whole


def test_a_killed_worker_is_named(market: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As by the kernel for want of memory: exit code 1 and one line, not a wait without end."""
    pid = os.getpid()
    source = (
        "import os, signal, sys\n"
        "import shards.writing.jpeg\n"
        "def kill(data, name):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ != '__main__':\n"
        "    import shards.writing.convert\n"
        "    shards.writing.convert.clean_image = kill\n"
        "else:\n"
        "    from shards.write import main\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    script = tmp_path / f"script_{pid}.py"
    script.write_text(source)
    arguments = _arguments(market, tmp_path / "a", "--workers", "2")
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert result.returncode == 1
    assert "a worker process ended with exit code -9" in result.stderr and "Traceback" not in result.stderr
    assert main(_arguments(market, tmp_path / "a")) == 0


def test_leftovers_of_the_living_stay(tmp_path: Path) -> None:
    alive = files.Temporary(tmp_path / "a.tar")
    dead = tmp_path / ".a.tar.0123abcd.partial"
    dead.write_bytes(b"x")
    other = tmp_path / ".b.tar.0123abcd.partial"
    other.write_bytes(b"x")
    mine = tmp_path / ".notes.partial"
    mine.write_bytes(b"x")
    files.remove_leftovers(tmp_path, {"a.tar"})
    assert not dead.exists() and other.exists() and mine.exists()
    alive.file.write(b"whole")
    alive.commit()
    alive.discard()
    files.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes.partial", "a.tar"]
    assert (tmp_path / "a.tar").read_bytes() == b"whole"


def test_index_build_killed_at_every_step(pairs: Path, tmp_path: Path) -> None:
    """The same for tars of other software."""
    tars = tmp_path / "tars"
    tars.mkdir()
    for folder in ("00000", "00001"):
        with tarfile.open(tars / f"{folder}.tar", "w") as tar:
            for path in sorted((pairs / folder).iterdir()):
                tar.add(path, arcname=path.name)
    out = tmp_path / "a"
    arguments = ["build", str(tars), "--dataset", "x", "--workers", "1", "--out"]
    assert index_main([*arguments, str(tmp_path / "whole")]) == 0
    whole = _hashes(tmp_path / "whole")
    assert len(whole) == 3
    step = 1
    while _killed(step, lambda: index_main([*arguments, str(out)])):
        if (out / "manifest.json").exists():
            assert len(ShardSet(out)) == 3
        assert index_main([*arguments, str(out)]) == 0
        assert _hashes(out) == whole
        # Again over a finished set: until the end there is none, or a whole one.
        assert _killed(step, lambda: index_main([*arguments, str(out)]))
        if (out / "manifest.json").exists():
            assert len(ShardSet(out)) == 3
        shutil.rmtree(out)
        step += 1
    assert step > 20
