"""Who the others wait for, from where all ranks are and what they do there."""

import time

import pytest

from reid_dist.supervision.heartbeats import Doing, Position, _awaited, _Peer

WORK, WAITING = Doing.WORK, Doing.WAITING
DATA, REDUCE, SAVE = Position(0, 7, 0, "data"), Position(0, 7, 1, "reduce"), Position(0, 7, 2, "save")
NEXT_STEP, NEXT_STAGE = Position(0, 8, 0, "data"), Position(1, 0, 0, "data")


@pytest.mark.parametrize(
    ("where", "awaited"),
    [
        ([(REDUCE, WAITING), (DATA, WORK), (REDUCE, WAITING)], [1]),  # reads
        ([(REDUCE, WAITING), (NEXT_STEP, WORK), (REDUCE, WAITING)], [1]),  # left the collective out, and works
        ([(REDUCE, WAITING), (SAVE, WAITING), (REDUCE, WAITING)], [1]),  # left it out, and waits in the next
        ([(REDUCE, WAITING)] * 3, []),
        ([(REDUCE, WORK), (DATA, WORK), (NEXT_STEP, WORK)], [1]),  # on GPUs no stack tells who waits
        ([(NEXT_STAGE, WORK), (SAVE, WORK)], [1]),  # its steps count from 0
        ([(REDUCE, WORK)] * 2, []),
    ],
)
def test_who_is_awaited(where: list[tuple[Position, Doing]], awaited: list[int]) -> None:
    now = time.monotonic()
    known = {rank: _Peer(position, doing, 1, now) for rank, (position, doing) in enumerate(where)}
    assert _awaited(known) == awaited
