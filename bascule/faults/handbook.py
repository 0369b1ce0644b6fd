"""docs/faults.md, made from the catalogue: `python -m bascule.faults.handbook > docs/faults.md`. A test keeps it current."""

from __future__ import annotations

import sys

from bascule.config.load import package_toml
from bascule.faults.catalogue import (
    DEFECTS_FILE,
    KINDS,
    SEVERITIES,
    FaultSpec,
    Profile,
    load_profile,
    profiles,
)

_INTRO = """# Faults that bascule can plant

Written by `python -m bascule.faults.handbook`; a test keeps it current. Every number, rate and onset below is our own construction
for drills and tests. The rows (A3, E5, ...) are publicly reported defects, listed at the end with the profiles that play them.

## Profiles

Open one with `sim:NAME`, over another base with `sim:NAME@cuda`, at another severity with `sim:NAME:low` or `sim:NAME:high` (medium
is the default), and change a knob of its faults with `sim:NAME:high?onset_step=40&rate=0.1`. A profile is opened only when it is
named, never by autodetection.

| profile | still fit for | what it plays | rows | low | high |
|---|---|---|---|---|---|"""


def markdown() -> str:
    loaded = [load_profile(name) for name in profiles()]
    return "\n".join([_INTRO, *map(_profile, loaded), *_unseen(loaded), *_kinds(), *_knobs(), *_defects(loaded)]) + "\n"  # fmt: skip


def _profile(profile: Profile) -> str:
    story = " ".join(f"{profile.title}. {profile.story}".split())
    low, high = (
        ", ".join(f"{knob} {value}" for knob, value in knobs.items())
        for knobs in (profile.low, profile.high)
    )
    return f"| `{profile.name}` | {', '.join(profile.fit_for) or 'nothing'} | {story} | {', '.join(profile.plays)} | {low} | {high} |"


def _unseen(loaded: list[Profile]) -> list[str]:
    lines = [
        "",
        "## What a quick qualification leaves alone",
        "",
        "Marked in the data, with the reason; the truth table (docs/checks.md) holds every other profile and severity to its verdicts.",
        "",
        "| profile | severity | why it is not seen there |",
        "|---|---|---|",
    ]
    for profile in loaded:
        reasons: dict[str, list[str]] = {}
        for severity in SEVERITIES:
            if severity in profile.unseen:
                reasons.setdefault(profile.unseen[severity], []).append(severity)
        lines += [f"| `{profile.name}` | {', '.join(at)} | {why} |" for why, at in reasons.items()]
    return lines


def _kinds() -> list[str]:
    lines: list[str] = []
    for family in dict.fromkeys(kind.family for kind in KINDS):
        lines += [
            "",
            f"## Kinds: {family}",
            "",
            "| kind | what happens | rows | `amount` (default) |",
            "|---|---|---|---|",
        ]
        for kind in (kind for kind in KINDS if kind.family == family):
            amount = f"{kind.amount} ({kind.default:g})" if kind.amount else ""
            lines.append(f"| `{kind.name}` | {kind.what} | {kind.rows} | {amount} |")
    return lines


def _knobs() -> list[str]:
    lines = ["", "## Knobs of every fault", "", "| knob | default | meaning |", "|---|---|---|"]
    lines += [
        f"| `{name}` | `{info.default}` | {info.description} |"
        for name, info in FaultSpec.model_fields.items()
        if info.description
    ]
    return lines


def _defects(loaded: list[Profile]) -> list[str]:
    lines = [
        "",
        "## Reported defects, and which profile plays them",
        "",
        "A compute units, B memory, C links, D kernels and plug-ins, E numerics, F node, storage, inference state.",
        "",
        "| row | defect | played by, or why not |",
        "|---|---|---|",
    ]
    for row, defect in package_toml(DEFECTS_FILE).items():
        players = ", ".join(f"`{profile.name}`" for profile in loaded if row in profile.plays)
        lines.append(f"| {row} | {defect['what']} | {players or 'not played: ' + defect['not_played']} |")  # fmt: skip
    return lines


if __name__ == "__main__":
    sys.stdout.write(markdown())
