"""The training loop of DESIGN section 5: propose, judge, commit or discard; snapshots between; phases in order.

It decides nothing about chips: a condemned chip leaves as the judge's exception, a stop request as Preempted. Everything the
caller wants to know comes through the four hooks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bascule.errors import GuardStopped, Preempted, SnapshotError
from bascule.records import StepStats
from bascule.train import checkpoint
from bascule.train.extra import load_metrics
from bascule.train.objective import Objective
from bascule.train.state import TrainState
from bascule.train.step import Judge, Proposal, Stepper
from bascule.train.writer import SnapshotWriter

MAX_REFUSALS = 3
"""Refusals of one step before its batch is skipped: the judge has replayed it each time and does not blame the chip."""


def _nothing(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Hooks:
    """What the caller does when something happened. `on_snapshot` comes when the state is frozen; with a writer, nothing lies at
    the path yet (the writer's `on_saved` comes when it does). `extra` gives JSON to store in each snapshot (the caller's own state).
    `tried` says how often earlier launches computed a step, so that its attempts are numbered on."""

    on_step: Callable[[StepStats], None] = _nothing
    on_snapshot: Callable[[int, Path], None] = _nothing
    on_phase: Callable[[str, int], None] = _nothing
    on_skip: Callable[[int, str], None] = _nothing
    should_stop: Callable[[], bool] = lambda: False
    extra: Callable[[], dict[str, Any]] = dict
    tried: Callable[[int], int] = lambda step: 0


@dataclass(frozen=True)
class Plan:
    """How far each phase goes (recipe.phase_steps()) and when to save."""

    phase_steps: Mapping[str, int]
    snapshots: Path
    snapshot_every_steps: int = 50
    boundaries: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        ends, total = [], 0
        for steps in self.phase_steps.values():
            total += steps
            ends.append(total)
        object.__setattr__(self, "boundaries", tuple(ends))

    @property
    def total(self) -> int:
        return self.boundaries[-1] if self.boundaries else 0

    def phase_of(self, step: int) -> str:
        """The phase that owns `step` (from 1)."""
        for phase, end in zip(self.phase_steps, self.boundaries, strict=True):
            if step <= end:
                return phase
        raise ValueError(f"Step {step} is after the last one, {self.total}.")

    def saves(self, step: int) -> bool:
        return step % self.snapshot_every_steps == 0 or step in self.boundaries


def run(
    stepper: Stepper,
    objectives: Mapping[str, Objective],
    judge: Judge,
    state: TrainState,
    plan: Plan,
    hooks: Hooks | None = None,
    writer: SnapshotWriter | None = None,
) -> TrainState:
    """Train from `state` to the end of the plan and return the last state. Without a `writer` the loop waits for the disk.

    Saves a snapshot before the first step of a new run, so that there is always one to go back to. Raises Preempted after a
    snapshot when asked to stop, GuardStopped for a loss that is not a number and that no judge refused, and whatever the
    judge raises (ChipCondemned).
    """
    hooks = hooks or Hooks()
    stepper.judge = judge
    if state.step == 0 and plan.total:
        stepper.begin(objectives[plan.phase_of(1)])
        save(stepper, state, plan, hooks, writer)
    saved = state.step
    while state.step < plan.total:
        step = state.step + 1
        phase = plan.phase_of(step)
        if state.phase != phase:
            _enter(stepper, objectives[phase], hooks, step)
        _one_step(stepper, objectives[phase], step, hooks)
        state = replace(state, step=step, phase=phase)
        stopping = hooks.should_stop()
        if writer:
            writer.check()
        if plan.saves(step) or stopping:
            save(stepper, state, plan, hooks, writer)
            saved = step
        if writer and (stopping or step == plan.total):
            writer.wait()
        if stopping and step < plan.total:
            raise Preempted(
                f"Stopped on request after step {step}; snapshot of step {saved} is saved. Run the same command again."
            )
    return state


def resume(
    stepper: Stepper, objectives: Mapping[str, Objective], path: Path, state: TrainState
) -> tuple[TrainState, tuple[str, ...]]:
    """Load the snapshot at `path`; returns the state to go on from and warnings (threads or versions that differ).

    Raises SnapshotError when it is damaged, or was saved under another recipe than `state.recipe_sha256` names.
    """
    found = checkpoint.load(path)
    recipe = found.extra.get("recipe_sha256", "")
    if state.recipe_sha256 and recipe != state.recipe_sha256:
        raise SnapshotError(
            f"The snapshot '{path}' belongs to recipe {recipe[:12] or 'unknown'}, this run's recipe is {state.recipe_sha256[:12]}. "
            "Resume with the recipe that saved it, or use another run folder."
        )
    stepper.load(found.step, found.model, found.optimizer, found.objective, objectives[found.phase])
    phase = "" if found.step == 0 else found.phase
    return replace(state, step=found.step, phase=phase), found.warnings


def save(
    stepper: Stepper,
    state: TrainState,
    plan: Plan,
    hooks: Hooks,
    writer: SnapshotWriter | None = None,
) -> Path:
    """Snapshot of the stepper as it is now."""
    if stepper.objective is None or stepper.optimizer is None:
        raise ValueError("A snapshot was asked before the first phase began.")
    path = (writer.save if writer else checkpoint.save_snapshot)(
        plan.snapshots,
        state.step,
        stepper.model_state(),
        stepper.optimizer.state_dict(),
        stepper.objective.state_dict(),
        {**hooks.extra(), "recipe_sha256": state.recipe_sha256},
        phase=stepper.objective.phase,
    )
    hooks.on_snapshot(state.step, path)
    return path


def _enter(stepper: Stepper, objective: Objective, hooks: Hooks, step: int) -> None:
    """First step of a phase. The optimizer starts afresh; at step 1 the one of the first snapshot is the same one."""
    hooks.on_phase(objective.phase, step)
    stepper.begin(objective)


def _one_step(stepper: Stepper, objective: Objective, step: int, hooks: Hooks) -> None:
    """Commit `step`, or skip it after MAX_REFUSALS refusals."""
    start = time.perf_counter()
    first = hooks.tried(step)
    for attempt in range(first, first + MAX_REFUSALS):
        proposal = stepper.propose(objective.next_batch(step), attempt=attempt)
        if stepper.judge.judge(proposal, stepper):
            if not (math.isfinite(proposal.loss) and math.isfinite(proposal.grad_norm)):
                raise GuardStopped(
                    f"Step {step} has loss {proposal.loss} and gradient norm {proposal.grad_norm}, and nothing refused it. It was "
                    "not committed. Turn the guard on (guard.enabled = true) to learn whose fault it is."
                )
            stepper.commit(proposal)
            hooks.on_step(_stats(proposal, time.perf_counter() - start))
            return
        stepper.discard(proposal)
    stepper.skip(step)
    hooks.on_skip(
        step,
        f"the judge refused this batch {MAX_REFUSALS} times without blaming the chip; it was left out",
    )


def _stats(proposal: Proposal, seconds: float) -> StepStats:
    return StepStats(
        step=proposal.step,
        phase=proposal.phase,
        loss=proposal.loss,
        grad_norm=proposal.grad_norm,
        learning_rate=proposal.learning_rate,
        tokens=proposal.tokens,
        seconds=seconds,
        reward=proposal.metrics.get("reward"),
        metrics={
            name: value
            for name, value in {**proposal.metrics, **load_metrics(proposal.expert_loads)}.items()
            if name != "reward" and math.isfinite(value)
        },
        layer_grad_norms=tuple(proposal.layer_grad_norms.values()),
    )
