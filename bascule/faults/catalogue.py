"""The catalogue of ways chips fail: what can be planted, and named profiles that combine it. No torch here.

`KINDS` is the explicit list of fault kinds; `bascule/faults/build.py` maps each to the code that plays it, and
profiles.toml names combinations that `sim:PROFILE` opens. Row numbers such as A3 point at the public defect reports collected in
docs/faults.md, which `python -m bascule.faults.catalogue --markdown` writes from this file.

Three things a simulated fault is not: real silent corruption depends on data, unit and temperature; rates here are compressed in
time (a real chip may take months to do what a profile does in 300 steps); and timing faults are slept, not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bascule.config import package_toml
from bascule.errors import RecipeError, nearest

PROFILES_FILE = Path(__file__).with_name("profiles.toml")


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to fail. `amount` says what FaultSpec.amount means for it and its default; None when it has no meaning."""

    name: str
    family: Literal["arithmetic", "memory", "collective", "timing", "storage", "runtime"]
    what: str
    rows: str
    amount: str | None = None
    default: float = 0.0


KINDS: tuple[Kind, ...] = (
    Kind("zeroed", "arithmetic", "values of a result become 0 at periodic positions", "A2, A3"),
    Kind(
        "bit_flip",
        "arithmetic",
        "several bits of a value flip at periodic positions; the result stays finite",
        "A4",
    ),
    Kind("sign", "arithmetic", "values change their sign at periodic positions", "A1"),
    Kind(
        "mixed",
        "arithmetic",
        "the realistic mix: 51 % of the struck values zeroed, 48 % flipped (60 % of those in several bits), 1 % NaN",
        "A1-A4",
        "share of NaN",
        0.01,
    ),
    Kind("nan", "arithmetic", "values become NaN at periodic positions", "E4, F11"),
    Kind("gain", "arithmetic", "the whole result is scaled", "A7, C3, D4", "the factor", 1.002),
    Kind(
        "truncate",
        "arithmetic",
        "the result is cut toward zero instead of rounded: small bias, always the same way",
        "E5",
        "mantissa bits kept",
        10,
    ),
    Kind(
        "narrow_inputs",
        "arithmetic",
        "operands are rounded to fewer mantissa bits first (a reduced default precision)",
        "E7",
        "mantissa bits kept",
        10,
    ),
    Kind(
        "narrow_accumulation",
        "arithmetic",
        "partial sums of a matrix product are rounded every 128 terms",
        "E1, E2",
        "mantissa bits kept",
        13,
    ),
    Kind(
        "saturate",
        "arithmetic",
        "infinity becomes the largest number and NaN becomes 0, so overflow goes unseen",
        "E3",
    ),
    Kind(
        "flush_tiny",
        "arithmetic",
        "small results become 0",
        "E6",
        "largest magnitude flushed",
        1e-7,
    ),
    Kind(
        "overflow_past_rows",
        "arithmetic",
        "rows beyond an on-chip buffer come back infinite",
        "B7",
        "rows that fit",
        1024,
    ),
    Kind(
        "jitter",
        "arithmetic",
        "the last bits differ from run to run (unordered sums); the only kind that is not reproducible",
        "C5, E11",
        "relative size",
        2.0**-22,
    ),
    Kind("drop_best", "arithmetic", "an approximate top-k loses the best entry", "D6"),
    Kind(
        "out_of_memory",
        "memory",
        "a result above a size cannot be allocated",
        "B6",
        "bytes that still fit",
        0,
    ),
    Kind(
        "leak",
        "memory",
        "every session leaves memory behind until the chip is full",
        "B5",
        "bytes left per session",
        4e6,
    ),
    Kind(
        "bit_rot",
        "memory",
        "a bit flips in the memory of an operand (a weight) and stays flipped",
        "B2, B3",
    ),
    Kind(
        "wrong_sum",
        "collective",
        "an all-reduce comes back without one rank's part of some values",
        "C1",
    ),
    Kind("double_sum", "collective", "an all-reduce is applied twice", "C3"),
    Kind("lost_tail", "collective", "the last 8 values of an all-reduce come back 0", "C2"),
    Kind("slow", "timing", "the session takes longer", "F1, F2", "times as long", 3.0),
    Kind("hang", "timing", "a call never returns", "A9, C6", "seconds it hangs, 0 for ever", 0),
    Kind(
        "host_fallback",
        "timing",
        "an operator silently runs on the host, with only a warning",
        "D2",
        "seconds lost per call",
        0.002,
    ),
    Kind(
        "torn_write",
        "storage",
        "a file ends in the middle",
        "F4",
        "share of the file that is kept",
        0.5,
    ),
    Kind(
        "flipped_write",
        "storage",
        "a few bits of a written file differ from what was written",
        "F4",
        "bits flipped",
        8,
    ),
    Kind("lost_write", "storage", "a file is there but holds only zeros", "F4"),
    Kind("missing_operator", "runtime", "an operator does not exist on the chip", "D1"),
    Kind(
        "process_death",
        "runtime",
        "the process is killed at once, as when a chip falls off the bus",
        "A9, F3",
    ),
    Kind(
        "device_error",
        "runtime",
        "the runtime reports a device exception and the session is lost",
        "A8, B1",
    ),
)

_BY_NAME = {kind.name: kind for kind in KINDS}


