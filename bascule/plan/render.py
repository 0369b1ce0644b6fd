"""An answer in words for the terminal (`cli_text`) and as plain values for programs (`to_json`). Units are always printed."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from typing import Any

from bascule.plan.anchor import Anchor
from bascule.plan.answer import Answer, Estimate, Preference, TrainingAnswer, expected_bubble
from bascule.plan.figures import count, moved, number, tokens
from bascule.plan.goodput import by_cause
from bascule.plan.memory import GIB, Memory
from bascule.plan.service_price import Service


def cli_text(answer: Answer) -> str:
    """The whole answer: break-even first where options are compared, then each option, then services."""
    shape = answer.model
    head = f"{shape.name}: {count(shape.parameters)} parameters, {count(shape.active_weights)} used a token, cache {shape.cache_bytes() / 1e3:,.1f} kB a token (2-byte)"
    blocks = [head]
    blocks += [preference_text(one) for one in answer.preferences]
    blocks += [anchors_text(answer)] if answer.anchors or answer.notes else []
    blocks += [side_by_side(answer.trainings)] if answer.trainings else []
    blocks += [training_text(one) for one in answer.trainings]
    blocks += [service_text(one) for one in answer.services]
    return "\n\n".join(blocks)


def anchors_text(answer: Answer) -> str:
    """The user's own runs: what each did, beside what published runs alone say of it."""
    lines = ["your own runs, taken beside the published ones and trusted more:"] * bool(
        answer.anchors
    )
    for one in answer.anchors:
        middle, low, high = (number(value) for value in one.forecast)
        guess = " (its layout was not given: trusted as a published run)" if one.guessed else ""
        lines.append(
            f"  {one.words}: {one.ratio:.2f}x its forecast of {middle} (80 %: {low} to {high}){guess}"
        )
    return "\n".join([*lines, *(f"  note     {note}" for note in answer.notes)])


def _own_line(before: Estimate, now: Estimate) -> str:
    moves = moved((before.value, before.low, before.high), (now.value, now.low, now.high))
    return f"  your own published runs alone say {figure(before)}; with your own {number(now.value)} ({moves})"


def figure(e: Estimate, digits: int = 3) -> str:
    return f"{number(e.value, digits)} {e.unit} (80 %: {number(e.low, digits)} to {number(e.high, digits)})"


def preference_text(p: Preference) -> str:
    even = p.break_even
    lines = [
        f"{p.second} pays below {even.value:.2f}x the price of {p.first} per chip-hour (80 %: {even.low:.2f}x to {even.high:.2f}x)"
    ]
    if p.break_even_usd_h:
        e = p.break_even_usd_h
        lines[0] += f", that is below {e.value:.2f} USD (80 %: {e.low:.2f} to {e.high:.2f})"
    lines.append(
        f"  against {p.first}: {p.time_ratio:.2f}x the time, {p.chip_hours_ratio:.2f}x the chip-hours, {p.energy_ratio:.2f}x the energy, "
        + (
            f"{p.money_ratio:.2f}x the money"
            if p.money_ratio is not None
            else "money unknown (no public price for one of them)"
        )
    )
    lines.append(
        f"  what could turn the answer (cost of the second over the first, {p.cost_ratio:.2f}x as asked"
        + (", equal prices taken" if p.money_ratio is None else "")
        + "):"
    )
    lines += [
        f"    {swing.assumption:<46} {swing.low:5.2f}x to {swing.high:5.2f}x{'   turns it' if swing.turns else ''}"
        for swing in p.swings
    ]
    return "\n".join(lines)


def side_by_side(trainings: tuple[TrainingAnswer, ...]) -> str:
    rows = [("", *[t.name for t in trainings])]
    rows.append(("tokens/s per chip", *[_short(t.tokens_per_s_chip) for t in trainings]))
    rows.append(("days, failures included", *[_short(t.days) for t in trainings]))
    rows.append(("chip-hours", *[_short(t.chip_hours) for t in trainings]))
    rows.append(("energy, MWh", *[_short(t.energy) for t in trainings]))
    rows.append(
        ("money, USD", *[_short(t.money) if t.money else "no public price" for t in trainings])
    )
    rows.append(("failures expected", *[f"{t.failures.failures:,.0f}" for t in trainings]))
    rows.append(("effective time", *[f"{100 * t.failures.effective:.1f} %" for t in trainings]))
    rows.append(
        (
            "memory a chip, GiB",
            *[f"{t.memory.total / GIB:.0f} ({t.memory.verdict})" for t in trainings],
        )
    )
    width = max(30, *(len(cell) + 2 for row in rows for cell in row[1:]))
    return "\n".join(
        f"{row[0]:<26}" + "".join(f"{cell:>{width}}" for cell in row[1:]) for row in rows
    )


