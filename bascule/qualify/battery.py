"""The supervisor's side of the battery: one child process asks, this process waits, and nothing the chip does can stop it.

The child writes each answer as a JSON line (see child.py). A child that dies or falls silent has answered too: the question
it was at becomes evidence against the chip, and a fresh child goes on with the rest. No torch here.

    python -m bascule.qualify.battery child REQUEST.json      (started by `run_battery`, not by people)
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bascule.config.model import ModelConfig
from bascule.errors import UsageError
from bascule.folder import write_json_atomic
from bascule.model import count
from bascule.qualify import kept
from bascule.qualify.check import BOTH, Ask, asks, command
from bascule.qualify.disk import EXIT_UNWRITABLE, refusal
from bascule.qualify.judge import Examined, verdicts
from bascule.qualify.shortened import shortened
from bascule.records import CUT_OFF, Evidence, Role, Verdict

START_LIMIT_S = (
    120.0  # importing torch and opening a chip; a cold NPU runtime takes most of a minute
)
FULL_BATTERY_PATIENCE = 10.0  # the full battery may take this many times a check's quick limit
# Limits are made for models this small; they grow with the model, not without end: a hang must be found before the night is over.
LIMIT_PARAMETERS, LIMIT_GROWTH = 10e6, 20.0
# Of a whole battery, for a model of 1 M parameters; `nano`'s takes 22 s. Only a hang costs so much, and those have the limits above.
QUICK_LIMIT_S, FULL_LIMIT_S, BATTERY_PARAMETERS = 180.0, 3600.0, 1e6
# Our own side (the reference, in fp64 on a CPU that others may use as well) may be silent for longer, and it is no evidence when it is.
HARNESS_PATIENCE = 3.0
# After as many crashes, or one hang, in a role its verdict is clear; the time goes to the other role.
DEATHS_ALLOWED = 2
_POLL_S = 0.02

OnEvidence = Callable[[Evidence], None]
OnProgress = Callable[[str, float, int], None]


@dataclass(frozen=True)
class BatteryResult:
    """Everything found, judged. `folder` holds evidence, reproducers and what a page draws. `note` is the accelerator's own word on what it fell back from."""

    examined: Examined
    evidence: tuple[Evidence, ...]
    verdicts: tuple[Verdict, ...]
    seconds: float
    folder: Path
    note: str | None = None


def run_battery(
    pool: str,
    accelerator: str,
    model: ModelConfig,
    folder: Path,
    *,
    time_limit_s: float | None = None,
    quick: bool = True,
    wide: bool = False,
    seed: int = 0,
    dtype: str = "fp32",
    threads: int = 1,
    only: Sequence[str] = (),
    roles: Sequence[Role] = BOTH,
    chips: int = 2,
    resume: bool = False,
    ask_limit_s: float | None = None,
    needs: Mapping[str, float | str] | None = None,
    on_evidence: OnEvidence | None = None,
    on_progress: OnProgress | None = None,
) -> BatteryResult:
    """Examine one pool's accelerator in child processes and judge it. Evidence and reproducers go to `folder`.

    `time_limit_s`: unset, three minutes (an hour for the full and the wide one), longer for larger models. `dtype` of the model: fp32, bf16 or fp16. `chips` of the pool: links are asked about where there are several. `resume` keeps the
    answers of an earlier battery of the same question in `folder`; without it they are asked again, findings first. `ask_limit_s`
    overrides how long the chip may be silent in one question before that counts as a hang. `needs` (plan/needs.py) is shown beside the
    measured speed. `on_progress(question, done, total)` is
    called when a question begins and, with a fraction of it in `done`, when a long one says how far it is. Raises UsageError when the
    accelerator's name is not one, or the disk takes no more; a chip that is not there is evidence (nothing can be proven about it).
    """
    folder.mkdir(parents=True, exist_ok=True)
    time_limit_s = time_limit_s or _default_limit_s(model, quick=quick, wide=wide)
    run = _Run(
        pool=pool,
        accelerator=accelerator,
        model=model,
        folder=folder,
        deadline_s=time.monotonic() + time_limit_s,
        time_limit_s=time_limit_s,
        quick=quick,
        seed=seed,
        dtype=dtype,
        threads=threads,
        resume=resume,
        ask_limit_s=ask_limit_s,
        needs=dict(needs or {}),
        on_evidence=on_evidence,
        on_progress=on_progress,
        left=list(asks(quick=quick, wide=wide, only=only, roles=roles, chips=chips)),
    )
    started_s = time.monotonic()
    run.total = len(run.left)
    run.remember()
    while run.left:
        run.one_child()
        run.drop_lost_roles()
    judged = verdicts(run.evidence, run.examined, quick=quick, roles=roles, chips=chips)
    return BatteryResult(
        examined=run.examined,
        evidence=tuple(run.evidence),
        verdicts=tuple(verdict.model_copy(update={"pool": pool}) for verdict in judged),
        seconds=time.monotonic() - started_s,
        folder=folder,
        note=run.note,
    )


