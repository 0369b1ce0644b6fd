"""The sections about chips and the trust in them: `[pools.NAME]`, `[qualify]`, `[guard]`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bascule.config.section import Section


class PoolConfig(Section):
    """Chips of one kind that a run may use. `accelerator` is a name for accelerators.open; `a|b` takes the first that opens."""

    accelerator: str = Field(
        ...,
        min_length=1,
        description="cpu, cuda, cuda:1, npu, sim:PROFILE[@BASE]; 'cuda|cpu' = first that opens",
    )
    price_per_hour: float | None = Field(None, ge=0)
    price_unit: str = "USD"
    chips: int = Field(1, ge=1)


class QualifyConfig(Section):
    quick: bool = True
    time_limit_s: float = Field(
        180.0, gt=0, description="per pool; a check that does not end is evidence"
    )
    required: bool = Field(
        True, description="refuse to place a role on a pool whose verdict is not fit"
    )
    parallel: int = Field(
        1,
        ge=1,
        description="pools examined at the same time; more than 1 blurs the speeds of pools that share a machine",
    )
    max_age_days: float = Field(
        90.0,
        gt=0,
        description="an older verdict is void: bad silicon often shows only after months",
    )


class GuardConfig(Section):
    enabled: bool = True
    checksum_every_steps: int = Field(
        64,
        ge=1,
        description="check every matmul of every n-th step, forward and both backward products",
    )
    audit_every_steps: int = Field(
        200, ge=1, description="replay one rotating layer of every n-th step on the referee"
    )
    budget_percent: Annotated[float, Field(gt=0, le=100)] | Literal["full"] | None = Field(
        None,
        description="share of the step time for checksums and audits; their intervals follow from costs measured in the run. 'full': every step; unset: the intervals above",
    )
    certify_sequences: int = Field(
        8,
        ge=0,
        description="sequences of the step after a snapshot that the referee replays to certify it; 0 = all",
    )
    spike_sigma: float = Field(
        8.0, gt=0, description="robust z-score of loss and gradient norm that raises an alarm"
    )
    hang_timeout_s: float = Field(60.0, gt=0, description="no progress for this long is a hang")
    start_timeout_s: float = Field(
        180.0, gt=0, description="a worker must show its first progress within this time"
    )
    transient_strikes: int = Field(
        2, ge=1, description="confirmed transient faults before a chip is condemned anyway"
    )
