"""Stopping at one step: every rank saves after the same one, whichever rank the signal reached."""

import signal

import torch
import torch.distributed as dist

from reid_dist.distributed import world_size
from reid_dist.supervision.signals import StopRequest


class StopAgreement:
    """Lets all ranks learn of one rank's stop request at the same step; collective to make and to close.

    Its ranks' flags travel while the next step computes, in a process group of their own, so that no step waits.

    Args:
        request: this rank's.
    """

    def __init__(self, request: StopRequest) -> None:
        self._request = request
        self._group: dist.ProcessGroup | None = None
        if world_size() > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        self._work: dist.Work | None = None
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._agreed: str | None = None

    def poll(self) -> str | None:
        """The name of the signal to stop for, or None; every rank calls it after each step and gets the same answer.

        What a rank had heard when it called comes back at the next call, or at this one where there is one rank.
        """
        if self._agreed is None:
            if self._group is None:
                self._agreed = self._request.name
            else:
                self._await()
                self._start()
        return self._agreed

    def agree(self) -> str | None:
        """As `poll`, of what all ranks have heard until now; waits for them."""
        self.poll()
        return self.poll()

    def close(self) -> None:
        """Waits for the flags that are on their way, without looking at them."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _start(self) -> None:
        if self._agreed is None:
            name = self._request.name
            self._flag.fill_(signal.Signals[name] if name else 0)
            self._work = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _await(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None
            if number := int(self._flag):
                self._request.take(number)
                self._agreed = signal.Signals(number).name