def _default_limit_s(model: ModelConfig, *, quick: bool, wide: bool) -> float:
    alone = QUICK_LIMIT_S if quick and not wide else FULL_LIMIT_S
    return alone * _growth(model, BATTERY_PARAMETERS, quick=quick)


def _growth(model: ModelConfig, parameters: float, *, quick: bool) -> float:
    """How many times longer than a model of so many parameters this one may take."""
    size = count.parameters(shortened(model) if quick else model) / parameters
    return min(max(size, 1.0), LIMIT_GROWTH)


@dataclass
class _Run:
    """One battery under way: what is left to ask, what was found. `at` is the question the child is working on."""

    pool: str
    accelerator: str
    model: ModelConfig
    folder: Path
    deadline_s: float
    time_limit_s: float
    quick: bool
    seed: int
    dtype: str
    threads: int
    resume: bool
    ask_limit_s: float | None
    on_evidence: OnEvidence | None
    on_progress: OnProgress | None
    left: list[Ask]
    needs: dict[str, float | str] = field(default_factory=dict)
    total: int = 0
    evidence: list[Evidence] = field(default_factory=list)
    deaths: dict[Role, int] = field(default_factory=dict)
    examined: Examined = field(init=False)
    note: str | None = None
    launches: int = 0
    known: kept.Answers = field(default_factory=dict)
    at: Ask | None = None
    busy: bool = False
    opened: bool = False

    def __post_init__(self) -> None:
        self.examined = Examined(accelerator=self.accelerator)

    def remember(self) -> None:
        """Look at what is in the folder already; with `resume` take it as answered."""
        self.launches = kept.launches(self.folder)
        self.known = kept.answers(self.folder, self._request(), lost=True)
        self.left = kept.findings_first(self.left, self.known)
        if not self.resume:
            return
        if said := kept.opened(self.folder, self._request()):
            self.examined = Examined(**said)
        answered = kept.answers(self.folder, self._request(), lost=False)
        for ask in [ask for ask in self.left if ask.name in answered]:
            for item in answered[ask.name]:
                self._add(item)
            self.left.remove(ask)

    def _request(self) -> dict[str, Any]:
        return {
            "accelerator": self.accelerator,
            "model": self.model.model_dump(mode="json"),
            "quick": self.quick,
            "seed": self.seed,
            "dtype": self.dtype,
            "resume": self.resume,
            "threads": self.threads,
            "workdir": str(self.folder),
            "needs": self.needs,
        }

    def one_child(self) -> None:
        """Run one child until it is done, dies, or is stopped; `left` shrinks by at least one question."""
        self.launches += 1
        self.opened, self.busy, self.at = False, False, None
        answers = self.folder / f"answers-{self.launches}.jsonl"
        answers.write_text("", encoding="utf-8")
        process = self._launch(answers)
        try:
            why = self._follow(process, answers)
        finally:
            _kill(process)
        self._account(why, process.returncode)

    def _follow(self, process: subprocess.Popen[bytes], answers: Path) -> str | None:
        """Take lines as they come until the child ends (None) or must be stopped: "limit", "hang" (the chip) or "slow" (we)."""
        offset, since_s = 0, time.monotonic()
        while True:
            ended = process.poll() is not None
            lines, offset = _new_lines(answers, offset)
            for line in lines:
                self._take(line)
            if lines:
                since_s = time.monotonic()
            elif ended:
                return None
            elif why := self._overdue(since_s):
                return why
            else:
                time.sleep(_POLL_S)

    def _launch(self, answers: Path) -> subprocess.Popen[bytes]:
        request = self.folder / f"request-{self.launches}.json"
        asked = [ask.name for ask in self.left]
        write_json_atomic(request, {**self._request(), "answers": str(answers), "asks": asked})
        # stdin is a pipe that only we hold open: the child ends when we do. Its own session, so that helpers it starts die too.
        with open(self.folder / f"child-{self.launches}.log", "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "bascule.qualify.battery", "child", str(request)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _take(self, line: dict[str, Any]) -> None:
        if "opened" in line:
            self.opened = True
            self.examined, self.note = Examined(**line["opened"]), line["note"]
        elif "refused" in line:
            self._refused(line)
        elif "begin" in line:
            self.at = next(ask for ask in self.left if ask.name == line["begin"])
            self._progress(0.0)
        elif "busy" in line:
            self.busy = line["busy"]
        elif "progress" in line:
            done, total = line["progress"]
            self._progress(min(done / max(total, 1), 1.0))
        elif "evidence" in line:
            item = Evidence.model_validate(line["evidence"])
            self._add(kept.not_again(item, self.at.name, self.known) if self.at else item)
        elif "end" in line and self.at:
            self.left.remove(self.at)
            self.at = None

    def _progress(self, share: float) -> None:
        if self.on_progress and self.at:
            self.on_progress(self.at.name, self.total - len(self.left) + (share or 0), self.total)

    def _refused(self, line: dict[str, Any]) -> None:
        if line["usage"]:
            raise UsageError(line["refused"])
        roles = tuple(dict.fromkeys(ask.role for ask in self.left))
        self._add(_evidence("open", roles, "skipped", line["refused"], "the chip opens"))
        self._skip_all(line["refused"])

    def _overdue(self, since_s: float) -> str | None:
        now = time.monotonic()
        if now > self.deadline_s:
            return "limit"
        if not self.opened or self.at is None:
            return "hang" if now - since_s > START_LIMIT_S else None
        silent_s, limit_s = now - since_s, self._limit_s(self.at)
        if self.busy:
            return "hang" if silent_s > limit_s else None
        return "slow" if silent_s > HARNESS_PATIENCE * limit_s else None

    def _limit_s(self, ask: Ask) -> float:
        """How long the chip may compute without a word in this question."""
        if self.ask_limit_s is not None:
            return self.ask_limit_s
        growth = _growth(self.model, LIMIT_PARAMETERS, quick=self.quick)
        return ask.check.limit_s * growth * (1.0 if self.quick else FULL_BATTERY_PATIENCE)

    def _account(self, why: str | None, code: int) -> None:
        """Turn the child's end into evidence: stopped by us (`why`), or ended by itself with questions left. Our own slowness leaves
        the question open and accuses nobody."""
        if why == "limit":
            self._skip_all(f"{CUT_OFF} of {self.time_limit_s:g} s")
        elif why == "hang":
            limit_s = self._limit_s(self.at) if self.at else START_LIMIT_S
            self._lost(
                f"hang: the chip was silent for {limit_s:g} s, the process was ended",
                weight=DEATHS_ALLOWED,
            )
        elif why == "slow" and self.at:
            limit_s = HARNESS_PATIENCE * self._limit_s(self.at)
            words = f"our own side of this check (the reference, not the chip) gave no answer within {limit_s:g} s on this machine"
            self._add(self._against(self.at, "skipped", words))
            self.left.remove(self.at)
        elif code == EXIT_UNWRITABLE:
            raise refusal(self.pool, self.folder)
        elif self.left:
            self._lost(f"death: the process ended with {_ending(code)}")

    def _lost(self, detail: str, *, weight: int = 1) -> None:
        log = self.folder / f"child-{self.launches}.log"
        if self.at is None:
            roles = tuple(dict.fromkeys(ask.role for ask in self.left))
            stage = "between two checks" if self.opened else "while the chip was opened"
            self._add(
                _evidence(
                    "open",
                    roles,
                    "error",
                    f"{detail}, {stage}; see {log}",
                    "the chip opens and stays",
                )
            )
            self._skip_all("the chip could not be kept open")
            return
        ask = self.at
        found = self._against(ask, "error", f"{detail} while it was asked {ask.name}; see {log}")
        kept.write_lost(self.folder / f"answers-{self.launches}.jsonl", ask.name, found)
        self._add(found)
        self.left.remove(ask)
        self.deaths[ask.role] = self.deaths.get(ask.role, 0) + weight

    def drop_lost_roles(self) -> None:
        """Skip what is left of a role in which the chip has died or hung often enough."""
        for ask in [ask for ask in self.left if self.deaths.get(ask.role, 0) >= DEATHS_ALLOWED]:
            self._add(
                self._against(
                    ask, "skipped", "not asked: the chip hung, or died twice, in this role"
                )
            )
            self.left.remove(ask)

    def _skip_all(self, detail: str) -> None:
        for ask in self.left:
            self._add(self._against(ask, "skipped", detail))
        self.left.clear()

    def _against(self, ask: Ask, outcome: str, detail: str) -> Evidence:
        return _evidence(
            ask.check.name,
            (ask.role,),
            outcome,
            detail,
            ask.check.bound,
            reproduce=command(
                self.accelerator,
                self.model,
                ask,
                seed=self.seed,
                dtype=self.dtype,
                quick=self.quick,
            ),
        )

    def _add(self, item: Evidence) -> None:
        stamped = item.model_copy(update={"pool": self.pool})
        self.evidence.append(stamped)
        if self.on_evidence:
            self.on_evidence(stamped)


def _evidence(
    check: str,
    roles: tuple[Role, ...],
    outcome: str,
    detail: str,
    bound: str,
    *,
    reproduce: str = "",
) -> Evidence:
    return Evidence(
        check=check,
        family=check.partition(".")[0],
        roles=roles,
        outcome=outcome,  # type: ignore[arg-type]
        bound=bound,
        detail=detail,
        reproduce=reproduce,
    )


def _new_lines(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Whole lines after `offset`; a line being written is left for the next look."""
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read()
    end = data.rfind(b"\n") + 1
    return [json.loads(line) for line in data[:end].splitlines()], offset + end


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the child and whatever it started (its process group), and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin:
        process.stdin.close()


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "SIGKILL (from a chip's runtime, from somebody, or from the kernel where memory ran out: its log says so)"
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8") as request_file:
        wanted = json.load(request_file)
    sys.exit(importlib.import_module("bascule.qualify.child").main(wanted))
