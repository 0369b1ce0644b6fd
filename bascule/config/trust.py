"""The sections about chips and the trust in them: `[pools.NAME]`, `[qualify]`, `[guard]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from bascule.config.section import Section


class PoolConfig(Section):
    """Chips of one kind that a run may use. `accelerator` is a name for accelerators.open; `a|b` takes the first that opens.

    In a recipe file a list, `accelerator = ["cuda:0", "cuda:1"]`, makes several chips: pool `gpu` becomes `gpu-0` and `gpu-1`, each with
    verdicts of its own, side by side in the owner's order. When one fails the next takes over before another pool does.
    """

    accelerator: str = Field(
        ...,
        min_length=1,
        description="cpu, cuda, cuda:1, npu, sim:PROFILE[@BASE]; 'cuda|cpu' = first that opens; a list = several chips, one after the other",
    )
    chip_of: str | None = Field(
        None, description="the pool whose list named this chip; not to be set by hand"
    )
    price_per_hour: float | None = Field(None, ge=0)
    price_unit: str = "USD"
    chips: int = Field(
        1,
        ge=1,
        description="chips of the pool that its price counts and whose links are examined where there are several; a run trains on one at a time",
    )


class QualifyConfig(Section):
    quick: bool = True
    time_limit_s: float | None = Field(
        None,
        gt=0,
        description="per pool; unset: 180 s (the full battery: 3,600 s), up to 20 times as long for models of more than 1 M parameters. A check that does not end is evidence",
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
    budget_percent: Annotated[float, Field(gt=0, le=100)] | Literal["full"] = Field(
        1.0,
        description="share of the step time for checksums and audits; their intervals follow from costs measured in the run. 'full': every step. An interval set below holds whatever the budget says",
    )
    checksum_every_steps: int | None = Field(
        None,
        ge=1,
        description="check every matmul of every n-th step, forward and both backward products; unset: as the budget allows, every 128th until its prices are known",
    )
    audit_every_steps: int | None = Field(
        None,
        ge=1,
        description="replay one rotating layer of every n-th step on the referee; unset: as the budget allows, every 512th until its prices are known",
    )
    certify_sequences: int = Field(
        8,
        ge=0,
        description="sequences of the step after a snapshot that the referee replays to certify it; 0 = all",
    )
    rule_out_rate: float = Field(
        0.001,
        gt=0,
        le=1,
        description="a snapshot is certified once the products checked since would have shown, with 95 %, a lasting fault that strikes this share of products",
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
    incidents_gib: float = Field(
        20.0,
        gt=0,
        description="what all incidents of a run may take on the disk: beyond it the oldest ones lose their weights and gradients, never their story, batch and product",
    )


def one_pool_a_chip(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's pools and order with every pool that lists several chips taken apart. Raises ValueError for a list that names none."""
    pools: dict[str, Any] = {}
    chips: dict[str, list[str]] = {}
    for name, pool in raw["pools"].items():
        named = pool.get("accelerator") if isinstance(pool, Mapping) else None
        if not isinstance(named, list):
            pools[name], chips[name] = pool, [name]
            continue
        if not named:
            raise ValueError(
                f'pools.{name}.accelerator: the list is empty; name a chip, e.g. ["cuda:0", "cuda:1"]'
            )
        chips[name] = [f"{name}-{number}" for number in range(len(named))]
        for chip, accelerator in zip(chips[name], named, strict=True):
            pools[chip] = {**pool, "accelerator": accelerator, "chip_of": name}
    clash = [
        chip
        for name, parts in chips.items()
        for chip in parts
        if chip != name and chip in raw["pools"]
    ]
    if clash:
        raise ValueError(
            f"pools: '{clash[0]}' is a chip's name already, from a list of accelerators; call the other pool something else"
        )
    prefer = raw.get("prefer", ())
    if not isinstance(prefer, list | tuple):
        return {**raw, "pools": pools}  # refused later, by its type
    order = [chip for name in prefer for chip in chips.get(name, [name])]
    return {**raw, "pools": pools, "prefer": order}
