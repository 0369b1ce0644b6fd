"""`bascule serve --engine`: the owner's own engine on the exported model. Nobody can reach it before it was examined: it listens on a
port of its own, and ours opens, passing bytes through, once it is admitted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bascule.config.environment import whole_environment
from bascule.config.model import ModelConfig
from bascule.errors import CheckFailed, DeviceFault, UsageError
from bascule.infer.reference import Reference
from bascule.serve.admission import Finding, examine, prompts
from bascule.serve.engines import Engine

START_S = 900.0
DRAIN_S = 30.0
BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class Plan:
    """What is started: `engine` of the environment whose interpreter is `python`, on `folder`, with the owner's `extra` words."""

    engine: Engine
    python: str
    folder: Path
    config: ModelConfig
    name: str
    extra: Sequence[str] = ()
    api_key: str | None = None


async def serve(
    plan: Plan,
    reference: Reference,
    questions: Sequence[Sequence[int]],
    listener: socket.socket,
    log: Path,
    *,
    on_finding: Callable[[Finding], None],
) -> None:
    """Until SIGTERM or Ctrl-C. Who connects to `listener` before the engine is admitted waits.

    Raises CheckFailed when the engine does not compute the model, DeviceFault when it does not start or dies, SystemExit when a signal
    comes before it is admitted. The engine and whatever it started end with this call, however that ends.
    """
    stop: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, _tell, stop, name)
    port = _free_port()
    process = await _start(plan, port, log)
    try:
        finding = await _unless(stop, _examined(plan, reference, questions, port, process, log))
        on_finding(finding)
        if not finding.accepted:
            raise CheckFailed(finding.told(plan.engine.name, plan.engine.cure(plan.config)))
        await _pass_through(listener, port, process, log, stop)
    finally:
        await _end(process)


def _tell(stop: asyncio.Future[int], number: int) -> None:
    if not stop.done():
        stop.set_result(number)


async def _unless(stop: asyncio.Future[int], work: Coroutine[Any, Any, Finding]) -> Finding:
    task = asyncio.create_task(work)
    both: set[asyncio.Future[Any]] = {task, stop}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if stop.done():
        task.cancel()
        raise SystemExit(128 + stop.result())
    return task.result()


async def _examined(
    plan: Plan,
    reference: Reference,
    questions: Sequence[Sequence[int]],
    port: int,
    process: asyncio.subprocess.Process,
    log: Path,
) -> Finding:
    url = f"http://127.0.0.1:{port}"
    await _until_healthy(url, process, log)
    return await asyncio.to_thread(
        examine,
        lambda prompt, tokens: plan.engine.ask(url, plan.api_key, plan.name, prompt, tokens),
        reference,
        prompts(reference, questions),
    )


async def _start(plan: Plan, port: int, log: Path) -> asyncio.subprocess.Process:
    command = plan.engine.command(plan.python, plan.folder, plan.config, name=plan.name, port=port)
    environment = whole_environment() | plan.engine.environment(plan.config, plan.api_key)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        try:
            return await asyncio.create_subprocess_exec(
                *command,
                *plan.extra,
                stdout=file,
                stderr=file,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise UsageError(
                f"The interpreter '{plan.python}' cannot be started ({error.strerror}). Give the python of the environment that has {plan.engine.name}."
            ) from None


async def _until_healthy(url: str, process: asyncio.subprocess.Process, log: Path) -> None:
    end = asyncio.get_running_loop().time() + START_S
    while not await asyncio.to_thread(_healthy, url):
        if process.returncode is not None:
            raise DeviceFault(
                f"The engine ended with exit code {process.returncode} before it answered: '{_last_line(log)}'. The rest is in {log}."
            )
        if asyncio.get_running_loop().time() > end:
            raise DeviceFault(f"The engine did not answer within {START_S:g} s. See {log}.")
        await asyncio.sleep(0.5)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


async def _pass_through(
    listener: socket.socket,
    port: int,
    process: asyncio.subprocess.Process,
    log: Path,
    stop: asyncio.Future[int],
) -> None:
    """Bytes both ways until told to stop; then open connections get DRAIN_S to end."""
    open_ones: set[asyncio.Task[None]] = set()

    async def splice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_ones.add(task)
        task.add_done_callback(open_ones.discard)
        with contextlib.suppress(ConnectionError):
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(_copy(reader, inner_writer), _copy(inner_reader, writer))

    async with await asyncio.start_server(splice, sock=listener) as server:
        ended = asyncio.create_task(process.wait())
        await asyncio.wait({ended, stop}, return_when=asyncio.FIRST_COMPLETED)
        server.close()
        if not stop.done():
            raise DeviceFault(
                f"The engine ended with exit code {ended.result()}: '{_last_line(log)}'. The rest is in {log}."
            )
        ended.cancel()
        if open_ones:
            await asyncio.wait(open_ones, timeout=DRAIN_S)
        for task in open_ones:
            task.cancel()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while block := await reader.read(BLOCK_BYTES):
            writer.write(block)
            await writer.drain()
    finally:
        writer.close()


async def _end(process: asyncio.subprocess.Process) -> None:
    """The engine, then whatever it started and left behind: vLLM's workers outlive a parent that is killed, with their share of the chip."""
    if process.returncode is None:
        process.terminate()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), DRAIN_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # it began a session of its own
    await process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
