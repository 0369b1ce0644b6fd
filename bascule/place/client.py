"""The trainer's side of the rollout engine: ask over a unix socket, wait, ask again when the engine was restarted. No torch.

One message is one line of JSON. A reply is a pure function of its request, so asking the restarted engine again is exact.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bascule import errors
from bascule.errors import BasculeError, DeviceFault
from bascule.records import Completion, RolloutReply, RolloutRequest

LINE_LIMIT = 1 << 30
SETTLE_S = 0.3  # a process that is dying closes its connections before its listener; knocking at once would meet it again


class RolloutClient:
    """`patience_s` bounds one question, restarts of the engine included; `tries` bounds how often an engine may die over it.

    `on_wait` is called about once a second while the engine works, so that a waiting trainer still shows that it lives.
    """

    def __init__(
        self,
        path: Path,
        *,
        patience_s: float = 300.0,
        tries: int = 3,
        on_wait: Callable[[], None] | None = None,
    ) -> None:
        self.path = path
        self.patience_s = patience_s
        self.tries = tries
        self.on_wait = on_wait
        self.retried = 0
        self._connection: socket.socket | None = None

    def sample(self, request: RolloutRequest) -> RolloutReply:
        """Raises what the engine reported (NonFiniteLogits, SnapshotError, OutOfMemory, ...), or DeviceFault for silence."""
        found = self._ask({"do": "sample", "request": vars(request)})["reply"]
        completions = [Completion(**item) for item in found["completions"]]
        return RolloutReply(**{**found, "completions": completions})

    def hello(self) -> dict[str, Any]:
        """Who answers: pool, accelerator, process id, version of the weights."""
        return dict(self._ask({"do": "hello"})["hello"])

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        deadline = time.monotonic() + self.patience_s
        died = 0
        while True:
            connection = self._connect(deadline)
            try:
                connection.settimeout(30.0)
                connection.sendall(line)
                connection.settimeout(1.0)
                answer = self._receive(connection, deadline)
            except (ConnectionError, TimeoutError):
                self.close()
                died += 1
                self.retried += 1
                if died >= self.tries:
                    raise DeviceFault(
                        f"The rollout engine at '{self.path}' died {died} times over one request. Its log lies in the run's logs/ folder."
                    ) from None
                time.sleep(SETTLE_S)
                continue
            if answer.get("ok"):
                return answer
            raise _error_from(answer["error"])

    def _connect(self, deadline: float) -> socket.socket:
        if self._connection is not None:
            return self._connection
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(1.0)
            try:
                connection.connect(str(self.path))
            except (FileNotFoundError, ConnectionRefusedError, TimeoutError, BlockingIOError):
                connection.close()
                self._wait(deadline, "is not there")
                time.sleep(0.1)
                continue
            self._connection = connection
            return connection

    def _receive(self, connection: socket.socket, deadline: float) -> dict[str, Any]:
        """One line. Raises ConnectionResetError when the engine ends first, DeviceFault when the deadline passes."""
        received = bytearray()
        while not received.endswith(b"\n"):
            try:
                block = connection.recv(1 << 20)
            except TimeoutError:
                self._wait(deadline, "did not answer")
                continue
            if not block:
                raise ConnectionResetError
            received += block
            if len(received) > LINE_LIMIT:
                raise DeviceFault(
                    f"The rollout engine at '{self.path}' sent a line of more than {LINE_LIMIT} bytes."
                )
        answer: dict[str, Any] = json.loads(received)
        return answer

    def _wait(self, deadline: float, what: str) -> None:
        if self.on_wait is not None:
            self.on_wait()
        if time.monotonic() > deadline:
            self.close()
            raise DeviceFault(
                f"The rollout engine at '{self.path}' {what} within {self.patience_s:g} s. Its log lies in the run's logs/ folder; "
                "running the same command again resumes the run."
            )


def _error_from(report: dict[str, str]) -> BasculeError:
    """The error the engine named, if it is one of ours that takes a message alone; else a DeviceFault with the same words."""
    found = getattr(errors, report["kind"], DeviceFault)
    if (
        not (isinstance(found, type) and issubclass(found, BasculeError))
        or found is errors.ChipCondemned
    ):
        found = DeviceFault
    return found(f"{report['message']} (rollout engine on pool '{report['pool']}')")
