"""`bascule faults`: the catalogue of what a drill can plant, and who must see it. No torch."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from bascule.config.load import package_toml
from bascule.faults.catalogue import (
    DEFECTS_FILE,
    SEVERITIES,
    Profile,
    kinds,
    load_profile,
    profiles,
)
from bascule.stages.answer import Answer

SIMULATED = "simulated: rates, onsets and severities are our own construction, for drills and tests"
WATCHERS = {
    "arithmetic": "the guard: finite, checksum, audit or certification; the pool is condemned (or, once only, the step computed again)",
    "memory": "the guard's sum of the weights' bits, or the ending: out of memory",
    "collective": "qualification's links; nothing to see in a run of one process",
    "timing": "the watchdog (a hang), the step-time sentinel (a warning: slow is not wrong)",
    "storage": "the snapshot's hashes: an older snapshot is taken, with a warning",
    "runtime": "the ending: operator missing, device error, death; another launch or another pool",
}
"""Family of a fault to what must see it in training. The words of `drill --all` are held against the same families."""


def main(arguments: Namespace) -> Answer:
    if arguments.fault:
        profile = load_profile(arguments.fault)
        return Answer(text="\n".join(_page(profile)), data=as_data(profile))
    listed = [load_profile(name) for name in profiles()]
    width = max(len(profile.name) for profile in listed)
    lines = [f"{profile.name:{width}}  {profile.title}" for profile in listed]
    lines += ["", f"{SIMULATED}.", "More of one: bascule faults NAME. Plant one: bascule drill RECIPE --fault NAME[:low|:high]."]  # fmt: skip
    return Answer(text="\n".join(lines), data={"simulated": SIMULATED, "faults": [as_data(one) for one in listed]})  # fmt: skip


def families(profile: Profile) -> set[str]:
    return {kinds()[spec.kind].family for spec in profile.faults}


def as_data(profile: Profile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "title": profile.title,
        "story": " ".join(profile.story.split()),
        "severities": _severities(profile),
        "defects": list(profile.plays),
        "fit_for": list(profile.fit_for),
        "unseen_by_qualification": dict(profile.unseen),
        "seen_in_training_by": [WATCHERS[family] for family in sorted(families(profile))],
        "faults": [spec.model_dump(exclude_defaults=True) for spec in profile.faults],
    }


def _severities(profile: Profile) -> list[str]:
    return [word for word in SEVERITIES if word == "medium" or getattr(profile, word)]


def _page(profile: Profile) -> list[str]:
    defects = package_toml(DEFECTS_FILE)
    unfit = [role for role in ("train", "infer") if role not in profile.fit_for]
    lines = [f"{profile.name}: {profile.title}.", *([" ".join(profile.story.split())] if profile.story else []), SIMULATED]  # fmt: skip
    lines += [f"  plays {row}: {defects[row]['what']}" for row in profile.plays]
    lines += [f"  severities: {', '.join(_severities(profile))}"]
    lines += [f"  {_spec(spec.model_dump(exclude_defaults=True))}" for spec in profile.faults]
    lines += [f"  qualification must find it unfit to {' and to '.join(unfit)}" if unfit else "  qualification must not call it unfit"]  # fmt: skip
    lines += [f"    but not at {severity}: {why}" for severity, why in profile.unseen.items()]
    lines += [f"  in training: {WATCHERS[family]}" for family in sorted(families(profile))]
    return lines


def _spec(knobs: dict[str, Any]) -> str:
    """`bit_rot: rate 0.01, min_elements 1`; the names are those that `sim:NAME?KNOB=VALUE` takes."""
    kind = knobs.pop("kind")
    return f"{kind}: {', '.join(f'{name} {_words(value)}' for name, value in knobs.items())}".rstrip(": ")  # fmt: skip


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
