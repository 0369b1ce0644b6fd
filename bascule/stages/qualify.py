"""`bascule qualify`: what is this chip fit for. Also the run's qualification stage: every pool, before any is placed."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bascule.accelerators.names import check_choices
from bascule.config.load import load_recipe
from bascule.config.model import PRESETS, ModelConfig
from bascule.config.recipe import Recipe
from bascule.config.trust import PoolConfig
from bascule.errors import CheckFailed, UsageError, nearest
from bascule.folder import RunFolder
from bascule.ledger import Ledger, of_kind
from bascule.plan.lengths import Lengths
from bascule.plan.needs import needs
from bascule.qualify import page
from bascule.qualify.battery import BatteryResult, run_battery
from bascule.qualify.judge import outdated
from bascule.records import Evidence, Placement, Verdict
from bascule.stages import material, origin, reexamine
from bascule.stages.answer import Answer, say
from bascule.stages.progress import ProgressBar

MARK = {"pass": "ok  ", "fail": "FAIL", "error": "FAIL", "not again": "gone", "skipped": "skip"}


def main(arguments: Namespace) -> Answer:
    """Exit 3 when any examined accelerator is unfit for any role."""
    if arguments.readmit:
        return reexamine.readmit(arguments)
    for name in arguments.accelerators:
        check_choices(name)  # all names, before the first is examined for minutes
    results = [_examine(name, arguments) for name in arguments.accelerators]
    report = Path(arguments.html or Path(arguments.out) / "report.html")
    page.write(report, results)
    judged = [verdict for result in results for verdict in result.verdicts]
    if arguments.require:
        refused = any(
            verdict.role in arguments.require and verdict.verdict != "fit" for verdict in judged
        )
    else:
        refused = any(verdict.verdict == "unfit" for verdict in judged)
    data = {
        "pools": {
            name: {
                "verdicts": {verdict.role: _plain(verdict) for verdict in result.verdicts},
                "evidence": [_plain(item) for item in result.evidence],
                "seconds": result.seconds,
                "note": result.note,
            }
            for name, result in zip(arguments.accelerators, results, strict=True)
        }
    }
    return Answer(
        text="\n".join(
            [*(line for result in results for line in _lines(result)), f"report: {report}"]
        ),
        data=data,
        exit_code=CheckFailed.exit_code if refused else 0,
    )


def _examine(name: str, arguments: Namespace) -> BatteryResult:
    bar = ProgressBar()

    def tell(item: Evidence) -> None:
        bar.clear()
        _say_evidence(item)

    model, needed = _asked(name, arguments)
    result = run_battery(
        name,
        name,
        model,
        Path(arguments.out) / _file_name(name),
        time_limit_s=arguments.time_limit,
        quick=not arguments.full,
        wide=arguments.wide,
        seed=arguments.seed,
        dtype=arguments.dtype,
        only=arguments.check,
        resume=arguments.resume,
        needs=needed,
        on_evidence=tell,
        on_progress=bar.show,
    )
    bar.clear()
    return result


def _asked(name: str, arguments: Namespace) -> tuple[ModelConfig, dict[str, float | str]]:
    """The model to examine, and what a recipe's plan counts on from this accelerator."""
    if not arguments.recipe:
        if arguments.preset not in PRESETS:
            raise UsageError(
                f"--preset '{arguments.preset}' is none; allowed: {', '.join(PRESETS)}.{nearest(arguments.preset, PRESETS)} Another model: --recipe FILE."
            )
        return ModelConfig(preset=arguments.preset), {}
    recipe = origin.resolve(load_recipe(Path(arguments.recipe), []))
    alone = {"pools": {"asked": PoolConfig(accelerator=name)}, "prefer": ("asked",)}
    return recipe.model, needs(recipe.model_copy(update=alone), "asked", material.lengths(recipe))


def qualify_pools(
    recipe: Recipe,
    folder: RunFolder,
    ledger: Ledger,
    *,
    check_stop: Callable[[], None] = lambda: None,
) -> None:
    """Examine every pool that has no verdict yet in this run, and go on with what an earlier launch had no time for where nothing
    could be placed for it; evidence and verdicts go to the ledger as they come."""
    cut_off = _cut_off(ledger)
    judged = _judged(recipe, ledger) - cut_off
    waiting = [pool for pool in recipe.order if pool not in judged]
    texts = material.lengths(recipe) if waiting else None
    with ThreadPoolExecutor(recipe.qualify.parallel) as threads:
        for done in [
            threads.submit(
                _qualify_pool, pool, recipe, folder, ledger, check_stop, pool in cut_off, texts
            )
            for pool in waiting
        ]:
            done.result()


def _qualify_pool(
    pool: str,
    recipe: Recipe,
    folder: RunFolder,
    ledger: Ledger,
    check_stop: Callable[[], None],
    resume: bool,
    texts: Lengths | None,
) -> None:
    check_stop()
    name = recipe.pools[pool].accelerator
    say(f"qualify {pool} ({name})" + (", going on where it was cut off" if resume else ""))
    result = run_battery(
        pool,
        name,
        recipe.model,
        folder.root / "evidence" / pool,
        time_limit_s=recipe.qualify.time_limit_s,
        quick=recipe.qualify.quick,
        seed=recipe.seed,
        threads=recipe.threads,
        chips=recipe.pools[pool].chips,
        resume=resume,
        needs=needs(recipe, pool, texts),
        on_evidence=ledger.append,
        on_progress=lambda question, done, total: check_stop(),
    )
    if result.note:
        ledger.warn("accelerator fallback", f"pool {pool}: {result.note}")
    ledger.append(*result.verdicts)
    page.write(result.folder / "report.html", [result])
    for line in _lines(result):
        say(line)


def _cut_off(ledger: Ledger) -> set[str | None]:
    """Pools of a run that never began, whose examination an earlier launch could not finish: a busy machine must not make its folder
    a dead end. Once a run has begun, its placement rests on the verdicts that it had."""
    records = ledger.read()
    if of_kind(records, Placement):
        return set()
    newest = {(one.pool, one.role): one for one in of_kind(records, Verdict)}
    return {pool for (pool, _), one in newest.items() if one.cut_off}


def _judged(recipe: Recipe, ledger: Ledger) -> set[str | None]:
    """Pools whose newest verdicts still hold; a void one is said and asked again."""
    newest = {(verdict.pool, verdict.role): verdict for verdict in of_kind(ledger.read(), Verdict)}
    judged = {pool for pool, _ in newest}
    for (pool, role), verdict in newest.items():
        why = outdated(
            verdict, recipe.model, now_s=time.time(), max_age_days=recipe.qualify.max_age_days
        )
        if why:
            ledger.warn("verdict void", f"pool {pool}, {role}: {why}; it is examined again")
            judged.discard(pool)
    return judged


def _lines(result: BatteryResult) -> list[str]:
    simulated = ", simulated" if result.examined.simulated else ""
    return [
        f"{verdict.pool} ({result.examined.chip}{simulated}): {verdict.verdict} to {verdict.role}: {'; '.join(verdict.reasons[:3])}"
        for verdict in result.verdicts
    ]


def _say_evidence(item: Evidence) -> None:
    say(
        f"  {MARK[item.outcome]} {item.check} [{', '.join(item.roles)}] {item.detail} ({item.seconds:.1f} s)"
    )


def _plain(record: Evidence | Verdict) -> dict[str, object]:
    return record.model_dump(exclude={"schema_version", "kind", "attempt"})


def _file_name(accelerator: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in accelerator)
