"""The training stage, supervisor's side: start the workers, watch them, read why they ended, decide what is next. No torch.

One launch is a trainer on the pool placed for `train` and a rollout engine on the pool placed for `infer`. A launch ends in
one of a few ways (`Ending`), read from the trainer's exit code and its ending file, from its silence, or from its death; never
from log text. What follows from an ending stands in `_react`; where to go next is fallback's and place's to say.
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
from bascule.errors import (
    BasculeError,
    CheckFailed,
    DeviceFault,
    GuardStopped,
    NoPoolLeft,
    OutOfMemory,
    Preempted,
    UsageError,
)
from bascule.fallback import migrate, policy
from bascule.folder import RunFolder
from bascule.guard import watchdog
from bascule.guard.watchdog import Ending, Health, Watchdog
from bascule.ledger import Ledger, last, of_kind
from bascule.place.placement import place
from bascule.records import (
    AnyRecord,
    Coverage,
    Incident,
    Migration,
    Placement,
    PoolCondemned,
    Role,
    SnapshotEvent,
    SnapshotState,
    StepStats,
    Verdict,
    Warned,
)
from bascule.report.story import sentences
from bascule.stages import workers
from bascule.stages.answer import say
from bascule.stages.place import place_roles
from bascule.stages.progress import LedgerTail, ProgressLine
from bascule.stages.reexamine import Reexamination

POLL_S = 0.1
ENGINE_DEATHS_ALLOWED = 2  # on one pool without a new snapshot in between
ENDING_FILE = "trainer.end.json"
STACKS_FILE = "trainer.stacks"
SETBACKS = {
    "ChipCondemned": "condemned",
    "RollbackNeeded": "rollback",
    "ContinuationRefused": "continuation refused",
    "OutOfMemory": "out of memory",
    "OperatorMissing": "operator missing",
    "AcceleratorUnavailable": "accelerator unavailable",
    "DeviceFault": "device error",
    "Hang": "hang",
    "Death": "death",
}
"""Endings that another launch may mend, here or on another pool, and the word of the incident where the worker left none."""


def train(
    recipe: Recipe, folder: RunFolder, ledger: Ledger, *, should_stop: Callable[[], bool]
) -> None:
    """Train to the end, over as many launches and pools as it takes. Raises the error that ends the run."""
    supervisor = Supervisor(recipe, folder, ledger, should_stop)
    supervisor.settle_unfinished()
    try:
        while (ending := supervisor.launch(place_roles(recipe, ledger))).error is not None:
            supervisor.react(ending)
            supervisor.check_stop()
    finally:
        supervisor.reexamination.close()


class Supervisor:
    def __init__(
        self, recipe: Recipe, folder: RunFolder, ledger: Ledger, should_stop: Callable[[], bool]
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.ledger = ledger
        self.should_stop = should_stop
        self.from_certified = False
        self.deaths: dict[str, int] = {}
        self.progress = ProgressLine(recipe.total_steps())
        self.tail = LedgerTail(folder.ledger)
        self.placement: Placement | None = None
        self.stacks = ""
        self.reexamination = Reexamination(recipe, folder, ledger, self.check_stop)

    def check_stop(self) -> None:
        if self.should_stop():
            raise Preempted(
                "Stopped on request, after what had just happened was settled. Run the same command again to go on."
            )

    def launch(self, placement: Placement) -> Ending:
        """Run one trainer to its end, keeping a rollout engine alive beside it."""
        self.placement = placement
        # Unix socket paths are limited to about 100 characters, so the socket cannot live in the run folder.
        room = Path(tempfile.mkdtemp(prefix="bascule-"))
        trainer = self._start_trainer(placement.train, room / "s")
        self.from_certified = False
        engine: workers.Worker | None = None
        try:
            while True:
                ending = self._trainer_ending(trainer)
                if ending:
                    return ending
                engine = self._keep_engine(engine, room / "s")
                self._follow()
                time.sleep(POLL_S)
        finally:
            trainer.kill()
            if engine is not None:
                engine.kill()
            self._follow()
            shutil.rmtree(room, ignore_errors=True)

    def react(self, ending: Ending) -> None:
        """Record what an unfinished launch means, and prepare the next one; raise when there is no next one."""
        assert self.placement is not None
        if ending.error == "Preempted":
            raise Preempted(
                "Stopped on request; the last finished step is in a snapshot. Run the same command again to go on."
            )
        if ending.error == "RolloutFailed":
            self._condemn(self.placement.infer, "infer", ending)
        elif ending.error in SETBACKS:
            self._setback(self.placement.train, ending)
        else:
            raise _error_of(ending)

    def settle_unfinished(self) -> None:
        """A supervisor that was killed between an incident and the rollback it asks for left that to us: without it the trainer
        would start from a snapshot that the incident had made doubtful, and certify it."""
        pending: Incident | None = None
        for record in self.ledger.read():
            if isinstance(record, Incident) and record.rollback:
                pending = record
            elif isinstance(record, Migration):
                pending = None
        if pending is None or pending.pool is None:
            return
        error = _ending_of(pending)
        say(f"incident {pending.incident_id} asks for a rollback that was not made; it is made now")
        self._setback(pending.pool, Ending(error, pending.evidence, 5, pending.incident_id))

    # ---- workers

    def _start_trainer(self, pool: str, socket: Path) -> workers.Worker:
        for name in ("trainer.json", ENDING_FILE):
            (self.folder.heartbeats / name).unlink(missing_ok=True)
        arguments = [
            "--run", str(self.folder.root), "--attempt", str(self.ledger.attempt), "--pool", pool, "--socket", str(socket),
            "--start", "certified" if self.from_certified else "newest", *(["--strict"] if self.ledger.strict else []),
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
        self.stacks = watchdog.capture_stacks(
            trainer.process.pid, self.folder.heartbeats / STACKS_FILE
        )
        trainer.kill()
        return self._read_ending(trainer, health)

    def _await_stop(self, trainer: workers.Worker) -> Ending:
        deadline = time.monotonic() + self.recipe.guard.hang_timeout_s
        while trainer.returncode is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
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

    def _read_ending(self, trainer: workers.Worker, health: Health | None = None) -> Ending:
        code = trainer.returncode
        assert code is not None
        ending = watchdog.classify_exit(code, self.folder.heartbeats / ENDING_FILE, health=health)
        match ending.error:
            case "Hang":
                where = watchdog.standing_at(self.stacks)
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
            self._condemn(
                engine.pool, "infer", Ending("RolloutFailed", f"the rollout engine {why}", 1)
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

    # ---- what follows

    def _condemn(self, pool: str, role: Role, ending: Ending) -> None:
        self.ledger.append(
            PoolCondemned(
                pool=pool, role=role, incident_id=ending.incident_id, reason=ending.message
            )
        )
        say(f"{pool} is condemned for the role {role}: {ending.message.splitlines()[0]}")

    def _setback(self, pool: str, ending: Ending) -> None:
        """A launch failed: leave the incident, ask the policy, go back to the newest certified snapshot. A worker that only died is no
        suspect: it may go on from what it saved last, as after a stop, and its snapshots go on waiting for their certificates."""
        suspected = ending.incident_id is not None
        if ending.incident_id is None:
            ending = replace(ending, incident_id=self._incident(pool, ending).incident_id)
        records = self.ledger.read()
        failed_step = self._failed_step(ending)
        setback = policy.Setback(
            pool, str(ending.error), failed_step, ending.message, ending.incident_id
        )
        try:
            move = policy.next_move(
                records,
                setback,
                lambda out: self._place(records, out),
                siblings=self.recipe.siblings(pool),
            )
        except NoPoolLeft as nothing:
            self._condemn(pool, "train", ending)
            raise OutOfMemory(str(nothing)) if ending.error == "OutOfMemory" else nothing from None
        for lost in move.condemn:
            why = (
                move.reason
                if lost == pool
                else f"left with the chips of its kind that failed at the same place; last: {move.reason}"
            )
            self._condemn(lost, "train", replace(ending, message=why))
        self._go_back(pool, move, failed_step, suspected=suspected or move.pool != pool)
        until = time.monotonic() + move.wait_s
        while time.monotonic() < until and not self.should_stop():
            time.sleep(POLL_S)

    def _place(self, records: list[AnyRecord], condemned: frozenset[tuple[str, Role]]) -> Placement:
        return place(
            of_kind(records, Verdict),
            self.recipe.order,
            condemned,
            required=self.recipe.qualify.required,
        )

    def _incident(self, pool: str, ending: Ending) -> Incident:
        """An incident that the worker could not write itself: it was dead, silent, or out of memory."""
        number = len(of_kind(self.ledger.read(), Incident)) + 1
        step = self._last_step() + 1
        word = SETBACKS[str(ending.error)]
        name = f"{number:04d}-{word.replace(' ', '-')}-step-{step}"
        incident = Incident(
            pool=pool,
            incident_id=name,
            step=step,
            sentinel=f"watchdog: {word}",
            attribution=ending.attribution,
            action="back to the last certified snapshot; the policy decides where",
            evidence=ending.message,
            folder=self._keep_stacks(name) if ending.error == "Hang" else "",
            rollback=True,
        )
        self.ledger.append(incident)
        return incident

    def _keep_stacks(self, incident_id: str) -> str:
        """Every thread's stack at the moment of the hang, in the incident's folder; returns the folder's name in the run."""
        path = self.folder.incidents / incident_id / "stacks.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.stacks or "the process did not answer\n", encoding="utf-8")
        return f"incidents/{incident_id}"

    def _count_death(self, pool: str) -> int:
        self.deaths[pool] = self.deaths.get(pool, 0) + 1
        return self.deaths[pool]

    def _go_back(self, pool: str, move: policy.Move, failed_step: int, *, suspected: bool) -> None:
        """Choose the snapshot to go on from; later ones are rejected. What it costs is recorded."""
        proven = self.recipe.guard.enabled and suspected
        trusted: SnapshotState = "certified" if proven else "verified"
        choice = migrate.choose(self.folder.snapshots, self.ledger, trusted=trusted)
        reached_s = self._reached(choice.step)
        again = max(0, failed_step - 1 - choice.step)
        self.ledger.append(
            Migration(
                pool=move.pool,
                from_pool=pool,
                to_pool=move.pool,
                failed_at_step=failed_step,
                resumed_from_step=choice.step,
                steps_recomputed=again,
                seconds_lost=max(0.0, time.time() - reached_s),
                snapshot=choice.path.name,
                rung=move.rung,
                wait_s=move.wait_s,
            )
        )
        wait = f" in {move.wait_s:.0f} s" if move.wait_s else ""
        say(
            f"{move.rung}: back to step {choice.step} ({trusted}), on {move.pool}{wait}; {again} steps to compute again"
        )
        self.from_certified = proven

    def _reached(self, step: int) -> float:
        """When the run first stood at `step`."""
        times = [
            record.time_s
            for record in of_kind(self.ledger.read(), StepStats)
            if record.step == step
        ]
        return (
            times[-1]
            if times
            else min((record.time_s for record in self.ledger.read()), default=time.time())
        )

    def _last_step(self) -> int:
        record = last(self.ledger.read(), StepStats)
        return record.step if record else 0

    def _failed_step(self, ending: Ending) -> int:
        for incident in reversed(of_kind(self.ledger.read(), Incident)):
            if incident.incident_id == ending.incident_id:
                return incident.step
        return self._last_step() + 1


def _ending_of(incident: Incident) -> str:
    """Which ending left this incident: the reverse of SETBACKS for the supervisor's own, the attribution for the guard's."""
    words = {word: error for error, word in SETBACKS.items()}
    own = words.get(incident.sentinel.removeprefix("watchdog: "))
    if incident.sentinel.startswith("watchdog: ") and own:
        return own
    guilty = incident.attribution in ("persistent chip fault", "software")
    return "ChipCondemned" if guilty else "RollbackNeeded"


def _error_of(ending: Ending) -> BasculeError:
    """The error the run ends with, for endings that no other pool would change."""
    by_code: dict[int, type[BasculeError]] = {
        2: UsageError,
        3: CheckFailed,
        4: GuardStopped,
        5: DeviceFault,
        6: OutOfMemory,
    }
    return by_code.get(ending.exit_code, BasculeError)(ending.message)