def _short(e: Estimate) -> str:
    return f"{number(e.value)} [{number(e.low)}, {number(e.high)}]"


LONGEST_DAYS = 365_000.0  # a thousand years: what lies beyond is told as that


def finish_dates(
    t: TrainingAnswer, start: datetime.date
) -> tuple[datetime.date, datetime.date, datetime.date]:
    """The day a training ends that begins on `start`: middle, and the ends of the 80 % interval."""
    middle, low, high = (
        start + datetime.timedelta(days=min(days, LONGEST_DAYS))
        for days in (t.days.value, t.days.low, t.days.high)
    )
    return middle, low, high


def finish_text(t: TrainingAnswer, start: datetime.date) -> str:
    if t.days.high > LONGEST_DAYS:
        return "no date: it may take more than a thousand years"
    finish = finish_dates(t, start)
    return f"begun today: {finish[0]:%d %b %Y} (80 %: {finish[1]:%d %b %Y} to {finish[2]:%d %b %Y})"


def training_text(t: TrainingAnswer) -> str:
    lay, f = t.job.layout, t.failures
    lines = [
        f"{t.name}, {tokens(t.ask.tokens)}, {t.ask.precision}, sequence {t.job.sequence:,}, batch {t.job.global_batch:,} sequences, software {t.job.software}",
        f"  layout   {lay.words()} ({t.layout_basis})",
        f"  step     {figure(Estimate(t.step.seconds, t.step.low, t.step.high, 's', ''))}; {figure(t.tokens_per_s_chip)}",
        "           "
        + ", ".join(
            f"{name} {100 * value / t.step.seconds:.0f} %"
            for name, value in sorted(t.step.parts.items(), key=lambda pair: -pair[1])
            if value / t.step.seconds >= 0.005
        ),
        f"  memory   {memory_text(t.memory)}",
    ]
    if t.without_own:
        lines.insert(3, _own_line(t.without_own, t.tokens_per_s_chip))
    if t.played:
        lines.append(
            f"  pipeline bubble {100 * t.played.bubble:.1f} % of the busiest stage, played event by event ({100 * expected_bubble(t.job):.1f} % if all stages were equal)"
        )
    lines += [
        f"  failures {f.failures:,.0f} expected, one every {f.mean_time_to_failure_s / 3600:.1f} h; checkpoint every {f.interval_s / 60:.0f} min (Young/Daly {f.young_daly_s / 60:.0f} min), {f.save_s:.0f} s a save; effective {100 * f.effective:.1f} % (80 %: {100 * f.effective_low:.1f} to {100 * f.effective_high:.1f} %)",
        f"  finish   {figure(t.days)}; {finish_text(t, datetime.date.today())}",
        f"  cost     {figure(t.chip_hours)}; energy {figure(t.energy)}; "
        + (
            f"money {figure(t.money)}"
            if t.money
            else "money unknown: no public price, give one such as ', 2 USD/h'"
        ),
        f"  rests on {t.step.basis}",
        f"           failures: {f.source}",
        *_causes(t),
        f"           energy: {t.energy.basis}" + (f"; price: {t.money.basis}" if t.money else ""),
    ]
    return "\n".join(lines + [f"  note     {note}" for note in t.notes])


def _causes(t: TrainingAnswer) -> list[str]:
    causes = by_cause(t.ask.chip.vendor, t.failures.failures)
    told = ", ".join(f"{cause} {number(count, 2)}" for cause, count in causes.items())
    return [f"           of these, by Llama 3's shares: {told}"] if causes else []


def memory_text(m: Memory) -> str:
    left = (
        ""
        if m.margin_bytes is None or m.available is None
        else f", {m.margin_bytes / GIB:+.1f} GiB to spare of {m.available / GIB:.1f}"
    )
    parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in m.parts.items() if value > 0)
    return f"{m.verdict}: {m.total / GIB:.1f} GiB (80 %: {m.low / GIB:.1f} to {m.high / GIB:.1f}) on stage {m.stage + 1} of {m.stages}, the worst{left}; {parts}"


