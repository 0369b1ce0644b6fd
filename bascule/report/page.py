"""report.html: one self-contained page that tells the run's story in order. Reads records only; no torch, no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from bascule.ledger import last, memory_peaks, of_kind
from bascule.records import (
    AnyRecord,
    Continuation,
    Evaluation,
    Incident,
    Mismatch,
    OptionPriced,
    Placement,
    RecipeResolved,
    RunStarted,
    StepStats,
    Warned,
)
from bascule.report import seeds, story
from bascule.report.charts import Bar, Mark, Series, line_chart, timeline


def render(records: Sequence[AnyRecord], others: Sequence[Sequence[AnyRecord]] = ()) -> str:
    """The whole page. Works for a run at any point of its life, an empty ledger included. `others`: the same recipe's other seeds."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{value:.1%}"
    environment.filters["figure"] = _figure
    environment.filters["gib"] = lambda value: "–" if value is None else f"{value / 2**30:.3g} GiB"
    environment.filters["duration"] = _duration
    environment.filters["clock"] = _clock
    environment.filters["after"] = story.after
    environment.filters["sentence"] = story.sentence
    template = environment.from_string(
        files("bascule.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(**_context(records, others))


def _context(records: Sequence[AnyRecord], others: Sequence[Sequence[AnyRecord]]) -> dict[str, Any]:
    start_s = records[0].time_s if records else 0.0
    recipe = last(records, RecipeResolved)
    return {
        "data": story.summary(records),
        "start": last(records, RunStarted),
        "recipe": recipe.recipe if recipe else {},
        "story": [
            (sentence.time_s - start_s, sentence.tone, sentence.text)
            for sentence in story.sentences(records)
        ],
        "verdicts": story.latest_verdicts(records),
        "evidence": story.latest_evidence(records),
        "options": list({one.pool: one for one in of_kind(records, OptionPriced)}.values()),
        "peaks": memory_peaks(records),
        "placement": last(records, Placement),
        "incidents": of_kind(records, Incident),
        "continuations": of_kind(records, Continuation),
        "evaluations": of_kind(records, Evaluation),
        "warnings": of_kind(records, Warned),
        "charts": [
            Markup(chart)
            for chart in [
                seeds.chart([records, *others]) if others else "",
                *charts(records, start_s),
            ]
            if chart
        ],
    }


def charts(records: Sequence[AnyRecord], start_s: float) -> list[str]:
    """Reward and pass@1; loss with incidents marked; the pools' timeline; the rollout mismatch."""
    steps = of_kind(records, StepStats)
    incidents = [
        Mark(one.step, f"{one.sentinel}: {one.attribution}") for one in of_kind(records, Incident)
    ]
    kept, replaced = _kept_and_replaced(steps)
    rewards = [(float(one.step), one.reward) for one in kept if one.reward is not None]
    passes = [(float(one.step), one.pass_at_1) for one in of_kind(records, Evaluation)]
    loss = [
        Series(
            "loss (nats/token)", "a", [(one.step, one.loss) for one in kept if one.phase != "grpo"]
        )
    ]
    if replaced:
        loss.append(
            Series(
                "left behind by rollback",
                "bad",
                [(one.step, one.loss) for one in replaced if one.phase != "grpo"],
            )
        )
    learnt = {"pretrain": "Pretraining", "sft": "SFT"}
    found = [name for phase, name in learnt.items() if any(one.phase == phase for one in kept)]
    return [
        line_chart("Reward while training, pass@1 on held-out problems", "step",
                   [Series("reward (mean of rollouts)", "a", rewards), Series("pass@1 held out", "b", passes, markers=True)], y_min=0.0, y_max=1.0),
        line_chart(f"{' and '.join(found)} loss (logarithmic), incidents marked", "step", loss, incidents, log_y=True),
        _pools(records, start_s),
        line_chart("Rollout chip against trainer: mean |Δ log-prob|", "step", _mismatch(records)),
    ]  # fmt: skip


def _mismatch(records: Sequence[AnyRecord]) -> list[Series]:
    """A line for each pool that sampled."""
    of_pool: dict[str, list[tuple[float, float]]] = {}
    for one in of_kind(records, Mismatch):
        of_pool.setdefault(one.pool or "unknown", []).append((float(one.step), one.mean_abs))
    return [
        Series(f"rollouts on {pool}", "bacd"[place % 4], points)
        for place, (pool, points) in enumerate(of_pool.items())
    ]


def _kept_and_replaced(steps: Sequence[StepStats]) -> tuple[list[StepStats], list[StepStats]]:
    """Steps that are in the final weights (the last record of each step number), and those a rollback left behind."""
    newest = {one.step: one for one in steps}
    keep = {id(one) for one in newest.values()}
    return sorted(newest.values(), key=lambda one: one.step), [
        one for one in steps if id(one) not in keep
    ]


def _pools(records: Sequence[AnyRecord], start_s: float) -> str:
    """Stretches in which a pool was qualified, trained or evaluated, from the times of the records that bear its name."""
    bars: list[Bar] = []
    words = {
        "evidence": ("qualify", "c"),
        "step_stats": ("train", "a"),
        "mismatch": ("roll out", "b"),
        "evaluation": ("evaluate", "d"),
    }
    for record in records:
        if record.kind not in words or not record.pool or not record.attempt:
            continue
        label, css = words[record.kind]
        end_s = record.time_s - start_s
        begin_s = end_s - float(getattr(record, "seconds", 0.0) or 0.0)
        previous = next((bar for bar in reversed(bars) if bar.row == record.pool), None)
        if previous and previous.css == css and begin_s - previous.end_s < 15.0:
            bars[bars.index(previous)] = Bar(record.pool, previous.start_s, end_s, label, css)
        else:
            bars.append(Bar(record.pool, max(begin_s, 0.0), end_s, label, css))
    marks = [
        Mark(one.time_s - start_s, f"incident {one.incident_id}")
        for one in of_kind(records, Incident)
    ]
    ends = [record.time_s for record in records if record.attempt] or [start_s]
    total_s = max(ends) - start_s
    return timeline("What each pool did, seconds since the run began", bars, marks, total_s=total_s)


def _figure(value: float | int | str | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )


def _clock(seconds: float) -> str:
    """`0:07`, `12:40`, `1:02:03` since the run began."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
