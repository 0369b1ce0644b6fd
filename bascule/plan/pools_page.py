"""A recipe's own pools as one self-contained HTML page: time with its interval, what it is made of, memory, money."""

from __future__ import annotations

import html
from collections.abc import Sequence

from bascule.plan.answer import Estimate
from bascule.plan.charts import interval_bars, stacks
from bascule.plan.figures import number
from bascule.plan.memory import GIB
from bascule.plan.page import framed, section
from bascule.records import OptionPriced

UNITS = (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0))


def render_pools(name: str, options: Sequence[OptionPriced]) -> str:
    timed = [one for one in options if one.train_s]
    unit, seconds = next(
        (pair for pair in UNITS if max([one.train_s or 0 for one in timed] + [1]) >= 2 * pair[1]),
        UNITS[-1],
    )
    sections = [section("Pools, preferred first", _table(options, unit, seconds))]
    if timed:
        bars = [(_name(one), _time(one, unit, seconds)) for one in timed]
        parts = [(_name(one), one.train_components_s) for one in timed]
        sections.append(section("Time to train", interval_bars(bars)))
        sections.append(section("What the time is made of", stacks(parts, unit, seconds)))
    memory = [(_name(one), one.memory_components_bytes) for one in options]
    sections.append(section("Memory of one chip", stacks(memory, "GiB", GIB)))
    basis = "".join(
        f"<li><b>{html.escape(_name(one))}</b>: {html.escape(one.basis)}</li>" for one in options
    )
    sections.append(section("What it rests on", f"<ul>{basis}</ul>"))
    first = options[0]
    lead = f"{_name(first)}: {first.fits}"
    if first.train_s:
        lead += f", {number(first.train_s / seconds)} {unit} of training"
    return framed(
        f"What would {name} cost on its own pools?",
        f"{number(first.parameters / 1e6)} M parameters",
        lead + ".",
        sections,
    )


def _time(one: OptionPriced, unit: str, seconds: float) -> Estimate:
    value, low, high = (
        (time or 0.0) / seconds for time in (one.train_s, one.train_s_low, one.train_s_high)
    )
    return Estimate(value, low, high, unit, one.basis)


def _name(one: OptionPriced) -> str:
    return one.pool or "pool"


def _table(options: Sequence[OptionPriced], unit: str, seconds: float) -> str:
    """A column a pool, as the page of chips by the thousand has one an option: a phone shows it whole."""
    rows = [
        ("accelerator", [one.accelerator for one in options]),
        ("memory, GiB", [_memory(one) for one in options]),
        (f"training, {unit}", [number(one.train_s / seconds) if one.train_s else "unknown" for one in options]),
        ("energy", [f"{number(one.energy_j / 3.6e6)} kWh" if one.energy_j else "not measured" for one in options]),
        ("money", [f"{number(one.cost)} {one.cost_unit}" if one.cost is not None else "no price given" for one in options]),
    ]  # fmt: skip
    head = "".join(f"<th>{html.escape(_name(one))}</th>" for one in options)
    lines = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return f"<table><tr><th></th>{head}</tr>{lines}</table>"


def _memory(one: OptionPriced) -> str:
    room = f" of {number(one.memory_available_bytes / GIB)}" if one.memory_available_bytes else ""
    return f"{number(one.memory_bytes / GIB)}{room} ({one.fits})"
