"""One launch: a trainer on the pool placed for `train` and, beside it, a rollout engine on the pool placed for `infer`. No torch.

A launch ends in one of a few ways (`Ending`), read from the trainer's exit code and its ending file, from its silence, or from
its death; never from log text. What follows from an ending stands in `setback.py`.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bascule.config.recipe import Recipe
from bascule.errors import Preempted
from bascule.fallback import policy
from bascule.folder import RunFolder
from bascule.guard import watchdog
from bascule.guard.watchdog import Ending, Health, Watchdog
from bascule.ledger import Ledger
from bascule.records import Coverage, Incident, Placement, SnapshotEvent, StepStats, Warned
from bascule.report.story import sentences
from bascule.stages import workers
from bascule.stages.answer import say
from bascule.stages.place import place_roles
from bascule.stages.progress import LedgerTail, ProgressLine
from bascule.stages.reexamine import Reexamination
from bascule.stages.setback import Start, condemn

ENGINE_DEATHS_ALLOWED = 2  # on one pool without a new snapshot in between
ENDING_FILE = "trainer.end.json"
STACKS_FILE = "trainer.stacks"


class Launcher:
    """Makes the launches of one supervisor, one after the other. `placement` is the last one's: inference may have moved during it."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        ledger: Ledger,
        should_stop: Callable[[], bool],
        reexamination: Reexamination,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.ledger = ledger
        self.should_stop = should_stop
        self.reexamination = reexamination
        self.placement: Placement | None = None
        self.deaths: dict[str, int] = {}
        self.progress = ProgressLine(recipe.total_steps())
        self.tail = LedgerTail(folder.ledger)

    def launch(self, placement: Placement, start: Start) -> Ending:
        """Run one trainer to its end, keeping a rollout engine alive beside it."""
        self.placement = placement
        # Unix socket paths are limited to about 100 characters, so the socket cannot live in the run folder.
        room = Path(tempfile.mkdtemp(prefix="bascule-"))
        trainer = self._start_trainer(placement.train, room / "s", start)
        engine: workers.Worker | None = None
        try:
            while True:
                ending = self._trainer_ending(trainer)
                if ending:
                    return ending
                engine = self._keep_engine(engine, room / "s")
                self._follow()
                time.sleep(workers.POLL_S)
        finally:
            trainer.kill()
            if engine is not None:
                engine.kill()
            self._follow()
            shutil.rmtree(room, ignore_errors=True)

    def _start_trainer(self, pool: str, socket: Path, start: Start) -> workers.Worker:
        for name in ("trainer.json", ENDING_FILE):
            (self.folder.heartbeats / name).unlink(missing_ok=True)
        arguments = [
            "--run", str(self.folder.root), "--attempt", str(self.ledger.attempt), "--pool", pool, "--socket", str(socket),
            "--start", start, *(["--strict"] if self.ledger.strict else []),
        ]  # fmt: skip
        say(f"start the trainer on {pool} ({self.recipe.pools[pool].accelerator})")
        return workers.start(
            "trainer",
            arguments,
            pool=pool,
            log=self._log("trainer", pool),
            threads=self.recipe.threads,
            watchdog=self._watchdog("trainer"),
        )

    def _start_engine(self, pool: str, socket: Path) -> workers.Worker:
        (self.folder.heartbeats / "rollout.json").unlink(missing_ok=True)
        arguments = [
            "--run",
            str(self.folder.root),
            "--pool",
            pool,
            "--socket",
            str(socket),
            "--threads",
            str(self.recipe.threads),
        ]
        return workers.start(
            "rollout",
            arguments,
            pool=pool,
            log=self._log("rollout", pool),
            threads=self.recipe.threads,
            watchdog=self._watchdog("rollout"),
        )

    def _watchdog(self, kind: str) -> Watchdog:
        guard = self.recipe.guard
        return Watchdog(
            self.folder.heartbeats / f"{kind}.json",
            hang_timeout_s=guard.hang_timeout_s,
            start_timeout_s=guard.start_timeout_s,
        )

    def _log(self, kind: str, pool: str) -> Path:
        return self.folder.logs / f"{kind}-{pool}-{self.ledger.attempt}.log"

    def _trainer_ending(self, trainer: workers.Worker) -> Ending | None:
        """None while the trainer lives and moves."""
        if self.should_stop():
            trainer.ask_to_stop()
            return self._await_stop(trainer)
        if trainer.returncode is not None:
            return self._read_ending(trainer)
        health = trainer.health
        if not health.must_end:
            return None
        stacks = watchdog.capture_stacks(trainer.process.pid, self.folder.heartbeats / STACKS_FILE)
        trainer.kill()
        return replace(self._read_ending(trainer, health, stacks), stacks=stacks)

    def _await_stop(self, trainer: workers.Worker) -> Ending:
        deadline = time.monotonic() + self.recipe.guard.hang_timeout_s
        while trainer.returncode is None and time.monotonic() < deadline:
            time.sleep(workers.POLL_S)
        if trainer.returncode is None:
            self.ledger.warn(
                "stopped without a snapshot",
                f"the trainer did not end within {self.recipe.guard.hang_timeout_s:.0f} s of being asked; steps since the last snapshot are computed again",
            )
            trainer.kill()
            return Ending("Preempted", "", Preempted.exit_code)
        ending = self._read_ending(trainer)
        if ending.exit_code == -signal.SIGTERM:
            # It was asked before it could listen; nothing had been computed yet.
            return Ending("Preempted", ending.message, Preempted.exit_code)
        return ending

    def _read_ending(
        self, trainer: workers.Worker, health: Health | None = None, stacks: str = ""
    ) -> Ending:
        code = trainer.returncode
        assert code is not None
        ending = watchdog.classify_exit(code, self.folder.heartbeats / ENDING_FILE, health=health)
        match ending.error:
            case "Hang":
                where = watchdog.standing_at(stacks)
                told = (
                    f"it stood in {where}"
                    if where
                    else "it did not answer when asked where it stood"
                )
                return replace(
                    ending, message=f"the trainer on {trainer.pool}: {ending.message}; {told}"
                )
            case "OwnFault" | "Death":
                words = f"the trainer on {trainer.pool} {ending.message}; its log {trainer.log} ends:\n{trainer.last_words()}"
                return replace(ending, message=words)
        return ending

    def _keep_engine(self, engine: workers.Worker | None, socket: Path) -> workers.Worker | None:
        """Restart a dead or silent engine; after repeated deaths its pool loses the role and the next one takes over. None while
        a pool that failed in training is examined again: it may turn out unfit to infer."""
        if engine is None:
            return None if self.reexamination.pending() else self._place_engine(socket)
        health = engine.health
        if engine.returncode is None and not health.must_end:
            return engine
        why = (
            health.reason
            if engine.returncode is None
            else f"died with exit code {engine.returncode}"
        )
        engine.kill()
        self.ledger.warn(
            "rollout engine restarted", f"the engine on {engine.pool}: {why}; its log: {engine.log}"
        )
        if self._count_death(engine.pool) >= ENGINE_DEATHS_ALLOWED:
            condemn(
                self.ledger,
                engine.pool,
                "infer",
                Ending("RolloutFailed", f"the rollout engine {why}", 1),
            )
        return self._place_engine(socket)

    def _place_engine(self, socket: Path) -> workers.Worker:
        """Inference may move while the trainer stays where it is."""
        assert self.placement is not None
        infer = place_roles(self.recipe, self.ledger).infer
        self.placement = self.placement.model_copy(update={"infer": infer})
        return self._start_engine(infer, socket)

    def _follow(self) -> None:
        for record in self.tail.new():
            if isinstance(record, StepStats):
                self.progress.show(record)
            elif isinstance(record, Incident):
                say(
                    f"INCIDENT {record.incident_id} on {record.pool}: {record.attribution}; {record.action}"
                )
            elif isinstance(record, SnapshotEvent) and record.state in policy.PROGRESS:
                self.deaths.clear()
            elif isinstance(record, Warned) and record.pool is not None:
                # A worker's; this process's own are on stderr since they were written.
                print(f"WARN {record.what}: {record.detail}", file=sys.stderr, flush=True)
            elif isinstance(record, Coverage):
                say(f"guard: {record.detail}")
            elif record.kind in ("evaluation", "text_evaluation", "continuation", "alarm"):
                for told in sentences([record]):
                    say(told.text)

    def _count_death(self, pool: str) -> int:
        self.deaths[pool] = self.deaths.get(pool, 0) + 1
        return self.deaths[pool]
