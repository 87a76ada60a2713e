"""Where every rank is, in a store of the watchdogs' own: collectives cannot tell it while they hang."""

import os
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from reid_dist import distributed

_SILENT_S = 2.0
_CONNECT = timedelta(seconds=60)
_ALARM = "alarm"


@dataclass(frozen=True)
class Position:
    """How far a rank is.

    Attributes:
        stage: stages begun before: steps count from 0 in each.
        step: of the stage.
        count: of the phases within the step.
        phase: its name.
    """

    stage: int
    step: int
    count: int
    phase: str

    @property
    def order(self) -> tuple[int, int, int]:
        """Greater for a rank that is further."""
        return self.stage, self.step, self.count

    def __str__(self) -> str:
        return f"step {self.step}, phase {self.phase}"


class Doing(IntEnum):
    """What keeps a rank where it is."""

    WORK = 0
    WAITING = 1  # for other ranks
    PAUSE = 2  # of the watchdog's


@dataclass
class _Peer:
    """What was last heard of another rank."""

    position: Position
    doing: Doing
    beat: int
    heard_at: float

    @property
    def silent(self) -> bool:
        return time.monotonic() - self.heard_at > _SILENT_S


class Heartbeats:
    """Exchanges positions through a TCPStore that rank 0 keeps in a thread without Python; collective to make."""

    def __init__(self) -> None:
        self.alarmed = False
        self._rank, self._ranks = distributed.rank(), distributed.world_size()
        self._store = _open_store() if self._ranks > 1 else None
        self._beat = 0
        self._answered_at = time.monotonic()
        self._peers: dict[int, _Peer] = {}
        self._raise_alarm = False
        self._alarm_raised = threading.Event()
        self._speaks = True  # where nobody can be asked

    def exchange(self, position: Position, doing: Doing, read: bool) -> bool:
        """Publishes this rank's position and reads the others'; may block for ever. False when there is no store.

        Args:
            position: of this rank.
            doing: of this rank.
            read: whether the others' positions are wanted; without, only an alarm is.
        """
        if self._store is None:
            return False
        self._beat += 1
        raising = self._raise_alarm
        here = f"{int(doing)} {self._beat} {position.stage} {position.step} {position.count} {position.phase}"
        try:
            self._store.set(str(self._rank), here)
            raised = self._store.add(_ALARM, int(raising))
            self._answered_at = time.monotonic()
            if read:
                self._read()
        except RuntimeError:  # rank 0 has ended: collectives say so
            return False
        if raising:
            self._speaks = raised == 1
            self._raise_alarm = False
            self._alarm_raised.set()
        self.alarmed = raised > 0
        return True

    def alarm(self) -> bool:
        """Lets the next `exchange` tell all ranks to end; True when this rank is the first, or cannot know."""
        self._raise_alarm = self._store is not None
        if self._raise_alarm:
            self._alarm_raised.wait(1.0)
        return self._speaks

    def excused(self) -> bool:
        """Whether another rank is in a pause, as far as this one knows: it may be what the others wait for."""
        return any(peer.doing == Doing.PAUSE and not peer.silent for peer in self._peers.values())

    def missing(self, here: Position, doing: Doing) -> str:
        """Says which ranks the others wait for, as far as this rank knows.

        Silent ones, else those that wait for nobody, else those that are behind; where all wait, those that went on
        without what the hindmost wait for.
        """
        if self._ranks == 1:
            return "there is no other rank"
        if time.monotonic() - self._answered_at > _SILENT_S:
            return "rank 0, which keeps the heartbeats, did not arrive: it is silent, stopped or cut off"
        known = {self._rank: _Peer(here, doing, 0, time.monotonic()), **self._peers}
        names = {}
        for rank in sorted(set(range(self._ranks)) - known.keys()):
            names[rank] = "never heard of"
        for rank, peer in sorted(known.items()):
            if peer.silent:
                names[rank] = f"in {peer.position}, silent since: stopped or cut off"
        if not names:
            names = {rank: f"in {known[rank].position}" for rank in _awaited(known)}
        if not names:
            return f"all {self._ranks} ranks wait there: the network, or collectives that do not match"
        return "did not arrive: " + "; ".join(f"rank {rank} ({text})" for rank, text in sorted(names.items()))

    def _read(self) -> None:
        assert self._store is not None
        others = [rank for rank in range(self._ranks) if rank != self._rank]
        present = [rank for rank in others if rank in self._peers or self._store.check([str(rank)])]
        if not present:
            return
        now = time.monotonic()
        for rank, text in zip(present, self._store.multi_get([str(rank) for rank in present]), strict=True):
            doing, beat, stage, step, count, phase = text.decode().split(" ", 5)
            last = self._peers.get(rank)
            heard_at = last.heard_at if last is not None and last.beat == int(beat) else now
            position = Position(int(stage), int(step), int(count), phase)
            self._peers[rank] = _Peer(position, Doing(int(doing)), int(beat), heard_at)


def _awaited(known: dict[int, _Peer]) -> list[int]:
    busy = [rank for rank, peer in known.items() if peer.doing != Doing.WAITING]
    if 0 < len(busy) < len(known):
        return busy
    orders = {rank: peer.position.order for rank, peer in known.items()}
    hindmost = min(orders.values())
    if busy:  # all: their stacks do not tell, as on a GPU
        return [rank for rank, order in orders.items() if order == hindmost] if len(set(orders.values())) > 1 else []
    return [rank for rank, order in orders.items() if order > hindmost]


def _open_store() -> TCPStore:
    """The same store on every rank, on a port of its own."""
    host = os.environ["MASTER_ADDR"]
    if distributed.rank() == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=_CONNECT)
        distributed.broadcast_object(store.port)
        return store
    return TCPStore(host, distributed.broadcast_object(None), is_master=False, timeout=_CONNECT)
