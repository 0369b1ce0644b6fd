"""A run folder to rehearse in: the copy of an owner's run, or a fresh one that keeps the verdicts. The owner's is only read. No torch.

In the copy one pool's accelerator is another (a fault is planted on it), so the recipe differs, and snapshots know their recipe by
its hash: the copies' hashes are written anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bascule.config.recipe import Recipe
from bascule.folder import RunFolder, sha256_of, write_json_atomic
from bascule.ledger import Ledger, last, of_kind, read_ledger
from bascule.records import (
    Evidence,
    RecipeResolved,
    RunFinished,
    RunStarted,
    TrainPrecision,
    Verdict,
)


def copy_run(owner: RunFolder, to: RunFolder, planted: Recipe) -> str | None:
    """Copy an unfinished run, snapshots and all, under the recipe `planted`. Returns why not, when there is nothing to copy."""
    records = read_ledger(owner.ledger)
    if not records or not any(owner.snapshots.glob("step-*")):
        return "it has no snapshots yet"
    if last(records, RunFinished):
        return "it is finished"
    with _held(owner) as free:
        if not free:
            return "it is running now"
        for folder in (owner.snapshots, owner.tokenizer, owner.weights):
            if folder.exists():
                _copy_folder(folder, to.root / folder.name)
        before = hashlib.sha256(owner.recipe.read_bytes()).hexdigest()
        _write_recipe(to, planted)
        after = sha256_of(to.recipe)
        for snapshot in to.snapshots.glob("step-*"):
            _under_recipe(snapshot, before, after)
        shutil.copyfile(owner.ledger, to.ledger)  # last: a copy that was cut off is made again
    return None


def fresh_run(examined: RunFolder, to: RunFolder, planted: Recipe) -> None:
    """A run that has not begun, with another's verdicts: its chips were good when they were examined."""
    to.create()
    _write_recipe(to, planted)
    records = read_ledger(examined.ledger)
    kept = [one for one in records if isinstance(one, RunStarted | Evidence | Verdict | TrainPrecision)]  # fmt: skip
    resolved = of_kind(records, RecipeResolved)[0]
    Ledger(to.ledger).append(
        kept[0],
        resolved.model_copy(update={"recipe": json.loads(planted.model_dump_json())}),
        *kept[1:],
    )


def _copy_folder(folder: Path, to: Path) -> None:
    """In the place of an empty folder, or of what a copy that was cut off left."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)


def _write_recipe(folder: RunFolder, recipe: Recipe) -> None:
    write_json_atomic(folder.recipe, json.loads(recipe.model_dump_json()))


def _under_recipe(snapshot: Path, before: str, after: str) -> None:
    """Only where the state is what its manifest says: a damaged snapshot stays damaged."""
    state, manifest = snapshot / "state.json", snapshot / "manifest.json"
    try:
        listed = json.loads(manifest.read_text(encoding="utf-8"))
        told = json.loads(state.read_text(encoding="utf-8"))
        whole = listed["state.json"]["sha256"] == sha256_of(state)
        if not whole or told["extra"]["recipe_sha256"] != before:
            return
    except (OSError, ValueError, KeyError, TypeError):
        return
    told["extra"]["recipe_sha256"] = after
    write_json_atomic(state, told)
    listed["state.json"] = {"sha256": sha256_of(state), "bytes": state.stat().st_size}
    write_json_atomic(manifest, listed)


@contextmanager
def _held(owner: RunFolder) -> Iterator[bool]:
    """Keep a supervisor from starting in the owner's folder while it is read; False when one is at work there."""
    lock = owner.root / "lock"
    if not lock.exists():
        yield True
        return
    with open(lock, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