def service_text(s: Service) -> str:
    a = s.ask
    total = sum(s.parts.values())
    lines = [
        f"serve on {a.chip.name}: replica of {s.chips} chip{'s' if s.chips > 1 else ''}, {a.prompt:,} tokens in, {a.completion:,} out, {a.precision}, at most {a.tpot_s * 1e3:g} ms a token and {a.ttft_s:.2g} s to the first",
        f"  decode   {_triple(s.decode)} tokens/s per chip at {number(s.batch_per_chip)} sequences a chip, {s.tpot_s[0] * 1e3:.1f} ms a token",
        "           "
        + ", ".join(
            f"{name} {100 * value / total:.0f} %"
            for name, value in sorted(s.parts.items(), key=lambda pair: -pair[1])
            if value / total >= 0.01
        ),
        f"  prefill  {_triple(s.prefill)} tokens/s per chip, first token after {s.ttft_s:.2f} s ({'kept' if s.ttft_kept else 'NOT kept'}); {s.prefill_chips_per_decode_chip:.2f} prefill chips for each decode chip",
        f"  cache    {s.cache_gb:.1f} GB a chip"
        + (f" of {s.memory_gb:.0f} GB" if s.memory_gb else ""),
        "  cost     "
        + (
            f"{_triple(s.usd_per_m_out)} USD per million completion tokens, prompts included ({a.price_usd_h:.2f} USD per chip-hour)"
            if s.usd_per_m_out and a.price_usd_h is not None
            else "money unknown: no public price, give one such as ', 2 USD/h'"
        )
        + f"; {number(s.kwh_per_m_out)} kWh per million completion tokens",
        *_own_service_lines(s),
        f"  RL       rollouts would take {100 * s.rollout_share:.0f} % of the chip time of a rollout-and-train loop on this chip",
        f"  rests on {s.basis}",
    ]
    return "\n".join(lines + [f"  note     {note}" for note in s.notes])


def _own_service_lines(s: Service) -> list[str]:
    if s.without_own is None:
        return []
    pairs = (
        ("decode", s.without_own[0], s.decode),
        ("prefill", s.without_own[1], s.prefill),
    )
    return [
        f"  your own {what}: published points alone say {_triple(before)} tokens/s per chip; with your own {number(now[0])} ({moved(before, now)})"
        for what, before, now in pairs
    ]


def _triple(values: tuple[float, float, float]) -> str:
    return f"{number(values[0])} (80 %: {number(values[1])} to {number(values[2])})"


def to_json(answer: Answer) -> dict[str, Any]:
    """Plain values for `--json`; every estimate as value, low, high, unit, basis."""
    s = answer.model
    return {
        "model": {
            "name": s.name,
            "parameters": s.parameters,
            "active_parameters": s.active_weights,
            "cache_bytes_per_token": s.cache_bytes(),
        },
        "preferences": [
            asdict(p) | {"turns": [swing.assumption for swing in p.swings if swing.turns]}
            for p in answer.preferences
        ],
        "anchors": [_anchor_json(one) for one in answer.anchors],
        "notes": list(answer.notes),
        "options": [_training_json(t) for t in answer.trainings],
        "services": [_service_json(one) for one in answer.services],
    }


def _anchor_json(one: Anchor) -> dict[str, Any]:
    """One of the user's own runs; `forecast` is what was said of it without it."""
    middle, low, high = one.forecast
    return {
        "words": one.words, "source": one.source, "of": one.of, "unit": "tokens/s per chip", "measured": one.value,
        "forecast": {"value": middle, "low": low, "high": high, "unit": "tokens/s per chip", "basis": "published runs alone"},
        "measured_over_forecast": one.ratio, "odd": one.odd, "layout_guessed": one.guessed,
        "layout": asdict(one.job.layout) if one.job else None,
    }  # fmt: skip


def _training_json(t: TrainingAnswer) -> dict[str, Any]:
    m = t.memory
    return {
        "name": t.name, "chip": t.ask.chip.name, "chips": t.ask.chips, "tokens": t.ask.tokens, "precision": t.ask.precision, "software": t.job.software,
        "layout": asdict(t.job.layout), "layout_basis": t.layout_basis, "global_batch": t.job.global_batch, "sequence": t.job.sequence,
        "step_s": {"value": t.step.seconds, "low": t.step.low, "high": t.step.high, "unit": "s", "basis": t.step.basis, "parts": t.step.parts},
        "memory": {"verdict": m.verdict, "worst_stage": m.stage, "stages": m.stages, "total_bytes": m.total, "low_bytes": m.low, "high_bytes": m.high, "available_bytes": m.available, "margin_bytes": m.margin_bytes, "parts_bytes": m.parts},
        "tokens_per_s_chip": asdict(t.tokens_per_s_chip), "days": asdict(t.days), "chip_hours": asdict(t.chip_hours), "energy": asdict(t.energy),
        "money": asdict(t.money) if t.money else None, "failures": asdict(t.failures), "failures_by_cause": by_cause(t.ask.chip.vendor, t.failures.failures), "bubble": t.played.bubble if t.played else 0.0, "notes": list(t.notes),
        "finish_if_begun_today": dict(zip(("value", "low", "high"), [day.isoformat() for day in finish_dates(t, datetime.date.today())], strict=True)),
        "without_own": asdict(t.without_own) if t.without_own else None,
    }  # fmt: skip


def _service_json(s: Service) -> dict[str, Any]:
    plain = asdict(s)
    plain["ask"] = {key: value for key, value in plain["ask"].items() if key != "chip"} | {
        "chip": s.ask.chip.name
    }
    return plain
