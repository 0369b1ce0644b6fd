"""A pool that failed is examined again: for `infer` before it serves or rolls out once more, and on its owner's word before it trains.

What broke in training may break in inference too, so an old verdict for `infer` does not outlive a condemnation for `train`.
A condemned pool comes back only through `bascule qualify POOL --readmit RUN`, after its owner mended something; never by itself.
No torch.
"""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from bascule.config.load import read_resolved
from bascule.config.recipe import Recipe
from bascule.errors import BasculeError, CheckFailed, Preempted, UsageError, nearest
from bascule.fallback.policy import condemned
from bascule.folder import RunFolder
from bascule.ledger import Ledger
from bascule.qualify.battery import BatteryResult, run_battery
from bascule.records import AnyRecord, PoolCondemned, PoolReadmitted, Role, Verdict
from bascule.stages.answer import Answer, say

MORE_TIME = ". Where time was short, give it more: --time-limit S"


def owed(records: Sequence[AnyRecord]) -> list[str]:
    """Pools condemned for `train` whose verdict for `infer` is older than that, and which may still infer as far as is known."""
    found: dict[str, None] = {}
    for record in records:
        if isinstance(record, PoolCondemned) and record.pool and record.role == "train":
            found[record.pool] = None
        elif isinstance(record, Verdict) and record.pool and record.role == "infer":
            found.pop(record.pool, None)
    return [pool for pool in found if (pool, "infer") not in condemned(records)]


class Reexamination:
    """Examines owed pools for `infer` in a thread beside training, which need not wait for it; the rollout engine does."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, ledger: Ledger, check_stop: Callable[[], None]
    ) -> None:
        self.recipe, self.folder, self.ledger = recipe, folder, ledger
        self.check_stop = check_stop
        self._thread: threading.Thread | None = None
        self._failed: BasculeError | OSError | None = None
        self._over = False

    def pending(self) -> bool:
        """Is an answer still to come? Starts what is owed. Raises what ended an examination (a stop request, a refusal)."""
        if self._thread is not None and self._thread.is_alive():
            return True
        if self._failed is not None:
            raise self._failed
        waiting = owed(self.ledger.read())
        if not waiting:
            return False
        self._thread = threading.Thread(target=self._examine, args=(waiting,), daemon=True)
        self._thread.start()
        return True

    def close(self) -> None:
        """Nobody waits for the answer any more; what is still owed is asked by the next start of this run."""
        self._over = True
        if self._thread is not None:
            self._thread.join()

    def _check(self) -> None:
        if self._over:
            raise Preempted("The run ended before the examination did.")
        self.check_stop()

    def _examine(self, pools: list[str]) -> None:
        try:
            for pool in pools:
                say(f"{pool} failed in training; it is examined again before it infers")
                examine(self.recipe, self.folder, self.ledger, pool, ("infer",), self._check)
        except (BasculeError, OSError) as error:
            self._failed = error


def examine(
    recipe: Recipe,
    folder: RunFolder,
    ledger: Ledger,
    pool: str,
    roles: tuple[Role, ...],
    check_stop: Callable[[], None] = lambda: None,
    *,
    full: bool = False,
    time_limit_s: float | None = None,
) -> BatteryResult:
    """One battery of a run's pool, asked anew; verdicts go to the ledger. `time_limit_s`: unset, the recipe's."""
    config = recipe.pools[pool]
    result = run_battery(
        pool, config.accelerator, recipe.model, folder.root / "evidence" / f"{pool}-again",
        time_limit_s=time_limit_s or recipe.qualify.time_limit_s, quick=recipe.qualify.quick and not full, seed=recipe.seed, threads=recipe.threads,
        chips=config.chips, roles=roles, on_progress=lambda question, done, total: check_stop(),
    )  # fmt: skip
    ledger.append(*result.evidence, *result.verdicts)
    for verdict in result.verdicts:
        say(f"{pool}: {verdict.verdict} to {verdict.role}: {'; '.join(verdict.reasons[:3])}")
    return result


def readmit(arguments: Namespace) -> Answer:
    """`bascule qualify POOL --readmit RUN`. Exit 3 when a condemned role is still not fit."""
    folder = RunFolder(Path(arguments.readmit))
    if not folder.recipe.exists():
        raise UsageError(f"'{folder.root}' is no run folder (it holds no recipe.json). Name one, e.g. --readmit out/demo.")  # fmt: skip
    recipe = read_resolved(folder.recipe)
    ledger = Ledger(folder.ledger, attempt=max(one.attempt for one in Ledger(folder.ledger).read()))
    lines, refused, data = [], False, {}
    for pool in arguments.accelerators:
        roles = _lost(recipe, ledger, pool)
        examined = examine(recipe, folder, ledger, pool, roles, full=arguments.full, time_limit_s=arguments.time_limit)  # fmt: skip
        found = {one.role: one for one in examined.verdicts}
        for role in roles:
            verdict = found[role]
            data[f"{pool}.{role}"] = verdict.verdict
            if verdict.verdict == "fit":
                reason = f"examined again on its owner's word: {'; '.join(verdict.reasons[:2])}"
                ledger.append(PoolReadmitted(pool=pool, role=role, reason=reason))
                lines.append(f"{pool} is readmitted to {role}; the run places it when it is next started")  # fmt: skip
            else:
                refused = True
                lines.append(f"{pool} is {verdict.verdict} to {role} and stays out: {'; '.join(verdict.reasons[:3])}{MORE_TIME if verdict.verdict == 'unproven' else ''}")  # fmt: skip
    return Answer(text="\n".join(lines), data=data, exit_code=CheckFailed.exit_code if refused else 0)  # fmt: skip


def _lost(recipe: Recipe, ledger: Ledger, pool: str) -> tuple[Role, ...]:
    """The roles that `pool` was condemned for."""
    if pool not in recipe.pools:
        raise UsageError(f"The run has no pool '{pool}'; allowed: {', '.join(recipe.pools)}.{nearest(pool, recipe.pools)}")  # fmt: skip
    roles = tuple(sorted(role for name, role in condemned(ledger.read()) if name == pool))
    if not roles:
        raise UsageError(f"The pool '{pool}' is not condemned in this run; there is nothing to readmit.")  # fmt: skip
    return roles
