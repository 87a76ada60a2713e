"""How many bad samples a run puts up with."""

from collections.abc import Sequence
from typing import Any

from reid_dist.errors import UserError

# Early in a run a share means little: one bad sample in the first batch is no sign that the whole set is bad.
_SLACK = 10
_NAMED = 3
_KEPT = 100


class BadSamples:
    """Counts the samples that could not be read and were replaced, and stops the run when they are too many.

    A fraction of 0 stops at the first one. Any other allows that share of the samples read so far and ten more, since
    the first few hundred samples say little about a share. Each process counts what it reads itself; a sample that is
    met again in a later epoch counts again, as do the samples read.

    Attributes:
        max_fraction: 0 to 1.
        seen: samples read so far, the replaced ones included.
        count: how many of them were replaced.
        messages: one line for each of the first hundred different ones, naming set, shard and key.

    Args:
        max_fraction: share of the samples that may be bad.

    Raises:
        UserError: the fraction is not in 0 to 1.
    """

    def __init__(self, max_fraction: float = 0.0) -> None:
        if not 0 <= max_fraction <= 1:
            raise UserError(f"data.max_bad_fraction: {max_fraction} is not a share; give a number from 0 to 1")
        self.max_fraction = max_fraction
        self.seen = 0
        self.count = 0
        self.messages: list[str] = []

    def state(self) -> dict[str, Any]:
        """What was counted, for a checkpoint: JSON-able."""
        return {"seen": self.seen, "count": self.count, "messages": self.messages}

    def take_over(self, state: dict[str, Any]) -> None:
        """Counts what `state` gave, here or on another rank, as if it had been read here."""
        self.seen += state["seen"]
        self.count += state["count"]
        self.messages = list(dict.fromkeys([*self.messages, *state["messages"]]))[:_KEPT]

    def add(self, seen: int, messages: Sequence[str]) -> None:
        """Count a batch: how many samples it took, and one line for each of them that had to be replaced.

        Raises:
            UserError: more are bad than allowed; names the first ones.
        """
        self.seen += seen
        self.count += len(messages)
        self.messages = list(dict.fromkeys([*self.messages, *messages]))[:_KEPT]
        if self.count > (self.max_fraction * self.seen + _SLACK if self.max_fraction else 0):
            raise UserError(self._verdict())

    def _verdict(self) -> str:
        named = "; ".join(self.messages[:_NAMED])
        if not self.max_fraction:
            return named
        more = "; and others" if len(self.messages) > _NAMED else ""
        return (
            f"data: {self.count} of {self.seen} samples read are bad, more than data.max_bad_fraction "
            f"{self.max_fraction:g} allows: {named}{more}"
        )
