"""The sections of the finished model: `[evaluate]`, `[serve]`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bascule.config.section import Section

# Named one by one: `*` would open a server on this machine to every page that its user visits.
Origin = Annotated[str, Field(pattern=r"^https?://[^/\s*]+$")]


class EvaluateConfig(Section):
    samples: int = Field(
        8, ge=1, description="samples per held-out problem, for pass@1 and pass@k at temperature 1"
    )
    min_pass_at_1: float | None = Field(
        None, ge=0, le=1, description="gate: exit 3 when the final pass@1 is below this"
    )


class ServeConfig(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    allow_origins: tuple[Origin, ...] = Field(
        (),
        description="web pages of other origins (https://chat.example) whose scripts may use the server; none by default",
    )
    max_queue: int = Field(
        64, ge=1, description="sequences that may wait beyond the 256 that run; then 429"
    )
    timeout_s: float = Field(600, gt=0, description="an answer that takes longer ends with 504")
    reproducible: bool = Field(
        False,
        description="equal bits whatever else is in the batch; free on a CPU, elsewhere a step costs 1.1 to 3.5 times as much",
    )
    precision: Literal["fp32", "bf16", "int8"] = Field(
        "fp32",
        description="of a larger model's matrices; a CPU needs a unit for bf16 and a C++ compiler for int8, other chips have bf16 alone; stamps, /version and the server's first line say which",
    )
    speculate: int = Field(
        0,
        ge=0,
        description="while at most so many sequences run, a prediction layer guesses a token ahead; same answers; pays for large models only",
    )
    audit_every: int = Field(
        32,
        ge=0,
        description="every n-th answer is scored again on the CPU; 0 = never, and never when the CPU itself serves",
    )
