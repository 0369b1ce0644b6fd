"""Evidence in, one verdict per role out. Pure and free of torch.

    unfit      a check that decides for this role failed, or the chip crashed, hung or raised while it was asked
    unproven   nothing failed, but a check that must answer did not: skipped, cut off by the time limit, or never asked; or a finding
               of the last battery did not happen again (what stays away twice is cleared)
    fit        every check that decides for this role was asked and passed

Evidence carries the role it was measured in, so a fault that acts only in training leaves `infer` fit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from bascule.config.model import ModelConfig
from bascule.qualify.check import BOTH, CHECKS, required
from bascule.records import Evidence, Role, Verdict, VerdictWord

MAX_REASONS = 8
_ORDER = {check.name: place for place, check in enumerate(CHECKS)}
_DECIDES = {check.name: check.decides for check in CHECKS}


@dataclass(frozen=True)
class Examined:
    """What was examined: the accelerator as asked for, and the chip and driver behind it. `part`: of the model, in words, where the
    quick battery took not all of it (shortened.py)."""

    accelerator: str
    chip: str = "unknown"
    driver: str = "unknown"
    simulated: bool = False
    model_sha256: str = ""
    part: str | None = None


def verdicts(
    evidence: Sequence[Evidence],
    examined: Examined,
    *,
    quick: bool = True,
    roles: Collection[Role] = BOTH,
    chips: int = 2,
) -> list[Verdict]:
    """One verdict for each role, in the order train, infer."""
    return [
        _verdict(role, [item for item in evidence if role in item.roles], examined, quick, chips)
        for role in BOTH
        if role in roles
    ]


def libraries() -> str:
    """What computes for the chip in this environment, with versions."""
    return f"torch {version('torch')}"


def model_sha256(model: ModelConfig, dtype: str = "fp32") -> str:
    """Names architecture and type: operators and shapes are what was examined, not weights."""
    return hashlib.sha256(f"{dtype} {model.model_dump_json()}".encode()).hexdigest()


def outdated(
    verdict: Verdict, model: ModelConfig, *, now_s: float, max_age_days: float
) -> str | None:
    """Why this verdict holds no longer for `model` in this environment, or None. A changed chip or driver shows on opening it."""
    age_days = (now_s - verdict.time_s) / 86400.0
    if age_days > max_age_days:
        return f"it is {age_days:.0f} days old, allowed {max_age_days:g} (qualify.max_age_days)"
    if verdict.libraries != libraries():
        return (
            f"it was given with {verdict.libraries or 'unknown libraries'}, here is {libraries()}"
        )
    if verdict.model_sha256 != model_sha256(model):
        return "it was given for another model architecture"
    return None


def _verdict(
    role: Role, evidence: list[Evidence], examined: Examined, quick: bool, chips: int
) -> Verdict:
    against = [
        item
        for item in evidence
        if item.outcome in ("fail", "error") and _DECIDES.get(item.check, True)
    ]
    answered = {item.check for item in evidence if item.outcome == "pass"}
    open_questions = [
        name for name in required(role, quick=quick, chips=chips) if name not in answered
    ]
    if against:
        word: VerdictWord = "unfit"
        reasons = _merge(against)
    elif open_questions:
        word = "unproven"
        reasons = _why_open(open_questions, evidence)
    else:
        word = "fit"
        reasons = _why_fit(evidence, quick, examined.part)
    return Verdict(
        role=role,
        verdict=word,
        reasons=tuple(reasons),
        accelerator=examined.accelerator,
        chip=examined.chip,
        driver=examined.driver,
        simulated=examined.simulated,
        libraries=libraries(),
        model_sha256=examined.model_sha256,
    )


def _merge(against: list[Evidence]) -> list[str]:
    """Findings in the battery's order (its first questions are nearest to the cause), equal details said once."""
    grouped: dict[str, list[str]] = {}
    for item in sorted(against, key=lambda item: _ORDER.get(item.check, -1)):
        grouped.setdefault(item.detail or item.bound, []).append(item.check)
    reasons = [f"{_names(checks)}: {detail}" for detail, checks in grouped.items()]
    if len(reasons) > MAX_REASONS:
        reasons = [
            *reasons[: MAX_REASONS - 1],
            f"and {len(reasons) - MAX_REASONS + 1} findings more",
        ]
    return reasons


def _names(checks: list[str]) -> str:
    distinct = list(dict.fromkeys(checks))
    return (
        distinct[0] if len(distinct) == 1 else f"{distinct[0]} and {len(distinct) - 1} checks more"
    )


def _why_open(open_questions: list[str], evidence: list[Evidence]) -> list[str]:
    said = {
        item.check: item.detail for item in evidence if item.outcome in ("skipped", "not again")
    }
    return [f"{name}: {said.get(name, 'was not asked')}" for name in open_questions]


def _why_fit(evidence: list[Evidence], quick: bool, part: str | None) -> list[str]:
    passed = {item.check for item in evidence if item.outcome == "pass"}
    which = ("quick" if quick else "full") + " battery" + (f" on {part}" if part else "")
    reasons = [f"{len(passed)} checks passed ({which})"]
    reasons += [
        item.detail for item in evidence if item.family in ("soak", "learning") and item.detail
    ]
    return reasons
