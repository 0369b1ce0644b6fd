"""`bascule plan`: what would it cost. For a recipe's own pools, or for chips by the thousand."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from bascule.config import Recipe, load_recipe
from bascule.errors import UsageError
from bascule.ledger import Ledger, of_kind
from bascule.plan.options import price_pools
from bascule.records import OptionPriced
from bascule.stages.answer import Answer, duration, say


def main(arguments: Namespace) -> Answer:
    if arguments.recipe and not (arguments.model or arguments.train or arguments.serve):
        recipe = load_recipe(Path(arguments.recipe), arguments.overrides)
        options = price_pools(recipe, {})
        return Answer(
            text="\n".join(_line(one) for one in options),
            data={"pools": [one.model_dump(exclude={"schema_version", "kind"}) for one in options]},
        )
    raise UsageError(
        "bascule plan needs a recipe, or --model with --train or --serve. Example: bascule plan runs/demo.toml"
    )


def plan_run(recipe: Recipe, ledger: Ledger) -> None:
    """Price the run's pools once; what the plan said stays in the ledger beside what happened."""
    if of_kind(ledger.read(), OptionPriced):
        return
    for option in price_pools(recipe, {}):
        ledger.append(option)
        say(f"plan: {_line(option)}")


def _line(option: OptionPriced) -> str:
    available = (
        f" of {option.memory_available_bytes / 2**30:.1f}" if option.memory_available_bytes else ""
    )
    time = ""
    if option.train_s is not None:
        interval = (
            f" (80 %: {duration(option.train_s_low)} to {duration(option.train_s_high)})"
            if option.train_s_low and option.train_s_high
            else ""
        )
        time = f", training about {duration(option.train_s)}{interval}"
    cost = f", {option.cost:.2f} {option.cost_unit}" if option.cost is not None else ""
    return f"{option.pool} ({option.accelerator}): {option.memory_bytes / 2**30:.2f}{available} GiB, {option.fits}{time}{cost}; rests on {option.basis}"
