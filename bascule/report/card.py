"""The model card that travels with exported weights: where they come from, in Markdown, from the run's ledger alone. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bascule.ledger import last, of_kind
from bascule.records import (
    AnyRecord,
    DialTurned,
    Evaluation,
    Incident,
    Migration,
    ModelOrigin,
    RecipeResolved,
    RunFinished,
    StepStats,
    Telemetry,
    TextEvaluation,
)
from bascule.report.story import after, derived, latest_verdicts, sentence, summary

_FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags: [bascule, {family}]
---

# {name}
"""


@dataclass(frozen=True)
class Span:
    """Steps `first` to `last` of one phase that stand in the final weights, and the pool that computed them."""

    first: int
    last: int
    phase: str
    pool: str | None


def card(records: Sequence[AnyRecord], *, name: str, family: str, parameters: int) -> str:
    """The whole README.md. Figures the ledger does not hold are said to be unknown, not left out."""
    story = summary(records)
    parts = [
        _FRONT.format(name=name, family=family),
        f"{parameters:,} parameters, family `{family}`, written by `bascule export`. {story['headline']}",
        _section("Where the weights come from", [*_origin(records), *_lineage(records)]),
        _section("What went wrong on the way", _incidents(records)),
        _section("Evaluations", _evaluations(records)),
        _section("Energy", [_energy(records)]),
    ]
    return "\n".join(parts)


def spans(records: Sequence[AnyRecord]) -> list[Span]:
    """Which pool's computation of each step the final weights rest on: the newest one, since older ones were rolled back."""
    newest = {one.step: one for one in of_kind(records, StepStats)}
    found: list[Span] = []
    for step in sorted(newest):
        phase, pool = newest[step].phase, newest[step].pool
        if found and (found[-1].phase, found[-1].pool, found[-1].last) == (phase, pool, step - 1):
            found[-1] = Span(found[-1].first, step, phase, pool)
        else:
            found.append(Span(step, step, phase, pool))
    return found


def _origin(records: Sequence[AnyRecord]) -> list[str]:
    lines = []
    if origin := last(records, ModelOrigin):
        lines.append(
            f"Began from {origin.family} weights ({origin.format}), SHA-256 `{origin.sha256}`."
        )
    if recipe := last(records, RecipeResolved):
        lines.append(f"Recipe SHA-256 `{recipe.recipe_sha256}`.")
    if (turned := last(records, DialTurned)) and (words := derived(turned)):
        lines.append(sentence(words))
    if finished := last(records, RunFinished):
        lines.append(
            f"Weights SHA-256 (names, shapes and bytes) `{finished.final_weights_sha256}`."
        )
    return lines


def _lineage(records: Sequence[AnyRecord]) -> Iterable[str]:
    chips = {one.pool: one for one in latest_verdicts(records)}
    yield "\n| steps | phase | pool | chip |\n| --- | --- | --- | --- |"
    for span in spans(records):
        verdict = chips.get(span.pool)
        chip = "unknown: this pool has no verdict"
        if verdict is not None:
            simulated = ", **simulated**" if verdict.simulated else ""
            chip = f"{verdict.chip} as `{verdict.accelerator}`{simulated}"
        yield f"| {span.first} to {span.last} | {span.phase} | {span.pool} | {chip} |"


def _incidents(records: Sequence[AnyRecord]) -> list[str]:
    told = [
        f"- Step {one.step} on {one.pool}: {one.attribution}. {sentence(one.evidence)} Action: {one.action}."
        for one in of_kind(records, Incident)
    ]
    told += [
        f"- Training went from {one.from_pool} to {one.to_pool}, back to step {one.resumed_from_step}; {one.steps_recomputed} steps computed again."
        for one in of_kind(records, Migration)
    ]
    return told or ["Nothing was recorded."]


def _evaluations(records: Sequence[AnyRecord]) -> list[str]:
    told = [
        f"- {after(one.after)}: pass@1 {one.pass_at_1:.1%}, greedy {one.greedy:.1%}, {one.n} held-out problems, {one.samples} samples each"
        for one in of_kind(records, Evaluation)
    ]
    told += [
        f"- {after(one.after)}: {one.bits_per_byte:.3f} bits per byte on {one.tokens:,} held-out tokens"
        for one in of_kind(records, TextEvaluation)
    ]
    return told or ["None."]


def _energy(records: Sequence[AnyRecord]) -> str:
    known = [one.energy_j for one in of_kind(records, Telemetry) if one.energy_j is not None]
    return f"{max(known) / 3600:.1f} Wh, as the chips reported." if known else "Not measured."


def _section(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"\n## {title}\n", *lines])
