"""`bascule run`: one recipe from plan to report. The supervisor: owns the ledger's decisions, imports no torch, can be killed at any instant.

Each stage reads what earlier ones left in the run folder and appends what it found, so the same command resumes a run that
was cut off, and a finished run says so and changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType

from bascule.config.load import load_recipe, read_resolved
from bascule.config.recipe import Recipe
from bascule.errors import (
    EXIT_SIGINT,
    BasculeError,
    CheckFailed,
    Preempted,
    RecipeError,
)
from bascule.folder import RunFolder, write_json_atomic
from bascule.ledger import Ledger, last, read_ledger
from bascule.records import (
    AnyRecord,
    DialTurned,
    Evaluation,
    RecipeResolved,
    RunFinished,
    RunResumed,
    RunStarted,
    RunStopped,
    StepStats,
)
from bascule.report.story import summary
from bascule.stages import material, origin, place, plan, qualify, report, train
from bascule.stages.answer import Answer, say
from bascule.stages.hold import sole_supervisor
from bascule.terminal import let_go_of_dead_terminal
from bascule.train.store import check_url


def main(arguments: Namespace) -> Answer:
    overrides = list(arguments.overrides) + ([f'name="{arguments.name}"'] if arguments.name else [])
    if arguments.strict:
        overrides.append("strict=true")
    recipe = load_recipe(Path(arguments.recipe), overrides)
    return run(recipe, RunFolder(Path(arguments.out) / recipe.name))


def run(
    recipe: Recipe, folder: RunFolder, *, stop_when: Callable[[], bool] = lambda: False
) -> Answer:
    """Carry the run as far as it goes. Raises the error that ended it, after recording it. `stop_when` asks training to stop, as
    SIGTERM does: a drill looks at the folder half-way."""
    recipe, turned = origin.resolve_and_derive(recipe)
    with sole_supervisor(folder) as hold, _signals() as stop:
        records = read_ledger(folder.ledger)
        refuse_changed_recipe(recipe, folder)
        if last(records, RunFinished):
            if not folder.report.exists():
                report.write(folder)
            return _finished(recipe, folder, "was already finished; nothing was done")
        # Before the run begins: a slip must not tie its folder to the wrong recipe.
        material.check(recipe)
        if recipe.train.snapshots:
            check_url(recipe.train.snapshots)
        attempt = 1 + max((record.attempt for record in records), default=0)
        ledger = Ledger(folder.ledger, attempt=attempt, strict=recipe.strict)
        _open_run(recipe, turned, folder, ledger, records)
        try:
            material.warn_of_threads(recipe, ledger)
            origin.prepare(recipe, folder, ledger)
            plan.plan_run(recipe, ledger)
            qualify.qualify_pools(recipe, folder, ledger, check_stop=stop.check)
            plan.plan_run(recipe, ledger)
            place.place_roles(recipe, ledger)
            train.train(
                recipe,
                folder,
                ledger,
                should_stop=lambda: hold.check() or stop.asked() or stop_when(),
            )
        except BasculeError as error:
            hold.check()  # a folder that is somebody else's by now gets no last words
            ledger.append(RunStopped(reason=str(error), exit_code=stop.exit_code(error)))
            report.write(folder)
            if stop.interrupted and isinstance(error, Preempted):
                raise KeyboardInterrupt from None
            raise
        report.write(folder)
        return _finished(recipe, folder, "is finished")


def refuse_changed_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """A half-finished run continues only under the recipe it began with. Raises RecipeError naming the settings that differ."""
    if not folder.recipe.exists():
        return
    # Read through today's settings: one that a newer bascule added counts as its default, not as a change.
    old = json.loads(read_resolved(folder.recipe).model_dump_json())
    changed = list(_differences(old, json.loads(recipe.model_dump_json()), ""))
    if changed:
        raise RecipeError(
            f"The run folder {folder.root} was begun with another recipe; changed: {'; '.join(changed[:5])}. "
            "Restore these settings to resume it, or give the new run its own folder with --name."
        )


def _differences(old: object, new: object, path: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            # `strict` says how warnings are taken, not what is computed: it may change between attempts.
            if not (path == "" and name == "strict"):
                yield from _differences(old.get(name), new.get(name), f"{path}{name}.")
    elif old != new:
        yield f"{path.rstrip('.')} was {json.dumps(old)}, now {json.dumps(new)}"


def _open_run(
    recipe: Recipe,
    turned: DialTurned | None,
    folder: RunFolder,
    ledger: Ledger,
    records: list[AnyRecord],
) -> None:
    folder.create()
    resolved = json.loads(recipe.model_dump_json())
    digest = hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()
    if not folder.recipe.exists():
        write_json_atomic(folder.recipe, resolved)
    if not records:
        machine = (
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
        )
        ledger.append(RunStarted(name=recipe.name, version=version("bascule"), machine=machine))
        ledger.append(RecipeResolved(recipe_sha256=digest, recipe=resolved))
        if turned and turned.derived:
            ledger.append(turned)
        say(f"run {recipe.name} begins in {folder.root}")
        return
    steps = last(records, StepStats)
    ledger.append(
        RunResumed(from_step=steps.step if steps else 0, reason="the same command was given again")
    )
    say(f"run {recipe.name} resumes in {folder.root} (attempt {ledger.attempt})")


def _finished(recipe: Recipe, folder: RunFolder, how: str) -> Answer:
    """The answer of a finished run. Raises CheckFailed when its evaluation gate is not reached; the model is there all the same."""
    records = read_ledger(folder.ledger)
    gate, reached = recipe.evaluate.min_pass_at_1, last(records, Evaluation)
    if gate is not None and reached is not None and reached.pass_at_1 < gate:
        raise CheckFailed(
            f"The run {how}, but pass@1 is {reached.pass_at_1:.1%} and evaluate.min_pass_at_1 asks for {gate:.1%}. Report: {folder.report}"
        )
    data = summary(records)
    text = f"{data['headline']}\nThe run {how}. Report: {folder.report}\nTalk to the model: bascule chat {folder.root}"
    return Answer(text=text, data=data)


class _Stop:
    """Whether someone asked the run to stop, and how. SIGTERM preempts (75), and so does a terminal that closes (SIGHUP); Ctrl-C snapshots
    too, then ends with 130; a second one does not wait for that: what a killed run loses is at most the steps since its last snapshot."""

    def __init__(self) -> None:
        self.terminated = False
        self.interrupted = False
        self.asked_s: float | None = None

    def asked(self) -> bool:
        return self.terminated or self.interrupted

    def check(self) -> None:
        """Raise Preempted if someone asked: for stages that have no state to save."""
        if self.asked():
            raise Preempted(
                "Stopped on request; nothing is lost. Run the same command again to go on."
            )

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.interrupted:
            say(
                "stopped at once: steps since the newest snapshot are computed again by the same command"
            )
            raise KeyboardInterrupt
        self.asked_s = self.asked_s or time.time()
        self.terminated |= number in (signal.SIGTERM, signal.SIGHUP)
        self.interrupted |= number == signal.SIGINT
        if number == signal.SIGHUP:
            let_go_of_dead_terminal()
        again = " (Ctrl-C again to stop at once)" if number == signal.SIGINT else ""
        say(f"asked to stop: the step in progress is finished and a snapshot taken first{again}")

    def exit_code(self, error: BasculeError) -> int:
        return EXIT_SIGINT if self.interrupted and isinstance(error, Preempted) else error.exit_code


@contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop()
    heard = [signal.SIGTERM, signal.SIGINT]
    if (
        signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    ):  # nohup's wish: go on without a terminal
        heard.append(signal.SIGHUP)
    old = {number: signal.signal(number, stop.on_signal) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
