"""The training worker: one chip, one loop. Joins train, guard, place and fallback; started by stages/launch through stages/child.

It leaves with an exit code and, for every error it understands, an ending file that says why in typed words. What it cannot
understand goes up as a traceback into its log and ends the process with code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import signal
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bascule.accelerators.base import Accelerator
from bascule.accelerators.registry import open_accelerator
from bascule.config.load import read_resolved
from bascule.data.text_tokenizer import open_or_own
from bascule.errors import (
    AcceleratorUnavailable,
    BasculeError,
    DeviceFault,
    ModelFolderError,
    OperatorMissing,
    OutOfMemory,
    UsageError,
)
from bascule.fallback import verify
from bascule.fallback.policy import condemned
from bascule.folder import RunFolder
from bascule.guard import bits, watchdog
from bascule.guard.backwards import Older
from bascule.guard.guard import REMEMBERED_BATCHES, Guard
from bascule.guard.hindsight import led_to
from bascule.ledger import Ledger, last, of_kind
from bascule.model import existing, kernels, origin, weights
from bascule.model.transformer import Transformer
from bascule.records import (
    Incident,
    MemoryPeak,
    ModelOrigin,
    RunFinished,
    RunStarted,
    SnapshotEvent,
    SnapshotState,
    StepsRecorded,
    StepStats,
)
from bascule.stages.course import Course, course, same_lessons
from bascule.stages.launch import ENDING_FILE, STACKS_FILE
from bascule.stages.material import refuse_too_long
from bascule.stages.measure import Measure
from bascule.stages.phases import objectives
from bascule.stages.rollouts import Rollouts
from bascule.train import checkpoint, fused_adamw, loop, precision
from bascule.train.advice import signs
from bascule.train.grpo import Grpo
from bascule.train.mismatch import mismatch_record
from bascule.train.recorded import RecordedSteps
from bascule.train.state import TrainState
from bascule.train.step import Judge, NoJudge, Stepper
from bascule.train.store import SnapshotStore
from bascule.train.writer import SnapshotWriter


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Train one run on one pool.")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--pool", required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--start", choices=["newest", "certified"], default="newest")
    parser.add_argument("--strict", action="store_true")
    options = parser.parse_args(arguments)
    folder = RunFolder(options.run)
    watchdog.arm_stacks(folder.heartbeats / STACKS_FILE)
    trainer: Trainer | None = None
    try:
        trainer = Trainer(
            folder, options.pool, options.attempt, options.socket, strict=options.strict
        )
        trainer.run(options.start)
    except (BasculeError, RuntimeError, MemoryError, OSError) as error:
        on_chip = trainer is not None and trainer.accelerator.device.type != "cpu"
        known = understood(error, on_chip=on_chip)
        if known is None:
            raise
        if known is not error:
            traceback.print_exc()
        watchdog.write_ending(folder.heartbeats / ENDING_FILE, known)
        return known.exit_code
    return 0


def understood(error: Exception, *, on_chip: bool) -> BasculeError | None:
    """What an error means for the run, or None for one of our own. `on_chip`: the work is done by a device with a runtime of its
    own, whose libraries report their failures as plain RuntimeErrors."""
    match error:
        case BasculeError():
            return error
        case torch.OutOfMemoryError() | MemoryError():
            return OutOfMemory(f"Memory is exhausted: {error}")
        case NotImplementedError():
            return OperatorMissing(f"The chip lacks an operator: {str(error).splitlines()[0]}")
        case torch.AcceleratorError():
            return DeviceFault(f"The chip's runtime gave up: {error}")
        case OSError():
            what = f"{error.strerror or error}: {error.filename or 'no file named'}"
            return UsageError(
                f"{what}. Nothing already written is lost; mend it and run the same command again."
            )
        case RuntimeError() if "can't allocate memory" in str(error):
            return OutOfMemory(f"Memory is exhausted: {error}")
        case RuntimeError() if on_chip:
            return DeviceFault(f"The chip's libraries failed: {error}")
    return None


class Trainer:
    def __init__(
        self, folder: RunFolder, pool: str, attempt: int, socket: Path, *, strict: bool = False
    ) -> None:
        self.folder = folder
        self.pool = pool
        self.heartbeat = folder.heartbeats / "trainer.json"
        self._beat(0, watchdog.STARTING)
        self.recipe = read_resolved(folder.recipe)
        self.ledger = Ledger(folder.ledger, attempt=attempt, pool=pool, strict=strict)
        self.accelerator = open_accelerator(
            self.recipe.pools[pool].accelerator,
            seed=self.recipe.seed,
            fault_log=folder.ground_truth / f"{pool}-train.jsonl",
        )
        self.accelerator.prepare(self.recipe.threads)
        if self.accelerator.fallback_note:
            self.ledger.warn("accelerator fallback", self.accelerator.fallback_note)
        if self.accelerator.device.type == "cpu" and (why := kernels.why_not() or bits.why_not()):
            self.ledger.warn("kernels fallback", f"PyTorch's operators are used where our own are faster: {why}")  # fmt: skip
        if self.accelerator.device.type != "cpu" and (
            why := fused_adamw.why_not(self.accelerator.device)
        ):
            self.ledger.warn("optimizer fallback", f"AdamW runs in single operators, one parameter after another: {why}")  # fmt: skip
        self.course: Course = course(self.recipe, open_or_own(folder.tokenizer))
        same_lessons(self.recipe, self.course, self.ledger)
        self.stepper = Stepper(
            self._new_model(),
            self.accelerator,
            router_bias_speed=self.recipe.train.router_bias_speed,
            recorded=self._recorded_steps(),
        )
        self.rollouts = Rollouts(
            socket, self.stepper, folder.weights, self.ledger, lambda: self._beat(self.stepper.step, "wait for rollouts")
        )  # fmt: skip
        self.measure = Measure(
            self.recipe, self.course, self.stepper, self.rollouts, self.ledger, lambda step: self._beat(step, "evaluate")
        )  # fmt: skip
        self.objectives = objectives(
            self.recipe, self.course, self.stepper, self.rollouts, self.ledger
        )
        self.plan = loop.Plan(
            self.recipe.phase_steps(), folder.snapshots, self.recipe.train.snapshot_every_steps
        )
        self.writer = SnapshotWriter(
            self._on_saved,
            on_wait=lambda: self._beat(self.stepper.step, "snapshot"),
            after_each=self._store_away,
        )
        self.store = self._open_store(self.recipe.train.snapshots)
        self.guard = self._new_guard() if self.recipe.guard.enabled else None
        refuse_too_long(self.recipe, self.course.train, self.course.tokenizer)
        self._said: set[str] = set()
        self._phase: str | None = None
        self._stop = False
        signal.signal(signal.SIGTERM, self._on_sigterm)

    # ---- the run

    def run(self, start: str) -> None:
        """Start or resume, prove the continuation where the chip changed, train to the end, export, record."""
        state = self._resume(start)
        self._phase = state.phase or None
        self.accelerator.reset_peak_memory()
        hooks = loop.Hooks(
            on_step=self._on_step,
            on_snapshot=self._on_snapshot,
            on_phase=self._on_phase,
            on_skip=lambda step, why: self.ledger.warn("batch skipped", why, step=step),
            should_stop=lambda: self._stop,
            extra=lambda: {"pool": self.pool, "precision": self.stepper.precision},
            tried=self._tried().__getitem__,
        )
        judge: Judge = self.guard or NoJudge()
        state = loop.run(self.stepper, self.objectives, judge, state, self.plan, hooks, self.writer)
        self._record_peak()
        if self.guard:
            self._certify_last(state.step)
        self.writer.wait()
        if state.phase:
            self.measure.if_due(state.phase, state.step)
        self._export(state.step)

    def _recorded_steps(self) -> RecordedSteps | None:
        record = self.accelerator.recorder("train")
        if record is None or not self.recipe.train.record_steps:
            return None
        return RecordedSteps(
            self.accelerator, record,
            tell=lambda words: self.ledger.append(StepsRecorded(step=self.stepper.step + 1, phase=self._phase or "", detail=words)),
            warn=lambda why: self.ledger.warn("steps run operator by operator", why, step=self.stepper.step + 1),
        )  # fmt: skip

    def _tried(self) -> Counter[int]:
        """How often each step was computed by earlier launches: committed, or ended in an incident."""
        done = [one for one in self.ledger.read() if isinstance(one, StepStats | Incident)]
        return Counter(one.step for one in done)

    def _trusted(self) -> SnapshotState:
        """The trust a snapshot needs to go back to: without a guard nothing is ever certified."""
        return "certified" if self.recipe.guard.enabled else "verified"

    def _resume(self, start: str) -> TrainState:
        """The newest snapshot that reads back whole (after a fault: the newest certified one), or a fresh start."""
        state = TrainState(
            recipe_sha256=hashlib.sha256(self.folder.recipe.read_bytes()).hexdigest()
        )
        trusted: SnapshotState = self._trusted() if start == "certified" else "saved"
        path, passed_over = checkpoint.newest(self.folder.snapshots, at_least=trusted)
        if path is None and self.store and self._fetch():
            path, passed_over = checkpoint.newest(self.folder.snapshots, at_least=trusted)
        for reason in passed_over:
            self.ledger.warn("snapshot passed over", reason)
        self.stepper.precision = precision.settle(
            self.ledger,
            path,
            lambda: precision.decide(
                self.recipe.train.precision, self.accelerator, self.course.model
            ),
        )
        if path is None:
            if last(self.ledger.read(), StepStats):
                self.ledger.warn(
                    "fresh start", "no usable snapshot was found: training begins again at step 1"
                )
            return state
        state, warnings = loop.resume(self.stepper, self.objectives, path, state)
        for text in warnings:
            self.ledger.warn("resumed elsewhere", text)
        self._remember(state)
        if checkpoint.load(path).extra.get("pool") != self.pool:
            verify.prove(
                path, self.stepper, open_accelerator("cpu"), self.ledger, self.objectives,
                on_replay=lambda: self._beat(0, watchdog.STARTING),
            )  # fmt: skip
        if self.guard and checkpoint.trust(path).state != "certified":
            self.guard.after_snapshot(state.step, path)
        return state

    def _remember(self, state: TrainState) -> None:
        """Give the guard the memory it would have had without the interruption. Of GRPO's batches the snapshot holds the last."""
        if self.guard is None:
            return
        stats = led_to(self.ledger.read(), state.step)
        objective = self.objectives[state.phase] if state.phase else None
        again = [
            one
            for one in stats
            if one.phase == state.phase
            and (not isinstance(objective, Grpo) or objective.remembers(one.step))
        ]
        self.guard.remember(
            stats,
            [
                self.objectives[state.phase].next_batch(one.step)
                for one in again[-REMEMBERED_BATCHES:]
            ],
        )

    # ---- hooks

    def _on_step(self, stats: StepStats) -> None:
        self._beat(stats.step, stats.phase)
        kept = {
            name: value for name, value in stats.metrics.items() if not name.startswith("mismatch_")
        }
        self.ledger.append(stats.model_copy(update={"metrics": kept}))
        found = mismatch_record(stats.step, stats.metrics, self.rollouts.pool)
        if found:
            self.ledger.append(found)
        if stats.phase == "grpo":
            self._advise(stats)

    def _advise(self, stats: StepStats) -> None:
        """Each sign once a launch: what it means does not change by being said again."""
        metrics = stats.metrics | ({} if stats.reward is None else {"reward": stats.reward})
        for what, text in signs(metrics):
            if what not in self._said:
                self._said.add(what)
                self.ledger.warn(what, text, step=stats.step)

    def _on_snapshot(self, step: int, path: Path) -> None:
        self._beat(step, "snapshot")
        if self.guard:
            self.guard.after_snapshot(step, path)

    def _on_saved(self, step: int, path: Path) -> None:
        """In the writer's thread: read the snapshot back, record it, and make room."""
        if checkpoint.trust(path).state == "saved":
            checkpoint.verify(path)
            checkpoint.set_trust(path, "verified", "read back, hashes equal")
            self.ledger.append(
                SnapshotEvent(
                    step=step,
                    state="verified",
                    path=f"snapshots/{path.name}",
                    sha256=checkpoint.sha256(path),
                )
            )
        self._make_room()

    def _make_room(self) -> None:
        config, snapshots = self.recipe.train, self.folder.snapshots
        most_bytes = math.inf if config.snapshots_gib is None else config.snapshots_gib * 2**30
        checkpoint.prune(
            snapshots, config.keep_snapshots, at_least=self._trusted(), most_bytes=most_bytes
        )
        taken = checkpoint.bytes_of(snapshots)
        if taken > most_bytes and "snapshots_gib" not in self._said:
            self._said.add("snapshots_gib")
            self.ledger.warn("snapshots over their budget", f"they take {taken / 2**30:.3g} GiB, train.snapshots_gib allows {config.snapshots_gib:g}: the newest certified one and "
                "those that wait for a certificate are kept. Give them more, or certify sooner (guard.rule_out_rate, guard.checksum_every_steps)")  # fmt: skip

    def _store_away(self) -> None:
        """In the writer's thread. A store that is away for a while stops nobody: what it missed goes there with the next snapshot."""
        if self.store is None:
            return
        try:
            self.store.catch_up(self.folder.snapshots)
        except OSError as error:
            self.ledger.warn("snapshot not stored", f"{self.store.root}: {error}; the run folder has it, and the next snapshot tries again")  # fmt: skip

    def _fetch(self) -> bool:
        """Bring back what the store holds of a run whose folder is gone."""
        assert self.store is not None
        brought = self.store.fetch(self.folder.snapshots)
        if brought:
            self.ledger.warn("taken up from the store", f"the run folder had no usable snapshot; {', '.join(brought)} came from {self.store.root}")  # fmt: skip
        return bool(brought)

    def _on_phase(self, phase: str, step: int) -> None:
        """A phase is about to begin: measure what the one before it reached, and refuse GRPO from a hopeless start."""
        self._record_peak()
        phases = list(self.recipe.phase_steps())
        if phases.index(phase) > 0:
            self.measure.if_due(phases[phases.index(phase) - 1], step - 1)
        if phase == "grpo":
            self.measure.refuse_hopeless_grpo()
        self._phase = phase
        self.accelerator.reset_peak_memory()

    def _record_peak(self) -> None:
        """What this launch's part of a phase took at most, measuring and loading aside."""
        peak = self.accelerator.memory().peak_bytes
        if self._phase and peak is not None:
            self.ledger.append(MemoryPeak(pool=self.pool, phase=self._phase, peak_bytes=peak))

    def _on_sigterm(self, *_: object) -> None:
        self._stop = True

    def _beat(self, step: int, phase: str) -> None:
        watchdog.beat(self.heartbeat, step, phase)

    # ---- parts

    def _new_model(self) -> Transformer:
        if self.course.model.from_:
            model = self._existing_model(Path(self.course.model.from_))
        else:
            model = Transformer(self.course.model)
            weights.initialise(model, self.recipe.seed)
        return self.accelerator.move(model)

    def _existing_model(self, path: Path) -> Transformer:
        """Raises ModelFolderError when the files are no longer those that the run began with."""
        began = last(self.ledger.read(), ModelOrigin)
        if began and origin.describe(path).sha256 != began.sha256:
            raise ModelFolderError(
                f"model.from = '{path}' is not the model this run began with (SHA-256 {began.sha256[:12]}…): its files changed. "
                "Put the old files back, or begin another run with --name."
            )
        model, _ = existing.load(path, positions=self.course.model.max_position_embeddings)
        return model

    def _open_store(self, url: str | None) -> SnapshotStore | None:
        if url is None:
            return None
        digest = hashlib.sha256(self.folder.recipe.read_bytes()).hexdigest()
        return SnapshotStore(url, self.recipe.name, digest)

    def _new_guard(self) -> Guard:
        referee = open_accelerator("cpu")
        return Guard(
            self.recipe.guard, self.ledger, self.folder, self.pool, accelerator=self.accelerator, referee=referee,
            snapshots=self.writer, experts_per_token=self.course.model.num_experts_per_tok, sibling=self._open_sibling,
            older=self._older,
        )  # fmt: skip

    def _open_sibling(self) -> Accelerator | None:
        """Another chip of this pool that nobody condemned, to ask whether a fault is this chip's or the kind's."""
        gone = {pool for pool, role in condemned(self.ledger.read()) if role == "train"}
        for pool in self.recipe.siblings(self.pool):
            if pool in gone:
                continue
            name = self.recipe.pools[pool].accelerator
            log = self.folder.ground_truth / f"{pool}-train.jsonl"
            try:
                chip = open_accelerator(name, seed=self.recipe.seed, fault_log=log)
            except AcceleratorUnavailable as error:
                self.ledger.warn("no second chip for the replay", f"{pool}: {error}")
                continue
            if not chip.fallback_note:
                return chip
        return None

    def _older(self, step: int, phase: str) -> list[Older]:
        """Snapshots to ask about a batch of `step`. One that is still being written is not among them."""
        return [
            Older(checkpoint.step_of(path), lambda path=path: checkpoint.load(path).model)  # type: ignore[misc]
            for path in checkpoint.since_certified(self.folder.snapshots, step, phase)
        ]

    def _certify_last(self, step: int) -> None:
        """No step follows the last snapshot, so one is computed for the referee and thrown away: the model that is exported
        comes from a certified state, or the chip leaves here with its incident."""
        path = checkpoint.path_of(self.folder.snapshots, step)
        if step == 0 or not path.exists() or checkpoint.trust(path).state == "certified":
            return
        assert self.guard is not None
        last_batch = self.objectives[self.plan.phase_of(step)].next_batch(step)
        for batch in (last_batch, *reversed(self.guard.recent)):
            probe = replace(batch, step=step + 1)
            if batch.empty:
                continue
            if self.stepper.objective is not self.objectives[batch.phase]:
                # A batch of the phase before, when this one never had anything to learn from. The optimizer is not needed any more.
                self.stepper.begin(self.objectives[batch.phase])
            if self.guard.certify_last(self.stepper.propose, probe, self.stepper):
                return
        self.ledger.warn(
            "last snapshot not certified",
            f"no batch at hand after step {step} has anything to learn from; the newest certified snapshot is older",
            step=step,
        )

    # ---- the end

    def _export(self, step: int) -> None:
        """Write the finished model in Hugging Face layout and close the run's books."""
        self._beat(step, "export")
        weights.save_hf(self.stepper.model, self.course.model, self.folder.model)
        self.course.tokenizer.save(self.folder.model)
        started = of_kind(self.ledger.read(), RunStarted)
        wall_s = time.time() - started[0].time_s if started else 0.0
        digest = weights.fingerprint(self.stepper.model)
        self.ledger.append(RunFinished(final_weights_sha256=digest, steps=step, wall_s=wall_s))
