"""The answer as one self-contained HTML page: bars with intervals, step and memory breakdown, calendar, tornado, roofline.

The charts are `charts.py`'s, the frame is `page.html`.
"""

from __future__ import annotations

import datetime
import html
from collections.abc import Callable, Sequence
from importlib import resources
from string import Template

from bascule.plan.answer import Answer, Estimate, Preference, TrainingAnswer
from bascule.plan.charts import Finish, calendar, interval_bars, roofline, stacks, tornado
from bascule.plan.cost import gemm_peak, memory_bytes_s
from bascule.plan.figures import Triple, count, moved, number
from bascule.plan.memory import GIB, stage_parts
from bascule.plan.memory import shipped_memory as memory_constants
from bascule.plan.render import LONGEST_DAYS, finish_dates, service_text
from bascule.plan.service_price import Service


def render_page(answer: Answer, *, start: datetime.date | None = None) -> str:
    """The page as text. `start`: first day of the calendar (default: today)."""
    first = start or datetime.date.today()
    sections = [
        section(f"Price of preferring {p.second} to {p.first}", _price(p))
        for p in answer.preferences
    ]
    if answer.anchors or answer.notes:
        sections.append(section("Your own runs", _own(answer)))
    if answer.trainings:
        sections.append(section("Options side by side", _table(answer.trainings)))
        sections += [section(title, _bars(answer.trainings, pick)) for title, pick in (("Days to finish", lambda t: t.days), ("Chip-hours", lambda t: t.chip_hours), ("Energy", lambda t: t.energy))]  # fmt: skip
        if any(t.money for t in answer.trainings):
            sections.append(section("Money", _bars(answer.trainings, _money)))
        sections.append(
            section(
                "What a step is made of",
                stacks([(t.name, t.step.parts) for t in answer.trainings], "s", 1.0),
            )
        )
        sections += [
            section(f"Memory by pipeline stage, {t.name}", _memory(t)) for t in answer.trainings
        ]
        sections.append(section("Calendar", _calendar(answer.trainings, first)))
        sections += [section(f"Roofline, {t.name}", _roofline(t)) for t in answer.trainings]
    sections += [
        section(f"What could turn the answer: {p.second} over {p.first}", _tornado(p))
        for p in answer.preferences
    ]
    sections += [section(f"Serving on {s.ask.chip.name}", _service(s)) for s in answer.services]
    sections += [section("What it rests on", _basis(answer))]
    shape = answer.model
    return framed(
        f"What would {shape.name} cost?",
        f"{count(shape.parameters)} parameters, {count(shape.active_weights)} used by a token",
        _lead(answer),
        sections,
    )


def framed(title: str, model: str, lead: str, sections: Sequence[str]) -> str:
    """The page around its sections."""
    template = Template(
        resources.files("bascule.plan").joinpath("page.html").read_text(encoding="utf-8")
    )
    return template.substitute(
        title=html.escape(title),
        model=html.escape(model),
        lead=html.escape(lead),
        sections="\n".join(sections),
    )


def _own(answer: Answer) -> str:
    """The user's own runs: a table of them beside what was forecast, then what they changed, as bars."""
    lines = "".join(
        f"<tr><td class='words'>{html.escape(one.words)}</td><td>{number(one.value)}</td>"
        f"<td>{number(one.forecast[0])} <span class='soft'>{number(one.forecast[1])} to {number(one.forecast[2])}</span></td><td>{one.ratio:.2f}x</td></tr>"
        for one in answer.anchors
    )
    head = "<tr><th>run</th><th>measured, tokens/s per chip</th><th>forecast without it</th><th>ratio</th></tr>"
    table = f"<table class='own'>{head}{lines}</table>" if answer.anchors else ""
    bars = [
        _changed(t.name, (b.value, b.low, b.high), (n.value, n.low, n.high), "tokens/s per chip")
        for t in answer.trainings
        if (b := t.without_own) and (n := t.tokens_per_s_chip)
    ]
    for s in answer.services:
        if s.without_own:
            names = (f"{s.ask.chip.name}, decode", f"{s.ask.chip.name}, prefill")
            pairs = zip(names, s.without_own, (s.decode, s.prefill), strict=True)
            bars += [_changed(*pair, "tokens/s per chip") for pair in pairs]
    notes = "".join(f'<p class="soft">Note: {html.escape(note)}.</p>' for note in answer.notes)
    return table + "".join(bars) + notes


