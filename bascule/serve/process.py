"""The engine's process as its broker holds it: start it on one chip, say things to it, hear it, end it. No torch here.

Both ways go lines of JSON over a socket pair. A process that ends, writes half a line, or one beyond LINE_LIMIT, is heard as `None`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import Sequence
from typing import Any

from bascule.errors import DeviceFault, ModelFolderError, RecipeError, UsageError

LINE_LIMIT = 1 << 26
# Faults of what was asked, not of a chip: no other pool would do better, and none may be blamed.
ASKED_WRONG = {kind.__name__ for kind in (UsageError, RecipeError, ModelFolderError)}


class EngineProcess:
    """`ready` is what the engine said of itself when it had the model: weights_sha256, slots, context, dtype and so on."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self.ready: dict[str, Any] = {}

    @classmethod
    async def start(
        cls, accelerator: str, arguments: Sequence[str], timeout_s: float
    ) -> EngineProcess:
        """Raises DeviceFault when the chip does not bring an engine up in time, UsageError when what was asked is at fault."""
        here, there = socket.socketpair()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bascule.serve.worker", "--accelerator", accelerator, "--fd", str(there.fileno()), *arguments,
            pass_fds=[there.fileno()], start_new_session=True,
        )  # fmt: skip
        there.close()
        engine = cls(process, *await asyncio.open_connection(sock=here, limit=LINE_LIMIT))
        try:
            first = await asyncio.wait_for(engine.hear(), timeout_s)
        except TimeoutError:
            await engine.end()
            raise DeviceFault(f"'{accelerator}' did not start within {timeout_s:g} s") from None
        except asyncio.CancelledError:  # the server closes: nobody else knows of this process yet
            engine.kill()
            raise
        if first is None or "ready" not in first:
            raise await engine._failed_start(accelerator, first)
        engine.ready = first["ready"]
        return engine

    async def _failed_start(
        self, accelerator: str, first: dict[str, Any] | None
    ) -> DeviceFault | UsageError:
        """What the first message, or an end without one, says against the chip or against what was asked."""
        if first is None:
            fault = {"message": f"its process ended with exit code {await self.code()}"}
        else:
            fault = first["fault"]
        await self.end()
        if fault.get("kind") in ASKED_WRONG:
            return UsageError(fault["message"])
        return DeviceFault(f"'{accelerator}' did not start: {fault['message'].rstrip('.')}")

    async def hear(self) -> dict[str, Any] | None:
        """The next message; None at the end."""
        try:
            line = await self._reader.readline()
            message: dict[str, Any] | None = json.loads(line) if line else None
        except (ConnectionError, ValueError):
            return None
        return message

    @property
    def at_end(self) -> bool:
        """It closed its side. False after `hear` gave None: it lives, but what it wrote is no message."""
        return self._reader.at_eof()

    def say(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def code(self) -> int:
        """Its exit code, as soon as it has one."""
        return await self._process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself a moment ago
            self._process.kill()

    async def end(self) -> None:
        self._writer.close()
        if self._process.returncode is None:
            self.kill()
            await self.code()
