"""Failures: how often, what each costs, how often to save, and what share of the time is effective in the end.

A failure loses the work since the last checkpoint and the time to notice, replace and reload. Rates are per thousand node-days
(eight chips a node) with their spread; where nobody published one (Ascend and other Chinese chips), the published range is the
prior and the user sets their own. Young/Daly's interval is given beside the best one found on the exact expectation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CHIPS_PER_NODE = 8


@dataclass(frozen=True)
class FailureRate:
    """Failures per thousand node-days: middle and 80 % range, and where they come from."""

    middle: float
    low: float
    high: float
    source: str


LLAMA3 = (
    "Llama 3: 419 unexpected in 54 days on 16,384 H100 = 3.79; Meta RSC-1/RSC-2 (arXiv:2410.21680) 6.50 / 2.34; "
    "504 B200 (arXiv:2605.09370): 10 GPU failures in 55 days = 2.9"
)
RATES: dict[str, FailureRate] = {
    "NVIDIA": FailureRate(3.79, 2.34, 6.50, LLAMA3),
    "AMD": FailureRate(3.79, 2.0, 10.0, f"no published rate; NVIDIA's range widened ({LLAMA3})"),
    "Google": FailureRate(
        3.0,
        1.6,
        10.0,
        "TPU v4 (Zu et al., NSDI 2024, usenix.org/conference/nsdi24/presentation/zu): hardware outages in about 1 % of jobs; 0.08 % of four-chip machines a day (as recalled) = 1.6 is the lower end; software causes on top, taken as NVIDIA's",
    ),
    "Huawei": FailureRate(
        6.5,
        0.8,
        20.8,
        "unknown: no independent rate for Ascend; range of a vendor claim (cluster MTBF > 24 h, scope ambiguous: 0.8 to 20.8)",
    ),
}
OTHER = FailureRate(
    5.0, 1.5, 15.0, f"no published rate for this vendor; a range wider than NVIDIA's ({LLAMA3})"
)

# Causes of the 419 unexpected interruptions of Llama 3's 54 days on 16,384 H100 (report's table, as printed by
# datacenterdynamics.com and kernel-sesias.net; only causes whose counts those print).
LLAMA3_CAUSES = {
    "GPU and NVLink": 148,
    "GPU HBM3 memory": 72,
    "software": 54,
    "network switch or cable": 35,
    "GPU SRAM": 19,
    "GPU system processor": 17,
    "CPU": 2,
}
LLAMA3_ALL = 419

# Shares of incidents in ByteDance's ByteRobust (778,135 jobs, as excerpted in planner.md 9); rates per chip-hour are not printed.
BYTEROBUST_SHARES = {"CUDA errors": 0.361, "hangs": 0.099, "InfiniBand": 0.029}


def causes_per_chip_hour() -> dict[str, float]:
    """Failures per chip and hour by cause, Llama 3's table; `other` is the rest of the 419."""
    hours = 16384 * 54 * 24
    named = {cause: count / hours for cause, count in LLAMA3_CAUSES.items()}
    return named | {"other": (LLAMA3_ALL - sum(LLAMA3_CAUSES.values())) / hours}


def by_cause(vendor: str, failures: float) -> dict[str, float]:
    """Expected failures split by Llama 3's causes, most first; empty for chips of whose causes nobody printed a table."""
    if vendor != "NVIDIA":
        return {}
    rates = causes_per_chip_hour()
    whole = sum(rates.values())
    return {
        cause: failures * rate / whole
        for cause, rate in sorted(rates.items(), key=lambda one: -one[1])
    }


def rate_of(vendor: str) -> FailureRate:
    return RATES.get(vendor, OTHER)


@dataclass(frozen=True)
class Recovery:
    """Seconds. `save_s` blocks training at each checkpoint; `detect_s` from the failure to the alarm; `restart_s` from there to
    the first new step."""

    save_s: float = 30.0
    detect_s: float = 60.0
    restart_s: float = 540.0

    @property
    def down_s(self) -> float:
        return self.detect_s + self.restart_s


HOST_BYTES_S = 25e9  # a chip's link to its host: half of PCIe 5.0 x16, assumed
AGREE_S = 5.0  # all ranks stop, agree on the step and go on; assumed


def save_seconds(state_bytes: float) -> float:
    """Seconds a save blocks training: each chip copies its share of the state to its host, the rest is written beside the run."""
    return AGREE_S + state_bytes / HOST_BYTES_S


@dataclass(frozen=True)
class Goodput:
    """Effective share of wall time with its 80 % range, the checkpoint interval used, Young/Daly's, and the failures expected."""

    mean_time_to_failure_s: float
    interval_s: float
    young_daly_s: float
    save_s: float
    effective: float
    effective_low: float
    effective_high: float
    failures: float
    wall_s: float
    wall_low_s: float
    wall_high_s: float
    source: str


