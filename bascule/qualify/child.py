"""The child's side of the battery: open the chip, ask, and write each answer as a JSON line the moment it is known.

Lines: {"opened": {...}} once; {"begin": "exact.matmul[train]"} before each question, so that a crash or a hang names the
question that brought it about; {"busy": true} when the chip begins to compute and {"busy": false} when it is done, so that only its own
silence counts against it; {"progress": [done, total]} now and then from a long one; {"evidence": {...}} for each answer; {"end": name}
after it. Every line is flushed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.errors import DeviceFault, UsageError
from bascule.qualify.check import CHECKS, DTYPES, Ask
from bascule.qualify.disk import EXIT_UNWRITABLE, is_unwritable
from bascule.qualify.examine import examined, open_context, put


def main(request: dict[str, Any]) -> int:
    """Answer the questions listed in `request` (see battery._Run). Returns the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True, name="end-with-parent").start()
    try:
        return _with_answers(request)
    except OSError as error:
        if not is_unwritable(error):
            raise
        return EXIT_UNWRITABLE


def _with_answers(request: dict[str, Any]) -> int:
    with open(request["answers"], "a", encoding="utf-8") as out:

        def write(line: dict[str, Any]) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        return _answer(request, write)


def _answer(request: dict[str, Any], write: Any) -> int:
    try:
        accelerator = open_accelerator(request["accelerator"], seed=request["seed"])
    except (UsageError, DeviceFault) as error:
        write({"refused": str(error), "usage": isinstance(error, UsageError)})
        return error.exit_code
    accelerator.prepare(request["threads"])
    model = ModelConfig.model_validate(request["model"])
    dtype = getattr(torch, DTYPES[request["dtype"]])
    opened = dataclasses.asdict(examined(accelerator, model, dtype, quick=request["quick"]))
    write({"opened": opened, "note": accelerator.fallback_note})
    context = open_context(
        accelerator,
        model,
        quick=request["quick"],
        seed=request["seed"],
        dtype=dtype,
        workdir=Path(request["workdir"]),
    )
    context.resume, context.needs = request["resume"], request["needs"]
    context.progress = _Beat(write)
    context.at_work = lambda busy: write({"busy": busy})
    for ask in _listed(request):
        write({"begin": ask.name})
        for item in put(context, ask):
            write({"evidence": item.model_dump(mode="json")})
        write({"end": ask.name})
    return 0


class _Beat:
    """Writes a progress line, at most one in half a second."""

    def __init__(self, write: Any) -> None:
        self.write = write
        self.said_s = 0.0

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self.said_s > 0.5:
            self.said_s = time.monotonic()
            self.write({"progress": [done, total]})


def _listed(request: dict[str, Any]) -> list[Ask]:
    every = {ask.name: ask for check in CHECKS for role in check.roles if (ask := Ask(check, role))}
    return [every[name] for name in request["asks"]]


def _end_with_parent() -> None:
    # The supervisor holds the other end of stdin: when it is killed, an orphan must not go on using the chip.
    # os.read, not sys.stdin: a thread in stdin's buffer lock makes the interpreter abort when it shuts down.
    while os.read(0, 4096):
        pass
    os._exit(70)
