"""Fixtures of the faults: a world with two samples that cannot be read, and the run that nothing happens to."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.rig import Run, end_started


@pytest.fixture(scope="session")
def world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world with one JPEG of `generic` and one of `cuhk_pedes` damaged: counts and replacements are there."""
    root = tmp_path_factory.mktemp("fault_world")
    for name in ("generic", "cuhk_pedes"):
        shutil.copytree(tiny_world / name, root / name)
        spoil_image(sorted((root / name).glob("*.tar"))[0], 3)
    shutil.copy(tiny_world / "vocabulary.txt", root)
    return root


def spoil_image(tar: Path, number: int) -> None:
    """Overwrites the first bytes of a picture."""
    import tarfile

    with tarfile.open(tar) as file:
        pictures = [member for member in file if member.name.endswith((".jpg", ".png"))]
    with tar.open("r+b") as file:
        file.seek(pictures[number].offset_data)
        file.write(b"\0" * 64)


@pytest.fixture(scope="session")
def reference(deepspeed_imported: None, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Never stopped; it saves after every step, to have a digest wherever another run saves."""
    run = Run(tmp_path_factory.mktemp("reference"), world, ["checkpoint.every=1"])
    ended = run.fork()
    assert ended.codes == [0, 0], ended
    return run


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    end_started()


@pytest.fixture
def new_run(reference: Run, tmp_path: Path) -> Callable[..., Run]:
    """`new_run(*overrides)`: a run on the same world in a folder of its own."""
    return lambda *overrides: Run(tmp_path / "victim", reference.world, list(overrides))


# Every fault of reliability.md's list that is met by training; what else is on the list says docs/reliability.md.
FAULTS = (
    *("SIGKILL of a rank", "SIGKILL of the launcher", "SIGTERM to the launcher", "SIGTERM to a rank"),
    *("SIGUSR1 to the launcher", "SIGUSR1 to a rank", "double signal", "signal during a save"),
    *("restart by the supervisor", "kill between stages", "damaged checkpoint", "fallback to an earlier checkpoint"),
    *("wrong --resume", "disk full", "read-only folder", "NaN in one sample", "Inf in one sample"),
    *("NaN in one rank's gradient", "Inf in one rank's gradient", "too many NaN in a row", "loss spike"),
    *("history of the guard survives", "slow rank", "hung rank", "skipped collective", "desync", "out of memory"),
    *("network cut", "clock skew", "damaged shard", "another number of ranks", "a state left out of the checkpoint"),
)
_KILLS = 50
passed: dict[str, bool] = {}  # of each test that was wanted, by its id
kills: set[str] = set()
faults: dict[str, list[str]] = {name: [] for name in FAULTS}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what takes minutes, unless `bash tests/run.sh --faults` asks for it."""
    left_out = [item for item in items if item.get_closest_marker("every") and not os.environ.get("FAULTS_ALL")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Notes what is to be counted."""
    for item in session.items:
        if item.get_closest_marker("kill"):
            kills.add(item.nodeid)
        for mark in item.iter_markers("fault"):
            faults[mark.args[0]].append(item.nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        passed[report.nodeid] = report.passed and passed.get(report.nodeid, True)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With --faults the run is good only if nothing of the list was left out or skipped."""
    if (
        os.environ.get("FAULTS_ALL")
        and session.exitstatus == 0
        and not (all(_survived().values()) and sum(passed.get(test, False) for test in kills) == len(kills) >= _KILLS)
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    if os.environ.get("FAULTS_ALL"):
        survived = _survived()
        missing = [name for name, good in survived.items() if not good]
        if missing:
            print(f"not survived: {', '.join(missing)}")
        good = sum(passed.get(test, False) for test in kills)
        print(f"survived {good} of {len(kills)} kills, {sum(survived.values())} of {len(FAULTS)} faults")


def _survived() -> dict[str, bool]:
    found = {name: bool(tests) and all(passed.get(test, False) for test in tests) for name, tests in faults.items()}
    return found
