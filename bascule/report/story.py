"""The run's story in words and figures, read from its ledger alone. This room and errors.py word sentences for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from bascule.ledger import last, of_kind
from bascule.records import (
    Alarm,
    AnyRecord,
    Continuation,
    Coverage,
    DialTurned,
    Evaluation,
    Evidence,
    Incident,
    Migration,
    Mismatch,
    Placement,
    PoolCondemned,
    RolloutDecoder,
    RunFinished,
    RunResumed,
    RunStarted,
    RunStopped,
    SnapshotEvent,
    StepsRecorded,
    StepStats,
    TextEvaluation,
    TrainPrecision,
    Verdict,
    Warned,
)

Tone = Literal["plain", "good", "bad", "warn"]

_AVERAGED = ("mean_abs", "k1_kl", "k3_kl", "chi2", "capped_ratio", "masked_ratio")


@dataclass(frozen=True)
class Sentence:
    """One event of the story. `time_s` is Unix time."""

    time_s: float
    tone: Tone
    text: str


def summary(records: Sequence[AnyRecord]) -> dict[str, Any]:
    """What `bascule report RUN --json` answers. Raw SI numbers, units in the keys; `headline` is one sentence for people."""
    migrations = of_kind(records, Migration)
    continuations = of_kind(records, Continuation)
    finished = last(records, RunFinished)
    data = {
        "status": status(records),
        "name": next((record.name for record in of_kind(records, RunStarted)), None),
        "attempts": max((record.attempt for record in records), default=0),
        "placements": [_without_envelope(one) for one in of_kind(records, Placement)],
        "verdicts": [_without_envelope(one) for one in latest_verdicts(records)],
        "incidents": [
            {
                "id": one.incident_id,
                "step": one.step,
                "sentinel": one.sentinel,
                "attribution": one.attribution,
                "pool": one.pool,
                "action": one.action,
            }
            for one in of_kind(records, Incident)
        ],
        "steps": max((one.step for one in of_kind(records, StepStats)), default=0),
        "steps_recomputed": sum(one.steps_recomputed for one in migrations),
        "seconds_lost": sum(one.seconds_lost for one in migrations),
        "corrupt_steps_left_behind": corrupt_steps_left_behind(records),
        "longest_uncertified_steps": longest_uncertified_steps(records),
        "continuation_verified": all(one.verified for one in continuations)
        if continuations
        else None,
        "mismatch": mismatch_by_pool(records),
        "final_weights_sha256": finished.final_weights_sha256 if finished else None,
        "wall_s": wall_seconds(records),
        "eval": {
            one.after: {
                "pass_at_1": one.pass_at_1,
                "pass_at_8": one.pass_at_8,
                "greedy": one.greedy,
                "n": one.n,
                "samples": one.samples,
            }
            for one in of_kind(records, Evaluation)
        },
        "text": {
            one.after: {
                "bits_per_byte": one.bits_per_byte,
                "nats_per_token": one.nats_per_token,
                "tokens": one.tokens,
            }
            for one in of_kind(records, TextEvaluation)
        },
        "warnings": [
            {"what": one.what, "detail": one.detail, "step": one.step}
            for one in of_kind(records, Warned)
        ],
    }
    data["headline"] = _headline(data)
    return data


def status(records: Sequence[AnyRecord]) -> str:
    """`finished`, `stopped` (with a recorded reason), `unfinished` (running, or killed without a word), or `empty`."""
    for record in reversed(records):
        if isinstance(record, RunFinished):
            return "finished"
        if isinstance(record, RunStopped):
            return "stopped"
        if isinstance(record, (RunStarted, RunResumed, StepStats)):
            return "unfinished"
    return "empty"


def latest_verdicts(records: Sequence[AnyRecord]) -> list[Verdict]:
    """The newest verdict of each pool and role, in the order first given."""
    newest = {(one.pool, one.role): one for one in of_kind(records, Verdict)}
    return list(newest.values())


def latest_evidence(records: Sequence[AnyRecord]) -> list[Evidence]:
    newest = {(one.pool, one.check): one for one in of_kind(records, Evidence)}
    return list(newest.values())


def mismatch_by_pool(records: Sequence[AnyRecord]) -> dict[str, dict[str, float]]:
    """Of each pool that sampled rollouts: means over all tokens, the largest difference, the least effective sample ratio."""
    found: dict[str, dict[str, float]] = {}
    of_pool: dict[str, list[Mismatch]] = {}
    for one in of_kind(records, Mismatch):
        of_pool.setdefault(one.pool or "unknown", []).append(one)
    for pool, steps in of_pool.items():
        tokens = max(1, sum(one.tokens for one in steps))
        found[pool] = {
            "steps": len(steps),
            "tokens": tokens,
            **{
                name: sum(getattr(one, name) * one.tokens for one in steps) / tokens
                for name in _AVERAGED
            },
            "max_abs": max(one.max_abs for one in steps),
            "effective_sample_ratio": min(one.effective_sample_ratio for one in steps),
        }
        agreed = [one.router_agreement for one in steps if one.router_agreement is not None]
        if agreed:
            found[pool]["router_agreement"] = sum(agreed) / len(agreed)
    return found


def wall_seconds(records: Sequence[AnyRecord]) -> float:
    """Time in which a supervisor was at work: the sum over attempts of last record minus first."""
    spans: dict[int, tuple[float, float]] = {}
    for record in records:
        if not record.attempt:  # asked for after the run: an evaluation, an answer
            continue
        first, newest = spans.get(record.attempt, (record.time_s, record.time_s))
        spans[record.attempt] = (min(first, record.time_s), max(newest, record.time_s))
    return sum(newest - first for first, newest in spans.values())


def corrupt_steps_left_behind(records: Sequence[AnyRecord]) -> int:
    """Committed steps that a rollback discarded because a chip fault was confirmed: none of them is in the final weights.

    An upper bound of the truly corrupt ones: from the snapshot gone back to, up to the failing step. Which were really corrupt
    only the chip knows.
    """
    chip_faults = [one for one in of_kind(records, Incident) if "chip fault" in one.attribution]
    total = 0
    for move in of_kind(records, Migration):
        if any(one.step == move.failed_at_step for one in chip_faults):
            total += move.steps_recomputed
    return total


def longest_uncertified_steps(records: Sequence[AnyRecord]) -> int:
    """The longest window of committed steps that no certified snapshot covered at the time. A worker that merely died goes on from a
    snapshot that has no certificate yet: its window goes on too."""
    certified, longest = 0, 0
    for record in records:
        if isinstance(record, SnapshotEvent) and record.state == "certified":
            certified = record.step
        elif isinstance(record, Migration):
            certified = min(certified, record.resumed_from_step)
        elif isinstance(record, StepStats):
            longest = max(longest, record.step - certified)
    return longest


def sentences(records: Sequence[AnyRecord]) -> list[Sentence]:
    """The story in order, one sentence an event; step-by-step records are left to the charts."""
    told: list[Sentence] = []
    phases: set[tuple[int, str]] = set()
    for record in records:
        if isinstance(record, StepStats):
            if (record.attempt, f"{record.phase}{record.pool}") not in phases:
                phases.add((record.attempt, f"{record.phase}{record.pool}"))
                told.append(
                    Sentence(
                        record.time_s,
                        "plain",
                        f"{record.phase.upper()} on {record.pool}, from step {record.step}.",
                    )
                )
        else:
            told.extend(Sentence(record.time_s, tone, text) for tone, text in _tell(record))
    return told


def _tell(record: AnyRecord) -> list[tuple[Tone, str]]:
    """The sentence for one record, or none where it is told elsewhere (charts, tables)."""
    match record:
        case RunStarted():
            return [
                (
                    "plain",
                    f"The run {record.name} began on {record.machine} with bascule {record.version}.",
                )
            ]
        case RunResumed():
            return [
                (
                    "plain",
                    f"Attempt {record.attempt}: resumed after step {record.from_step} ({record.reason}).",
                )
            ]
        case DialTurned():
            return [("plain", sentence(derived(record)))] if derived(record) else []
        case Verdict():
            tone: Tone = (
                "good"
                if record.verdict == "fit"
                else "bad"
                if record.verdict == "unfit"
                else "warn"
            )
            because = f": {'; '.join(record.reasons[:2])}" if record.reasons else ""
            return [(tone, f"{pool_name(record)} is {record.verdict} to {record.role}{because}.")]
        case Placement():
            return [
                (
                    "plain",
                    f"Placed: training on {record.train} ({record.reasons.get('train', 'preferred')}), inference on {record.infer} ({record.reasons.get('infer', 'preferred')}).",
                )
            ]
        case RolloutDecoder():
            how = "compiled steps" if record.decoder == "compiled" else "torch's operators"
            return [("plain", f"Rollouts decode in {how}: {record.reason}.")]
        case TrainPrecision():
            return [("plain", f"Steps are computed in {record.precision}: {record.reason}.")]
        case StepsRecorded():
            return [("plain", f"From step {record.step} ({record.phase}) on, {record.detail}.")]
        case Alarm():
            return [
                (
                    "warn",
                    f"Alarm at step {record.step} on {record.pool}, sentinel {record.sentinel}: {record.detail}",
                )
            ]
        case Incident():
            return [
                (
                    "bad",
                    f"Incident {record.incident_id}: {record.attribution}. {sentence(record.evidence)} Action: {record.action}.",
                )
            ]
        case Coverage():
            return [("plain", f"The guard, from step {record.step} on: {record.detail}.")]
        case PoolCondemned():
            return [
                ("bad", f"{record.pool} is condemned for the role `{record.role}`: {record.reason}")
            ]
        case Migration():
            where = (
                f"moved from {record.from_pool} to {record.to_pool}"
                if record.from_pool != record.to_pool
                else f"went back on {record.to_pool}"
            )
            where += " (another chip of the same pool)" if record.rung == "another chip" else ""
            snapshot = f"{record.trust} snapshot" if record.trust else "snapshot"
            where += f" after a wait of {record.wait_s:.0f} s" if record.wait_s else ""
            return [
                (
                    "warn",
                    f"Training {where}: from step {record.failed_at_step} back to the {snapshot} of step {record.resumed_from_step}; {record.steps_recomputed} steps to compute again, {record.seconds_lost:.1f} s lost.",
                )
            ]
        case Continuation():
            if record.verified:
                return [("good", f"Continuation verified on {record.pool}: {record.detail}")]
            return [("bad", f"Continuation refused on {record.pool}: {record.detail}")]
        case SnapshotEvent() if record.state == "rejected":
            return [("warn", f"The snapshot of step {record.step} was rejected: {record.reason}")]
        case Evaluation():
            eight = f", pass@8 {record.pass_at_8:.1%}" if record.pass_at_8 is not None else ""
            low, high = (record.extra.get(f"pass_at_1_{end}") for end in ("low", "high"))
            range_ = "" if low is None or high is None else f", {low:.1%} to {high:.1%}"
            votes = "".join(
                f", {name.replace('_at_', '@')} {share:.1%}"
                for name, share in record.extra.items()
                if name.startswith("maj_at_")
            )
            return [
                (
                    "good",
                    f"{after(record.after)}: pass@1 {record.pass_at_1:.1%} (T=1{range_}), greedy {record.greedy:.1%}{eight}{votes} on {record.n} held-out problems.",
                )
            ]
        case TextEvaluation():
            return [
                (
                    "good",
                    f"{after(record.after)}: {record.bits_per_byte:.3f} bits per byte on {record.tokens:,} held-out tokens.",
                )
            ]
        case Warned():
            return [("warn", f"Warning, {record.what}: {record.detail}")]
        case RunStopped():
            return [("bad", f"The run stopped (exit code {record.exit_code}): {record.reason}")]
        case RunFinished():
            return [
                (
                    "good",
                    f"Finished after {record.steps} steps; final weights {record.final_weights_sha256[:16]}….",
                )
            ]
        case _:
            return []


def derived(record: DialTurned) -> str:
    """What the dial gave and the recipe had left out, each with its rule; the sizes of the model as one. Empty when nothing was."""
    taken = [one for one in record.derived if one.stated is None]
    told = [
        f"{one.setting} = {one.value:g} ({one.rule})"
        for one in taken
        if not one.setting.startswith("model.")
    ]
    if any(one.setting.startswith("model.") for one in taken):
        told.insert(0, f"the model's sizes ({record.shape})")
    return f"{record.dial} gave {'; '.join(told)}" if told else ""


def after(phase: str) -> str:
    """`After SFT`; an evaluation asked for by itself is `Evaluated again`."""
    return "Evaluated again" if phase == "evaluate" else f"After {phase.upper()}"


def sentence(text: str) -> str:
    """With a capital at its beginning and a full stop at its end."""
    return (text[:1].upper() + text[1:]).rstrip(".") + "." if text else ""


def pool_name(record: Verdict) -> str:
    simulated = ", simulated" if record.simulated else ""
    return f"{record.pool} ({record.accelerator}{simulated})"


def _headline(data: dict[str, Any]) -> str:
    parts = [f"Run {data['name']}: {data['status']} at step {data['steps']}"]
    if data["incidents"]:
        worst = data["incidents"][-1]
        count = len(data["incidents"])
        parts.append(
            f"{count} incident{'s, the last' if count > 1 else ''}: {worst['attribution']} on {worst['pool']} at step {worst['step']}"
        )
    if data["steps_recomputed"]:
        verified = {
            True: "continuation verified",
            False: "continuation refused",
            None: "continuation not checked",
        }[data["continuation_verified"]]
        parts.append(f"{data['steps_recomputed']} steps recomputed, {verified}")
    reached = [
        (phase, f"{one['bits_per_byte']:.3f} bits per byte") for phase, one in data["text"].items()
    ]
    reached += [(phase, f"pass@1 {one['pass_at_1']:.1%}") for phase, one in data["eval"].items()]
    parts += [f"{after(phase)[0].lower()}{after(phase)[1:]} {figure}" for phase, figure in reached]
    return "; ".join(parts) + "."


def _without_envelope(record: AnyRecord) -> dict[str, Any]:
    return record.model_dump(exclude={"schema_version", "kind"})
