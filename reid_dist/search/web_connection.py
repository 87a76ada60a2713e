"""A connection to the web page: who opens one must ask for something, or make room for others."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 10.0


class Connection(H11Protocol):
    """HTTP as uvicorn speaks it, but closed when the head of a request has not arrived after `IDLE_SECONDS`.

    They count from the connection, and again from every answer. uvicorn itself waits for the first request without
    end, and after a part of a later one: whoever opened a few hundred connections and said nothing would keep everyone
    else out, and needs no token for that.
    """

    _deadline: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first request is waited for."""
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        """The next one is waited for, or begins at once where it has arrived already."""
        self._deadline.cancel()
        self._wait()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(IDLE_SECONDS, self._close_idle)

    def _close_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:  # else on_response_complete comes
            self.transport.close()
