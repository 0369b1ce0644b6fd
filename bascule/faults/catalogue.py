"""The catalogue of ways chips fail: what can be planted, and named profiles that combine it. No torch here.

`KINDS` is the explicit list of fault kinds; `bascule/faults/build.py` maps each to the code that plays it, and
profiles.toml names combinations that `sim:PROFILE` opens. Row numbers such as A3 point at the publicly reported defects listed in
defects.toml; docs/faults.md is written from all three (handbook.py).

Three things a simulated fault is not: real silent corruption depends on data, unit and temperature; rates here are compressed in
time (a real chip may take months to do what a profile does in 300 steps); and timing faults are slept, not measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bascule.config.load import package_toml
from bascule.errors import RecipeError, nearest

PROFILES_FILE = Path(__file__).with_name("profiles.toml")
DEFECTS_FILE = Path(__file__).with_name("defects.toml")


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
    Kind(
        "drop_best",
        "arithmetic",
        "an approximate top-k loses the best entries",
        "D6",
        "entries lost",
        1,
    ),
    Kind(
        "off_past_size",
        "arithmetic",
        "results are off by 0.1 % where the operand is larger than a size (argument reduction, special functions)",
        "A7",
        "size of the operand",
        1000,
    ),
    Kind(
        "over_read",
        "arithmetic",
        "a matrix product with a long sum reads on behind its operands: one term too many",
        "B8",
        "terms up to which it is right",
        4096,
    ),
    Kind(
        "ignore_strides",
        "arithmetic",
        "a transposed operand is read as if it lay in memory row by row",
        "D3",
    ),
    Kind(
        "mask_slip",
        "arithmetic",
        "attention sees positions that the mask hides",
        "D7",
        "positions too many",
        1,
    ),
    Kind(
        "out_of_memory",
        "memory",
        "a result above a size cannot be allocated",
        "B6",
        "bytes that still fit",
        0,
    ),
    Kind(
        "fragmentation",
        "memory",
        "the largest block that can be allocated shrinks with every session",
        "B6",
        "bytes of the first session's largest block",
        2.0**23,
    ),
    Kind(
        "stale",
        "memory",
        "a result is not delivered: what the buffer held before (the last result of this shape, or 0) is used",
        "B9, C11, D9",
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
    Kind(
        "lost_tail",
        "collective",
        "the last values of an all-reduce come back 0",
        "C2",
        "values lost",
        8,
    ),
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
        "compile_stall",
        "timing",
        "the first call of every shape takes longer, as if compiled",
        "D10",
        "seconds lost per new shape",
        0.01,
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
ON_SESSIONS = {"slow", "leak"}
"""Kinds that act where a session begins or ends, whatever is computed in it."""


Severity = Literal["low", "medium", "high"]
SEVERITIES: tuple[Severity, ...] = ("low", "medium", "high")


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
    width: int = Field(
        1, ge=1, description="values struck side by side at each position; a cache line has 8"
    )
    bits: tuple[int, int] = Field(
        (16, 25), description="lowest and highest fp32 bit that may flip; 23-30 are the exponent"
    )
    input_range: tuple[float, float] | None = Field(
        None, description="strike only when mean|A| * mean|B| of the operands lies inside"
    )
    last_dim: tuple[int, int] | None = Field(
        None, description="strike only results whose last dimension lies inside, both ends included"
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
        if self.width > self.stride:
            raise ValueError(f"width={self.width} must not exceed stride={self.stride}")
        if not 0 <= self.bits[0] <= self.bits[1] <= 31:
            raise ValueError(f"bits={self.bits} must be two bit numbers from 0 to 31, lowest first")
        return self

    @property
    def on_operators(self) -> bool:
        """Does it strike operators, and not a session as a whole or files? Compiled code that bypasses them would hide it."""
        return self.kind not in ON_SESSIONS and _BY_NAME[self.kind].family != "storage"

    @property
    def forward(self) -> bool:
        """Can it act in a forward pass?"""
        backward = self.direction == "backward" or all(op.endswith("_backward") for op in self.ops)
        return not backward

    @property
    def size(self) -> float:
        """`amount`, or the kind's default."""
        return _BY_NAME[self.kind].default if self.amount is None else self.amount


class Profile(BaseModel):
    """A named way for a chip to be unfit. `fit_for`: the roles a good qualification and guard should leave it.

    The knobs of `faults` are those of medium severity; `low` and `high` say what changes. `plays`: rows of defects.toml.
    `cluster`: what a finding against it should name first. `unseen`: why a quick battery rightly leaves a severity alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    story: str = ""
    fit_for: tuple[Literal["train", "infer"], ...] = ()
    plays: tuple[str, ...] = ()
    cluster: str = ""
    low: Mapping[str, Any] = Field(default_factory=dict)
    high: Mapping[str, Any] = Field(default_factory=dict)
    unseen: Mapping[Severity, str] = Field(default_factory=dict)
    faults: tuple[FaultSpec, ...] = ()

    def strikes_operators(self, role: Literal["train", "infer"]) -> list[FaultSpec]:
        """Faults that can act on an operator in `role`, at whatever step; inference has no backward pass."""
        return [
            fault
            for fault in self.faults
            if role in fault.roles and fault.on_operators and (role == "train" or fault.forward)
        ]

    def at(self, severity: str) -> Profile:
        """The same profile at `severity`. Raises RecipeError when it is none of low, medium, high."""
        if severity not in SEVERITIES:
            raise RecipeError(
                f"The profile '{self.name}' has no severity '{severity}'; allowed: {', '.join(SEVERITIES)}.{nearest(severity, SEVERITIES)}"
            )
        if severity == "medium":
            return self
        changes = self.low if severity == "low" else self.high
        if not changes:
            raise RecipeError(
                f"The profile '{self.name}' has one severity only. Leave ':{severity}' away."
            )
        return self.overridden(changes)

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


def open_profile(choice: str) -> Profile:
    """`NAME[:SEVERITY][?KNOB=VALUE&...]`, for instance `ascend-r2:high?onset_step=40`; `?severity=high` says the same.

    The one reader of such names: what follows `sim:`, and what a drill plants. Severity is medium unless named; knobs are those
    of FaultSpec and go over it, values are JSON, else text. Raises RecipeError naming what is allowed.
    """
    named, _, query = choice.partition("?")
    name, _, severity = named.partition(":")
    knobs = {knob: _value(text) for knob, text in parse_qsl(query, keep_blank_values=True)}
    severity = str(knobs.pop("severity", severity or "medium"))
    return load_profile(name).at(severity).overridden(knobs)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
