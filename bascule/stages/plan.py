"""`bascule plan`: what would it cost. For a recipe's own pools, or for chips by the thousand."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from bascule.config.load import load_recipe
from bascule.config.recipe import Recipe
from bascule.errors import UsageError
from bascule.folder import write_atomic
from bascule.ledger import Ledger, of_kind
from bascule.plan import score
from bascule.plan.answer import answer
from bascule.plan.measured import measured_pools, pools_of, read_run
from bascule.plan.options import price_pools
from bascule.plan.page import render_page
from bascule.plan.pools_page import render_pools
from bascule.plan.render import cli_text, to_json
from bascule.records import OptionPriced
from bascule.stages import material, origin
from bascule.stages.answer import Answer, duration, say


def main(arguments: Namespace) -> Answer:
    words = arguments.words
    if words and words[0] == "score":
        return _score(arguments)
    _one_question(arguments)
    if arguments.train or arguments.serve:
        return _ask(arguments)
    recipe = origin.resolve(load_recipe(Path(words[0]), arguments.overrides))
    measured = _measured(arguments.chips, recipe)
    options = price_pools(recipe, {}, measured, material.lengths(recipe))
    plain = [one.model_dump(exclude={"schema_version", "kind"}) for one in options]
    text = "\n".join(f"{_line(one)}; rests on {one.basis}" for one in options)
    return Answer(
        text=text + _page(arguments.html, lambda: render_pools(recipe.name, options)),
        data={"pools": plain},
    )


def _score(arguments: Namespace) -> Answer:
    if len(arguments.words) != 2 or arguments.html or arguments.chips or arguments.anchor:
        raise UsageError(
            "bascule plan score takes one table and nothing else: bascule plan score FILE.csv [--kind train|inference] [--json]."
        )
    result = score.score_file(Path(arguments.words[1]), arguments.kind)
    return Answer(text=score.as_text(result), data=result)


def _one_question(arguments: Namespace) -> None:
    """A recipe's pools, or a model on chips by the thousand: words that would go unheard are refused."""
    if arguments.html and Path(arguments.html).is_dir():
        raise UsageError(
            f"--html '{arguments.html}' is a folder; give the page a file's name, for instance {Path(arguments.html) / 'plan.html'}."
        )
    words, asked = arguments.words, arguments.train or arguments.serve
    about_models = {
        "--model": arguments.model,
        "--train": arguments.train,
        "--serve": arguments.serve,
        "--versus": arguments.versus,
        "--anchor": arguments.anchor,
    }
    unheard = [name for name, value in about_models.items() if value]
    if arguments.kind:
        raise UsageError("--kind says what a scored table holds: bascule plan score FILE.csv --kind train.")  # fmt: skip
    if words and unheard:
        raise UsageError(
            f"'{words[0]}' is priced on its own pools, and {unheard[0]} is about a model on chips by the thousand; ask one of the two."
        )
    if words and arguments.chips and not Path(arguments.chips).is_dir():
        there = "is a file" if Path(arguments.chips).exists() else "is not there"
        raise UsageError(
            f"--chips '{arguments.chips}' {there}: a recipe's pools take what qualify measured, from a run's folder such as out/demo; chip files in TOML are for --train and --serve."
        )
    if len(words) > 1:
        raise UsageError(f"bascule plan takes one recipe; {len(words)} words were given.")
    if not words and not asked:
        missing = f"{unheard[0]} alone asks nothing: add" if unheard else "bascule plan needs a recipe, or --model with"  # fmt: skip
        raise UsageError(
            f"{missing} --train or --serve. Example: bascule plan --model deepseek-v3 --train '2048 x H800, 14.8T tokens'; bascule plan runs/demo.toml"
        )
    if arguments.versus and not arguments.train:
        raise UsageError(
            "--versus is compared with --train; say the first option with --train '2048 x H800, 14.8T tokens'."
        )


def _measured(folder: str | None, recipe: Recipe) -> dict[str, dict[str, float | str]] | None:
    """What the pools did in a run of this recipe, or of another on the same pools."""
    if folder is None:
        return None
    return measured_pools(read_run(Path(folder)), recipe)


def _page(path: str | None, render: Callable[[], str]) -> str:
    """Write the page where one was asked for; what to say of it."""
    if not path:
        return ""
    page = render()
    write_atomic(Path(path), lambda place: _write_text(place, page))
    return f"\n\nPage: {path}"


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
    text = cli_text(found) + _page(arguments.html, lambda: render_page(found))
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
    for option in price_pools(recipe, {}, measured, material.lengths(recipe)):
        ledger.append(option)
        say(f"plan: {_line(option)}")  # what it rests on is in the report and in `bascule plan`
        if option.fits == "does not fit" and not _was_too_large(option.pool, priced):
            ledger.warn("memory forecast", _too_large(option))


def _was_too_large(pool: str | None, priced: Sequence[OptionPriced]) -> bool:
    """Was that said already, when the pool was priced before? Once is enough."""
    return any(one.pool == pool and one.fits == "does not fit" for one in priced)


def _too_large(option: OptionPriced) -> str:
    available = option.memory_available_bytes or 0.0
    return (
        f"pool {option.pool} ({option.accelerator}) is planned to take {option.memory_bytes / 2**30:.1f} GiB at its peak and has "
        f"{available / 2**30:.1f}. A forecast stops nothing: the pool is examined and used in its turn. If memory runs out, that is an incident; the run "
        "then goes on from a snapshot where its order allows, and ends with exit code 6 where no pool is left. Smaller steps: lower "
        "sft.batch_sequences, pretrain.batch_sequences or grpo.prompts."
    )


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
