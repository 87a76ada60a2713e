"""Ranks that do not meet: one line that names place, rank and remedy, in place of torch's traceback after minutes."""

import multiprocessing
import os
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest
import torch

from reid_dist import distributed
from reid_dist.errors import UserError
from tests.nodes.conftest import Host


def _join(rank: int, address: str, port: int, timeout_s: float) -> str:
    """What a rank of two that joins alone is told; in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try_to_join, args=(rank, address, port, timeout_s, sender))
    process.start()
    try:
        assert receiver.poll(30), "it still waits"
        return str(receiver.recv())
    finally:
        process.kill()
        process.join()


def _try_to_join(rank: int, address: str, port: int, timeout_s: float, sender) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR=address, MASTER_PORT=str(port))
    try:
        distributed.initialize(torch.device("cpu"), timeout_s)
        sender.send("joined")
    except UserError as error:
        sender.send(f"UserError {error}")
    except BaseException as error:
        sender.send(f"{type(error)} {error}")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_name_that_nobody_knows(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_RESOLVE_S", 0.0)
    said = _join(rank, "no-such-host.invalid", 29500, 60)
    assert said.startswith(f"UserError MASTER_ADDR=no-such-host.invalid: rank {rank} on {socket.gethostname()} cannot")
    assert "\n" not in said


def test_a_port_that_another_program_has(taken_port: int) -> None:
    said = _join(0, "127.0.0.1", taken_port, 60)
    assert said.startswith(f"UserError MASTER_ADDR=127.0.0.1 MASTER_PORT={taken_port}: rank 0 of 2 on ")
    assert "another program listens on the port; choose another MASTER_PORT" in said and "\n" not in said


def test_rank_0_does_not_answer() -> None:
    said = _join(1, "127.0.0.1", distributed.free_port(), 1)
    assert said.startswith("UserError MASTER_ADDR=127.0.0.1 ") and "rank 1 of 2" in said
    assert "rank 0 does not answer there" in said and "\n" not in said


def test_the_others_do_not_come() -> None:
    said = _join(0, "127.0.0.1", distributed.free_port(), 1)
    assert said.startswith("UserError MASTER_ADDR=127.0.0.1 ") and "rank 0 of 2" in said
    assert "waited for the others in vain" in said and "1/2 clients joined" in said and "\n" not in said


def test_hosts_that_reach_only_themselves(hosts: list[Host]) -> None:
    """As where a host's own name resolves to 127.0.0.1: the store is found, the other rank is not."""
    join = (
        "import torch; from reid_dist import distributed, errors\n"
        "try: distributed.initialize(torch.device('cpu'), 20)\n"
        "except errors.UserError as error: print(error)"
    )
    meeting = {"MASTER_ADDR": "node-a", "MASTER_PORT": "29400", "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [host.start("python", "-c", join, **meeting, RANK=str(rank)) for rank, host in enumerate(hosts)]
    try:
        # The one with the higher port calls, and is refused at once; the other waits for five timeouts.
        refused = _first_that_ends(ranks, 60)
        said, log = ranks[refused].communicate()
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    who = f"rank {refused} of 2 on {hosts[refused].name}"
    assert f"MASTER_ADDR=node-a MASTER_PORT=29400: {who} met the others there, but cannot" in said, log
    assert "set GLOO_SOCKET_IFNAME" in said and said.count("\n") == 1


def _first_that_ends(ranks: "list[subprocess.Popen[str]]", timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for rank, process in enumerate(ranks):
            if process.poll() is not None:
                return rank
        time.sleep(0.05)
    raise TimeoutError("both ranks still wait")