def _changed(name: str, before: Triple, now: Triple, unit: str) -> str:
    """A forecast without and with the user's own runs."""
    pair = [("published runs alone", before), ("with your own", now)]
    bars = interval_bars([(words, Estimate(*triple, unit, "")) for words, triple in pair])
    return f"<p>{html.escape(name)}: {html.escape(moved(before, now))}</p>{bars}"


def _money(t: TrainingAnswer) -> Estimate:
    return t.money or Estimate(0.0, 0.0, 0.0, "USD", "")


def _service(s: Service) -> str:
    """The rates as cards, a decoding step as a bar, the rest in words."""
    facts = [
        (f"{number(s.decode[0])} tokens/s", f"decode, a chip; 80 %: {number(s.decode[1])} to {number(s.decode[2])}"),
        (f"{number(s.prefill[0])} tokens/s", f"prefill, a chip; 80 %: {number(s.prefill[1])} to {number(s.prefill[2])}"),
        (f"{s.tpot_s[0] * 1e3:.1f} ms", f"a token at {number(s.batch_per_chip)} sequences a chip"),
        (f"{s.ttft_s:.2f} s", f"to the first token, {'kept' if s.ttft_kept else 'NOT kept'}"),
    ]  # fmt: skip
    bar = stacks([("a decoding step", s.parts)], "ms", 1e-3)
    return f"{_cards(facts)}{bar}<pre>{html.escape(service_text(s))}</pre>"


def _cards(facts: Sequence[tuple[str, str]]) -> str:
    cards = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span class="soft">{html.escape(what)}</span></div>'
        for value, what in facts
    )
    return f'<div class="cards">{cards}</div>'


def _price(p: Preference) -> str:
    """What the preference costs, break-even first."""
    even, dollars = p.break_even, p.break_even_usd_h
    pays = f"the other's price a chip-hour, below which it pays; 80 %: {even.low:.2f}x to {even.high:.2f}x"
    facts = [(f"{even.value:.2f}x", pays)]
    if dollars:
        span = f"80 %: {dollars.low:.2f} to {dollars.high:.2f}"
        facts.append((f"{dollars.value:.2f} USD", f"a chip-hour, the same in money; {span}"))
    facts += [
        (f"{p.time_ratio:.2f}x", "the time"),
        (f"{p.chip_hours_ratio:.2f}x", "the chip-hours"),
        (f"{p.energy_ratio:.2f}x", "the energy"),
    ]
    if p.money_ratio is not None:
        facts.append((f"{p.money_ratio:.2f}x", "the money"))
    return _cards(facts)


def _lead(answer: Answer) -> str:
    if answer.preferences:
        return " ".join(
            f"{p.second} pays below {p.break_even.value:.2f}x the price of {p.first} per chip-hour (80 %: {p.break_even.low:.2f}x to {p.break_even.high:.2f}x)."
            for p in answer.preferences
        )
    if answer.trainings:
        t = answer.trainings[0]
        return f"{t.name}: {number(t.days.value)} days (80 %: {number(t.days.low)} to {number(t.days.high)})."
    return "What serving it would cost."


def section(title: str, body: str) -> str:
    return f'<section><h2>{html.escape(title)}</h2><div class="wide">{body}</div></section>'


LAYOUT, WORDS = "layout", ' class="words"'


def _table(trainings: Sequence[TrainingAnswer]) -> str:
    rows: list[tuple[str, list[str]]] = [
        ("tokens/s per chip", [_cell(t.tokens_per_s_chip) for t in trainings]),
        ("days, failures included", [_cell(t.days) for t in trainings]),
        ("chip-hours", [_cell(t.chip_hours) for t in trainings]),
        ("energy, MWh", [_cell(t.energy) for t in trainings]),
        ("money, USD", [_cell(t.money) if t.money else "no public price" for t in trainings]),
        ("failures expected", [f"{t.failures.failures:,.0f}" for t in trainings]),
        ("effective time", [f"{100 * t.failures.effective:.1f} %" for t in trainings]),
        (
            "memory a chip, GiB",
            [f"{t.memory.total / GIB:.0f} ({t.memory.verdict})" for t in trainings],
        ),
        (LAYOUT, [html.escape(t.job.layout.words()) for t in trainings]),
    ]
    head = "".join(f"<th>{html.escape(t.name)}</th>" for t in trainings)
    body = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td{WORDS * (name == LAYOUT)}>{cell}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _cell(e: Estimate) -> str:
    return f"{number(e.value)} <span class='soft'>{number(e.low)} to {number(e.high)}</span>"


