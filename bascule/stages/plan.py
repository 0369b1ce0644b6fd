"""`bascule plan`: what would it cost. For a recipe's own pools, or for chips by the thousand."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from bascule.config.load import load_recipe
from bascule.config.recipe import Recipe
from bascule.errors import UsageError
from bascule.folder import write_atomic
from bascule.ledger import Ledger, of_kind
from bascule.plan import score
from bascule.plan.answer import answer
from bascule.plan.measured import pools_of
from bascule.plan.options import price_pools
from bascule.plan.page import render_page
from bascule.plan.render import cli_text, to_json
from bascule.records import OptionPriced
from bascule.stages import origin
from bascule.stages.answer import Answer, duration, say


def main(arguments: Namespace) -> Answer:
    words = arguments.words
    if words and words[0] == "score":
        if len(words) != 2:
            raise UsageError(
                "bascule plan score takes one table: bascule plan score FILE.csv [--kind train|inference]."
            )
        result = score.score_file(Path(words[1]), arguments.kind)
        return Answer(text=score.as_text(result), data=result)
    if arguments.train or arguments.serve:
        return _ask(arguments)
    if len(words) != 1:
        raise UsageError(
            "bascule plan needs a recipe, or --model with --train or --serve. Example: bascule plan runs/demo.toml"
        )
    recipe = origin.resolve(load_recipe(Path(words[0]), arguments.overrides))
    options = price_pools(recipe, {})
    plain = [one.model_dump(exclude={"schema_version", "kind"}) for one in options]
    return Answer(
        text="\n".join(f"{_line(one)}; rests on {one.basis}" for one in options),
        data={"pools": plain},
    )


def _ask(arguments: Namespace) -> Answer:
    """Chips by the thousand: time, energy, money, failures, and what a preference costs."""
    found = answer(
        arguments.model or "deepseek-v3",
        train=[arguments.train] if arguments.train else [],
        versus=arguments.versus,
        serve=arguments.serve,
        chip_file=Path(arguments.chips) if arguments.chips else None,
        anchors=arguments.anchor,
    )
    text = cli_text(found)
    if arguments.html:
        page = render_page(found)
        write_atomic(Path(arguments.html), lambda path: _write_text(path, page))
        text += f"\n\nPage: {arguments.html}"
    return Answer(text=text, data=to_json(found))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def plan_run(recipe: Recipe, ledger: Ledger) -> None:
    """Price the run's pools, once from what is known of the chips and once more from what qualification measured; both stay
    in the ledger beside what happened."""
    records = ledger.read()
    priced = of_kind(records, OptionPriced)
    measured = pools_of(records)
    if len(priced) >= len(recipe.pools) * (2 if measured else 1):
        return
    for option in price_pools(recipe, {}, measured):
        ledger.append(option)
        say(f"plan: {_line(option)}")  # what it rests on is in the report and in `bascule plan`


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
    return f"{option.pool} ({option.accelerator}): {option.memory_bytes / 2**30:.2f}{available} GiB, {option.fits}{time}{cost}"
