"""After the engine's process crashed by itself (an exception of ours, no fault of the chip): which request did that?

Every open request is a suspect. The next engine gets them one after the other, each when the one before has said something; the one on
trial when the process crashes again did it, and is refused. All others go on, so one request cannot end the service of the rest. No torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from bascule.serve.inflight import Ticket


class Suspects:
    """`hand_over(ticket)` gives one to the engine."""

    def __init__(self, hand_over: Callable[[Ticket], None]) -> None:
        self._hand_over = hand_over
        self._waiting: deque[Ticket] = deque()
        self.on_trial: Ticket | None = None

    @property
    def pending(self) -> bool:
        return bool(self._waiting) or self.on_trial is not None

    def accuse(self, tickets: Iterable[Ticket]) -> Ticket | None:
        """The engine crashed with these open. Returns the one that was on trial; the others wait for `begin`."""
        guilty, self.on_trial = self.on_trial, None
        self._waiting = deque(one for one in tickets if one is not guilty)
        return guilty

    def begin(self) -> None:
        """An engine is there: the next one's trial."""
        while self._waiting and self.on_trial is None:
            ticket = self._waiting.popleft()
            if ticket.open:  # its reader may have left meanwhile
                self.on_trial = ticket
                self._hand_over(ticket)

    def take(self, ticket: Ticket) -> None:
        """A new request: at once, or behind the suspects."""
        if self.pending:
            self._waiting.append(ticket)
        else:
            self._hand_over(ticket)

    def clear(self, ticket: Ticket) -> None:
        """It said something, or is gone."""
        if ticket is self.on_trial:
            self.on_trial = None
            self.begin()