def _bars(trainings: Sequence[TrainingAnswer], pick: Callable[[TrainingAnswer], Estimate]) -> str:
    """One bar an option, a whisker for its 80 % interval."""
    return interval_bars([(t.name, pick(t)) for t in trainings])


def _memory(t: TrainingAnswer) -> str:
    stages = (
        range(t.job.layout.pp)
        if t.job.layout.pp <= 16
        else [0, 1, t.job.layout.pp // 2, t.job.layout.pp - 2, t.job.layout.pp - 1]
    )
    rows = [
        (f"stage {i + 1} of {t.job.layout.pp}", stage_parts(t.job, i, memory_constants()))
        for i in stages
    ]
    return (
        stacks(rows, "GiB", GIB, t.memory.available / GIB if t.memory.available else None)
        + f'<p class="soft">Verdict: {t.memory.verdict}.</p>'
    )


def _calendar(trainings: Sequence[TrainingAnswer], start: datetime.date) -> str:
    options = [
        Finish(t.name, (t.days.value, t.days.low, t.days.high), finish_dates(t, start))
        for t in trainings
    ]
    return calendar(options, start, LONGEST_DAYS)


def _tornado(p: Preference) -> str:
    """How far each assumption moves the cost ratio, and in words which of them turns the answer."""
    equal = ", equal prices taken" if p.money_ratio is None else ""
    turning = [s.assumption for s in p.swings if s.turns]
    words = (
        f"Orange turns the answer: {'; '.join(turning)}."
        if turning
        else "None of these alone turns the answer."
    )
    note = f"Cost of the second over the first (logarithmic{equal}). {words}"
    return f'{tornado(p.swings, p.cost_ratio)}<p class="soft">{html.escape(note)}</p>'


def _roofline(t: TrainingAnswer) -> str:
    """Peak against bytes moved: the model's matrix products, experts and attention as points on the chip's roof."""
    peak, bandwidth = gemm_peak(t.ask.chip, t.ask.precision), memory_bytes_s(t.ask.chip)
    points = {name: intensity for name, intensity in operators(t).items() if intensity > 0}
    words = f"{peak / 1e12:,.0f} TFLOPS dense {t.ask.precision}"
    return (
        roofline(points, peak, bandwidth, words)
        + '<p class="soft">Across: FLOPs per byte of this layout, weights and activations counted once (logarithmic). Up: the rate that the roof allows.</p>'
    )


def operators(t: TrainingAnswer) -> dict[str, float]:
    """FLOPs per byte of the model's operators in this layout: weights and activations read once, results written once."""
    s, lay, rows = t.job.shape, t.job.layout, t.job.micro_tokens
    size = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "fp4": 0.5}[t.ask.precision]

    def product(m: float, k: float, n: float) -> float:
        return 2 * m * k * n / (size * (m * k + k * n) + 2 * m * n)

    found = {"dense products": product(rows, s.hidden, max(s.ffn, s.hidden) / lay.tp)}
    if s.moe:
        found["experts"] = product(rows * lay.ep * s.topk / s.experts, s.hidden, s.moe_ffn)
    width = 2 * s.head_dim if s.latent is None else s.latent.nope + s.latent.rope + s.latent.v
    found["attention"] = t.job.sequence / 2 * width / (2 * 2 * width)
    found["optimizer"] = 12 / 26
    return found


def _basis(answer: Answer) -> str:
    lines = [
        f"<li><b>{html.escape(t.name)}</b>: {html.escape(t.step.basis)}. Energy: {html.escape(t.energy.basis)}. Failures: {html.escape(t.failures.source)}."
        + (f" Price: {html.escape(t.money.basis)}." if t.money else "")
        + "".join(f" {html.escape(n)}." for n in t.notes)
        + "</li>"
        for t in answer.trainings
    ]
    lines += [
        f"<li><b>serving on {html.escape(s.ask.chip.name)}</b>: {html.escape(s.basis)}</li>"
        for s in answer.services
    ]
    return f"<ul>{''.join(lines)}</ul>"
