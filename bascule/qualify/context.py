"""What a check is given: the chip, the referee, this model, and a helper that words its answer as Evidence."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bascule.accelerators.base import Accelerator, Work
from bascule.config.model import ModelConfig
from bascule.errors import DeviceFault
from bascule.folder import write_json_atomic
from bascule.qualify.check import DTYPES, Ask, command
from bascule.qualify.workload import Workload
from bascule.records import Evidence, Role

Measured = dict[str, float | int | str | None]
Progress = Callable[[int, int], None]


class ChipFailed(DeviceFault):
    """The chip raised while it computed; the cause is chained. What raises outside a chip session is the harness's fault."""


@dataclass
class CheckContext:
    """One chip under examination. `referee` is the CPU; `workdir/evidence/` takes reproducers and their inputs.

    `workload` (this model, its batch, its trace and its fp64 twin) is made once and shared by all checks. `resume`: a long check may
    go on from what it left in `workdir`. `progress(done, total)`: a long check says that it lives, and how far it is. `at_work`: told
    when the chip begins and ends to compute, so that a long silence can be laid at the right door: the chip's, or our reference's.
    `needs`: what the plan counts on (plan/needs.py), where there is one.
    """

    accelerator: Accelerator
    referee: Accelerator
    model_config: ModelConfig
    quick: bool
    seed: int
    workdir: Path
    workload: Workload
    ask: Ask | None = None
    resume: bool = False
    progress: Progress = lambda done, total: None
    at_work: Callable[[bool], None] = lambda busy: None
    needs: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def role(self) -> Role:
        return self._asked.role

    @property
    def _asked(self) -> Ask:
        if self.ask is None:
            raise RuntimeError("a check was run without being asked: use context.asked(ask)")
        return self.ask

    def asked(self, ask: Ask) -> CheckContext:
        self.ask = ask
        return self

    def work(self, step: int = 1, attempt: int = 0) -> Work:
        """The session's label. Checks use small step numbers: qualification is the chip's first minutes, not its hundredth hour."""
        return Work(role=self.role, step=step, attempt=attempt)

    @contextmanager
    def chip(self, step: int = 1, attempt: int = 0) -> Iterator[None]:
        """Everything inside runs on the chip. Its exceptions leave as ChipFailed, so that they are not taken for our own."""
        try:
            with self.session(self.work(step, attempt)):
                yield
                self.accelerator.synchronize()
        except (RuntimeError, MemoryError, DeviceFault) as error:
            raise ChipFailed(describe(error)) from error

    @contextmanager
    def session(self, work: Work) -> Iterator[None]:
        """A session of the chip whose exceptions leave as they are."""
        self.at_work(True)
        try:
            with self.accelerator.session(work):
                yield
        finally:
            self.at_work(False)

    def command(self) -> str:
        return command(
            self.accelerator.name,
            self.model_config,
            self._asked,
            seed=self.seed,
            dtype=dtype_name(self.workload.dtype),
            quick=self.quick,
        )

    def draw(self, what: dict[str, Any]) -> None:
        """Keep what a page draws of this answer beyond its figures: `figures/<check>-<role>.json`."""
        folder = self.workdir / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / f"{self._asked.check.name}-{self.role}.json", what)

    def passed(self, detail: str = "", measured: Measured | None = None) -> Evidence:
        return self._evidence("pass", detail, measured, "")

    def failed(
        self, detail: str, measured: Measured | None = None, *, script: Path | None = None
    ) -> Evidence:
        """A finding. `script` is a stand-alone reproducer; its path joins the command."""
        reproduce = (
            self.command()
            if script is None
            else f"{self.command()}  |  python {shlex.quote(str(script))}"
        )
        return self._evidence("fail", detail, measured, reproduce)

    def skipped(self, detail: str, measured: Measured | None = None) -> Evidence:
        """The question could not be asked, through no fault of the chip; or it was, and the answer is 'too little to say'."""
        return self._evidence("skipped", detail, measured, self.command())

    def errored(self, detail: str, measured: Measured | None = None) -> Evidence:
        """The chip failed by exception."""
        return self._evidence("error", detail, measured, self.command())

    def _evidence(
        self, outcome: str, detail: str, measured: Measured | None, reproduce: str
    ) -> Evidence:
        ask = self._asked
        return Evidence(
            check=ask.check.name,
            family=ask.check.family,
            roles=(ask.role,),
            outcome=outcome,  # type: ignore[arg-type]
            measured=measured or {},
            bound=ask.check.bound,
            detail=detail,
            reproduce=reproduce,
        )


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, spelled in DTYPES.items() if getattr(torch, spelled) is dtype)


def describe(error: BaseException) -> str:
    """An exception in one line: its type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