class FaultSpec(BaseModel):
    """One planted fault: what, where, when, how often. Steps count from 1; a step before `onset_step` is never touched."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    ops: tuple[str, ...] = Field(
        ("matmul",),
        description="operators or groups: matmul, softmax, attention, all_reduce, any, or an aten name",
    )
    roles: tuple[Literal["train", "infer"], ...] = ("train", "infer")
    direction: Literal["forward", "backward", "both"] = "both"
    onset_step: int = Field(1, description="first step (or request) at which it can fire")
    until_step: int | None = Field(None, description="last step at which it can fire")
    ramp_steps: int = Field(0, ge=0, description="steps over which the rate grows from the onset")
    rate: float = Field(1.0, gt=0, le=1, description="share of the matching calls that it strikes")
    transient: bool = Field(False, description="gone on any later attempt at the same step")
    stride: int = Field(
        61, ge=1, description="distance of struck positions in the flattened result"
    )
    values: int | None = Field(
        None, ge=1, description="at most so many values per struck call; None = all at the stride"
    )
    bits: tuple[int, int] = Field(
        (16, 25), description="lowest and highest fp32 bit that may flip; 23-30 are the exponent"
    )
    input_range: tuple[float, float] | None = Field(
        None, description="strike only when mean|A| * mean|B| of the operands lies inside"
    )
    min_elements: int = Field(
        256, ge=1, description="smaller results are neither struck nor counted"
    )
    amount: float | None = Field(None, description="the kind's own number; see the catalogue")
    seed: int = 0

    @model_validator(mode="after")
    def _known_kind(self) -> Self:
        if self.kind not in _BY_NAME:
            raise ValueError(
                f"'{self.kind}' is not a fault kind; allowed: {', '.join(_BY_NAME)}.{nearest(self.kind, _BY_NAME)}"
            )
        if not 0 <= self.bits[0] <= self.bits[1] <= 31:
            raise ValueError(f"bits={self.bits} must be two bit numbers from 0 to 31, lowest first")
        return self

    @property
    def size(self) -> float:
        """`amount`, or the kind's default."""
        return _BY_NAME[self.kind].default if self.amount is None else self.amount


class Profile(BaseModel):
    """A named way for a chip to be unfit. `fit_for`: the roles a good qualification and guard should leave it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    story: str = ""
    fit_for: tuple[Literal["train", "infer"], ...] = ()
    faults: tuple[FaultSpec, ...] = ()

    def overridden(self, knobs: Mapping[str, Any]) -> Profile:
        """The same profile with `knobs` (fields of FaultSpec) set in every fault. Raises RecipeError on a knob it lacks."""
        unknown = [knob for knob in knobs if knob not in FaultSpec.model_fields]
        if unknown:
            raise RecipeError(
                f"The profile '{self.name}' has no knob '{unknown[0]}'; allowed: {', '.join(FaultSpec.model_fields)}.{nearest(unknown[0], FaultSpec.model_fields)}"
            )
        try:
            faults = tuple(
                FaultSpec.model_validate({**fault.model_dump(), **knobs}) for fault in self.faults
            )
        except ValidationError as error:
            raise RecipeError(
                f"The profile '{self.name}' refuses {dict(knobs)}: {error.errors()[0]['msg']}."
            ) from None
        return self.model_copy(update={"faults": faults})


def kinds() -> Mapping[str, Kind]:
    return _BY_NAME


def profiles() -> list[str]:
    """Names that `sim:` takes, in the order of profiles.toml."""
    return list(package_toml(PROFILES_FILE))


def load_profile(name: str) -> Profile:
    """Raises RecipeError naming what is allowed when there is no such profile."""
    known = package_toml(PROFILES_FILE)
    if name not in known:
        raise RecipeError(
            f"There is no fault profile '{name}'; allowed: {', '.join(known)}.{nearest(name, known)}"
        )
    return Profile.model_validate({"name": name, **known[name]})


def markdown() -> str:
    """docs/faults.md, made from this file and profiles.toml."""
    lines = [
        "# Faults that bascule can plant",
        "",
        "Written by `python -m bascule.faults.catalogue --markdown`; a test keeps it current. Every number, rate and onset below is our",
        "own construction for drills and tests. The rows (A3, E5, ...) are those of our catalogue of publicly reported defects.",
        "",
        "## Profiles",
        "",
        "Open one with `sim:NAME`, over another base with `sim:NAME@cuda`, and change a knob of its faults with",
        "`sim:NAME?onset_step=40&rate=0.1`. A profile is opened only when it is named, never by autodetection.",
        "",
        "| profile | still fit for | what it plays |",
        "|---|---|---|",
    ]
    for name in profiles():
        profile = load_profile(name)
        story = " ".join(f"{profile.title}. {profile.story}".split())
        lines.append(f"| `{name}` | {', '.join(profile.fit_for) or 'nothing'} | {story} |")
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
    lines += ["", "## Knobs of every fault", "", "| knob | default | meaning |", "|---|---|---|"]
    for name, info in FaultSpec.model_fields.items():
        if info.description:
            lines.append(f"| `{name}` | `{info.default}` | {info.description} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--markdown"]:
        sys.exit("usage: python -m bascule.faults.catalogue --markdown > docs/faults.md")
    sys.stdout.write(markdown())
