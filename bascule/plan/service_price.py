"""A service priced: prefill and decode on separate chips of one kind, under the limits that were asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from bascule.errors import RecipeError
from bascule.plan.architecture import Shape
from bascule.plan.ask import SERVERS, ServeAsk, unheard_of
from bascule.plan.catalogue import Chip, power_w
from bascule.plan.serving import (
    LEAST_BATCH,
    MEMORY_USABLE,
    WEIGHT_BYTES,
    Serving,
    as_run,
    chosen_batch,
    memory_batch,
    step_s,
)
from bascule.plan.serving_forecast import ServeModel, shipped_serving

MOST_CHIPS = 4096  # of one replica


@dataclass(frozen=True)
class Service:
    """One service priced. Rates in tokens a second and chip as (value, low, high); `parts` seconds of a decoding step, scaled to `tpot_s`;
    `without_own`: decode and prefill by published points alone, where the user's own were taken in."""

    ask: ServeAsk
    chips: int
    batch_per_chip: float
    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    tpot_s: tuple[float, float, float]
    ttft_s: float
    ttft_kept: bool
    cache_gb: float
    memory_gb: float | None
    parts: dict[str, float]
    prefill_chips_per_decode_chip: float
    usd_per_m_out: tuple[float, float, float] | None
    kwh_per_m_out: float
    rollout_share: float
    basis: str
    notes: tuple[str, ...]
    without_own: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None


def replica_chips(shape: Shape, chip: Chip, precision: str) -> int:
    """Smallest power of two of chips whose memory holds the weights twice over (room for cache), at least one expert group."""
    need = shape.parameters * WEIGHT_BYTES[precision] * (1.5 if shape.moe else 1.3)
    fit = max(1.0, need / (MEMORY_USABLE * (chip.memory_gb or 64.0) * 1e9))
    return int(2 ** math.ceil(math.log2(fit)))


def within_limit(p: Serving, model: ServeModel) -> Serving:
    """The point with the largest batch at which the corrected time per token keeps the limit, memory permitting; one sequence
    on the whole replica where even that does not."""
    limit = p.tpot_s or 0.1

    def keeps(batch: float) -> bool:
        return batch / model.predict(replace(p, batch=batch))[0] <= limit

    high = memory_batch(p)
    low = min(1 / p.chips, high)
    if keeps(high):
        return replace(p, batch=high)
    for _ in range(14):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return replace(p, batch=low)


def _roomy(p: Serving, *, fixed: bool) -> Serving:
    """The replica with room for a cache beside its weights: its experts spread if that fits, else everything cut by tensor
    parallelism, on twice the chips and so on unless their number is `fixed`. Raises RecipeError with the size that has room."""
    if p.chips > MOST_CHIPS:
        raise RecipeError(
            f"'{p.chips:,} x {p.chip.name}' is no replica; 1 to {MOST_CHIPS:,} chips that serve together are allowed (rates are per chip)."
        )
    sizes = [n for n in (p.chips << i for i in range(13)) if n <= MOST_CHIPS]
    forms = [replace(p, chips=n, split=split) for split in (True, False) for n in sizes]
    found = [one for one in forms if memory_batch(one) > LEAST_BATCH]
    if found and (not fixed or any(one.chips == p.chips for one in found)):
        return next(one for one in found if not fixed or one.chips == p.chips)
    enough = min((one.chips for one in found), default=0)
    do = f"take {enough} chips or more" if enough else "take a chip with more memory"
    words = f"{p.chips} x {p.chip.name} ({p.chip.memory_gb or 64:.0f} GB each)"
    raise RecipeError(
        f"The {p.precision} weights of {p.shape.name} leave no room for a cache on {words}; {do}."
    )


def operating_point(shape: Shape, ask: ServeAsk) -> Serving:
    """The decoding side of a service as asked for, on a replica with room for a cache; its batch is still to be found."""
    n = ask.chips or max(
        replica_chips(shape, ask.chip, ask.precision), 32 if shape.experts >= 64 else 1
    )
    precision, weight_bytes = as_run(shape, ask.chip, ask.precision)
    wanted = Serving(
        shape=shape,
        chip=ask.chip,
        chips=n,
        precision=precision,
        weight_bytes=weight_bytes,
        phase="decode",
        prompt=ask.prompt,
        completion=ask.completion,
        tpot_s=ask.tpot_s,
        software=ask.software,
    )
    return _roomy(wanted, fixed=ask.chips is not None)


def price_service(
    shape: Shape, ask: ServeAsk, *, pue: float, model: ServeModel | None = None
) -> Service:
    """Prefill and decode on separate chips of one kind, the decode batch filled up to the time-per-token limit. `model`: published
    points with the user's own; then what published ones alone say is in the answer too."""
    if model is not None:
        before = price_service(shape, ask, pue=pue)
        return replace(_priced(shape, ask, pue, model), without_own=(before.decode, before.prefill))
    return _priced(shape, ask, pue, shipped_serving())


def _priced(shape: Shape, ask: ServeAsk, pue: float, model: ServeModel) -> Service:
    both = operating_point(shape, ask)
    n = both.chips
    both = within_limit(both, model)
    decode = model.predict(both)
    prefill = model.predict(replace(both, phase="prefill"))
    batch = chosen_batch(both, model.constants)
    tpot = batch / decode[0]
    ttft = ask.prompt / prefill[0] / min(n, 8)
    watts, _ = power_w(ask.chip)
    seconds = (
        1 / decode[0] + ask.prompt / ask.completion / prefill[0]
    )  # chip-seconds of one completion token, its prompt included
    low_s, high_s = (
        1 / decode[2] + ask.prompt / ask.completion / prefill[2],
        1 / decode[1] + ask.prompt / ask.completion / prefill[1],
    )
    usd = None
    if ask.price_usd_h is not None:
        usd = tuple(x * 1e6 / 3600 * ask.price_usd_h for x in (seconds, low_s, high_s))
    notes = []
    if tpot > 1.001 * ask.tpot_s:
        notes.append(
            f"the limit of {ask.tpot_s * 1e3:g} ms a token cannot be kept on {n} chips even for one sequence: its floor is {tpot * 1e3:.1f} ms"
        )
    parts = step_s(both, model.constants, batch)
    corrected = tpot * both.accepted / sum(parts.values())
    if (both.precision, both.element_bytes) != (ask.precision, WEIGHT_BYTES[ask.precision]):
        notes.append(
            f"{shape.name} is released with 4-bit weights alone; on {ask.chip.name} they run as {both.precision}, not as {ask.precision} weights"
        )
    return Service(
        ask=ask, chips=n, batch_per_chip=batch, prefill=prefill, decode=decode,
        tpot_s=(tpot, batch / decode[2], batch / decode[1]), ttft_s=ttft, ttft_kept=ttft <= ask.ttft_s,
        cache_gb=batch * shape.cached(both.context) * both.cache_bytes / 1e9,
        memory_gb=ask.chip.memory_gb, parts={name: value * corrected for name, value in parts.items()},
        prefill_chips_per_decode_chip=(ask.prompt / ask.completion) * decode[0] / prefill[0],
        usd_per_m_out=(usd[0], usd[1], usd[2]) if usd else None, kwh_per_m_out=seconds * 1e6 / 3600 * watts / 1000 * pue,
        rollout_share=(1 / decode[0]) / (1 / decode[0] + 3 / prefill[0]),
        basis=model.basis(both),
        notes=(*notes, *filter(None, [unheard_of(ask.software, SERVERS)])),
    )  # fmt: skip