def mean_time_to_failure(chips: int, per_1000_node_days: float) -> float:
    """Seconds between failures of the whole job."""
    nodes = max(1.0, chips / CHIPS_PER_NODE)
    return 86400.0 * 1000.0 / (nodes * per_1000_node_days)


def young_daly(save_s: float, mttf_s: float) -> float:
    return math.sqrt(2 * save_s * mttf_s)


def effective_share(interval_s: float, mttf_s: float, recovery: Recovery) -> float:
    """Exact expectation for failures that may strike at any time, checkpointing included: useful over wall time.

    A segment of useful work and its checkpoint takes (M + R) * (exp(segment / M) - 1) in expectation.
    """
    segment = interval_s + recovery.save_s
    exponent = segment / mttf_s
    if exponent > 500:
        return 0.0
    return interval_s / ((mttf_s + recovery.down_s) * math.expm1(exponent))


def best_interval(mttf_s: float, recovery: Recovery) -> float:
    """The interval with the largest effective share: golden-section search around Young/Daly's."""
    low, high = (
        math.log(young_daly(recovery.save_s, mttf_s) / 8),
        math.log(young_daly(recovery.save_s, mttf_s) * 2),
    )
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - golden * (high - low), low + golden * (high - low)
        if effective_share(math.exp(a), mttf_s, recovery) > effective_share(
            math.exp(b), mttf_s, recovery
        ):
            high = b
        else:
            low = a
    return math.exp((low + high) / 2)


def simulate(
    useful_s: float,
    chips: int,
    per_1000_node_days: float,
    recovery: Recovery,
    *,
    interval_s: float | None = None,
    runs: int = 200,
    seed: int = 0,
) -> np.ndarray:
    """Wall seconds of `runs` simulated trainings, failure by failure. Deterministic for a seed.

    Each attempt draws a time to failure; what was saved before it is kept, the rest is lost, and recovery itself may be struck.
    """
    mttf = mean_time_to_failure(chips, per_1000_node_days)
    every = interval_s or best_interval(mttf, recovery)
    generator = np.random.default_rng(seed)
    cycle = every + recovery.save_s
    done, wall = np.zeros(runs), np.zeros(runs)
    while (open_runs := done < useful_s).any():
        strikes = generator.exponential(mttf, runs)
        left = useful_s - done
        needed = left + np.floor(left / every) * recovery.save_s
        finished = strikes >= needed
        kept = np.minimum(np.floor(strikes / cycle) * every, left)
        wall += np.where(
            open_runs,
            np.where(finished, needed, strikes + _down(generator, mttf, recovery, runs)),
            0.0,
        )
        done = np.where(open_runs, np.where(finished, useful_s, done + kept), done)
        if mttf < cycle / 20:
            raise ValueError("failures come faster than checkpoints: no progress")
    return wall


def _down(generator: np.random.Generator, mttf: float, recovery: Recovery, runs: int) -> np.ndarray:
    """Recovery that starts again when it is struck itself: geometric number of broken attempts."""
    survive = math.exp(-recovery.down_s / mttf)
    broken = generator.geometric(survive, runs) - 1
    return recovery.down_s * (1 + 0.5 * broken)


def goodput(
    useful_s: float,
    chips: int,
    vendor: str,
    recovery: Recovery | None = None,
    rate: FailureRate | None = None,
    *,
    seed: int = 0,
) -> Goodput:
    """Everything about failures of one run. The 80 % range covers the rate's spread and the luck of one run."""
    how, found = recovery or Recovery(), rate or rate_of(vendor)
    mttf = mean_time_to_failure(chips, found.middle)
    every = best_interval(mttf, how)
    sigma = math.log(found.high / found.low) / 2.563
    draws = np.exp(np.random.default_rng(seed).normal(math.log(found.middle), sigma, 40))
    walls = np.concatenate(
        [
            _walls(useful_s, chips, float(rate), how, every, seed + 1 + i)
            for i, rate in enumerate(draws)
        ]
    )
    low, high = np.quantile(walls, [0.1, 0.9])
    effective = effective_share(every, mttf, how)
    wall = useful_s / max(effective, 1e-9)
    return Goodput(
        mean_time_to_failure_s=mttf,
        interval_s=every,
        young_daly_s=young_daly(how.save_s, mttf),
        save_s=how.save_s,
        effective=effective,
        effective_low=float(useful_s / max(high, wall)),
        effective_high=float(useful_s / min(low, wall)),
        failures=wall / mttf,
        wall_s=wall,
        wall_low_s=float(min(low, wall)),
        wall_high_s=float(max(high, wall)),
        source=found.source,
    )


def _walls(
    useful_s: float, chips: int, rate: float, how: Recovery, every: float, seed: int
) -> np.ndarray:
    """A few simulated runs; a long run is simulated over its first five thousand intervals and scaled."""
    mttf = mean_time_to_failure(chips, rate)
    span = min(useful_s, 400 * max(every, mttf))
    return simulate(span, chips, rate, how, interval_s=every, runs=5, seed=seed) * (useful_s / span)
