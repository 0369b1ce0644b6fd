"""Which chip answers for a finished run. No torch: the server's own process asks this too."""

from __future__ import annotations

from bascule.config.recipe import Recipe
from bascule.folder import RunFolder
from bascule.ledger import last, read_ledger
from bascule.records import Placement


def infer_choice(folder: RunFolder, recipe: Recipe, on: str | None) -> tuple[str, str | None]:
    """(accelerator's name, pool): `on` if given, else the pool the run placed for `infer`."""
    if on:
        return on, None
    placement = last(read_ledger(folder.ledger), Placement)
    pool = placement.infer if placement else recipe.order[0]
    return recipe.pools[pool].accelerator, pool
