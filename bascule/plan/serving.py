"""Inference on one kind of chip: prefill and decode under latency limits, from bytes and FLOPs plus the floors a roofline forgets.

A decoding step reads the weights it touches and the cache, computes, waits for its collectives, and pays a launch-and-sync floor
in every layer; without those floors a roofline promises two to four times too much (planner.md 7.3). The batch is what the
time-per-token limit and the memory leave. Published points nearest to the question correct the physics, as in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from bascule.plan.architecture import Shape
from bascule.plan.catalogue import Chip
from bascule.plan.cost import all_to_all_s, gemm_peak, link_bytes_s, memory_bytes_s

WEIGHT_BYTES = {
    "bf16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "fp4": 0.5625,
}  # 4-bit formats carry a scale for every 16 or 32 values
FOUR_BIT_ONLY = (
    "gpt-oss",
)  # released with 4-bit weights alone, whatever a table or a question calls them
MEMORY_USABLE = 0.92  # of a chip's memory, for weights and cache: engines set 0.9 to 0.95 by default or by tuning
INDEX_READ = 0.1  # of a position's cache, what an index keeps of it and reads each time
SOFTWARE_TODAY = 2026.4  # year, with its fraction, of software that nobody dates
LEAST_BATCH = 0.01  # sequences a chip; what is left where the weights alone fill the memory


@dataclass(frozen=True)
class ServeConstants:
    """Natural logarithms of positive constants, as in cost.py."""

    memory: float = math.log(0.75)  # share of memory bandwidth reached
    grouped: float = math.log(
        0.6
    )  # further share in reading routed experts: many small matrices, few rows each
    compute: float = math.log(0.55)  # share of the matrix peak in decoding
    prefill: float = math.log(0.5)  # the same in prefill
    narrow: float = math.log(0.7)  # further share at 4 bit
    routed: float = math.log(1.5)  # routed experts' products cost more: few rows each
    experts: float = math.log(
        1.4
    )  # spread experts: the busiest chip's share of rows and weights over the mean
    attention: float = math.log(
        0.75
    )  # share of the matrix peak in attention that decodes, its reads aside
    flash: float = math.log(0.6)  # the same over a prompt
    layer: float = math.log(75e-6)  # launch and synchronisation floor of a layer
    layer_moe: float = math.log(1.5)  # further factor where the layer routes tokens to experts
    sequence: float = math.log(8e-6)  # scheduling and sampling a sequence and step
    request: float = math.log(1e-3)  # chip-seconds a request costs before its first token
    exposed: float = math.log(0.7)  # share of collectives not hidden
    rows: float = math.log(24.0)  # rows per chip at which half of the matrix rate is lost
    mixing: float = math.log(1.5)  # prompts cost more where they interrupt decoding
    load: float = math.log(0.6)  # a production average over a day's load, over the rate when full


SERVE_PRIOR_SD = ServeConstants(
    memory=0.1,
    grouped=0.3,
    compute=0.21,
    prefill=0.21,
    narrow=0.21,
    routed=0.21,
    experts=0.17,
    attention=0.28,
    flash=0.21,
    layer=0.35,
    layer_moe=0.21,
    sequence=0.56,
    request=0.7,
    exposed=0.35,
    rows=0.49,
    mixing=0.28,
    load=0.17,
)
SERVE_NAMES = tuple(f.name for f in fields(ServeConstants))


@dataclass(frozen=True, kw_only=True)
class Serving:
    """One operating point of a service. `batch`: sequences per chip (None: the largest the limit and the memory allow).

    `split`: experts are spread and attention is data-parallel (else tensor-parallel over the replica's chips). `phase` is
    prefill, decode, or both (prompts and completions share the chips). `prefill_chips`: chips of `chips` that only prefill
    (the others only decode). `group`: decoding chips that share one copy of the weights (None: all of them). `weight_bytes` None: as the precision says. `cached`: share of prompt tokens found in a cache.
    `averaged`: a production average, idle hours included. `varied`: completions differ in length as their mean is long, so
    that the long ones fill the decoding steps. `balanced`: every expert gets as many rows, by force. `apart`: prompts run on chips
    of their own, as many as keep the decoding ones busy (where `prefill_chips` does not say how many).
    """

    shape: Shape
    chip: Chip
    chips: int
    precision: str
    phase: str
    prompt: float
    completion: float
    batch: float | None = None
    tpot_s: float | None = None
    split: bool = True
    accepted: float = 1.0
    prefill_chips: int = 0
    group: int | None = None
    weight_bytes: float | None = None
    cached: float = 0.0
    averaged: bool = False
    varied: bool = False
    balanced: bool = False
    apart: bool = False
    software: str = "unknown"
    software_date: float = SOFTWARE_TODAY

    @property
    def context(self) -> float:
        """Mean tokens in the cache of a sequence while it decodes."""
        return self.prompt + self.completion * (1.0 if self.varied else 0.5)

    @property
    def decoding(self) -> int:
        """Chips that decode."""
        return max(1, self.chips - self.prefill_chips)

    @property
    def replica(self) -> int:
        """Decoding chips that hold the model together."""
        return min(self.group or self.decoding, self.decoding)

    @property
    def element_bytes(self) -> float:
        return self.weight_bytes or WEIGHT_BYTES[self.precision]

    @property
    def cache_bytes(self) -> float:
        """Bytes a token of context holds on all chips together. Services at 8 bit keep keys and values at 8 bit too, latents
        (the more precious bits) at 8 or 16."""
        narrow = 1.5 if self.shape.latent else 1.0
        return self.shape.cache_bytes(element_bytes=2 if self.precision == "bf16" else narrow)

    @property
    def copies(self) -> int:
        """How often tensor parallelism keeps the cache: a latent one once a chip, for it cannot be cut by heads; else so that
        every chip has a head of keys and values."""
        heads = 1 if self.shape.latent else self.shape.kv_heads
        return 1 if self.split else max(1, self.replica // heads)


def as_run(shape: Shape, chip: Chip, precision: str) -> tuple[str, float]:
    """The class in which matrix products and cache run, and the bytes of a weight. A model released at 4 bits alone keeps its weights
    so; they meet 8-bit activations where the chip multiplies 4-bit numbers, and are unpacked to 16 bits, beside a 16-bit cache,
    where it does not (engines' defaults on Hopper and MI300: no kernel there takes both)."""
    if not shape.name.startswith(FOUR_BIT_ONLY) or precision == "bf16":
        return precision, WEIGHT_BYTES[precision]
    return ("fp8" if chip.fp4_tflops else "bf16"), WEIGHT_BYTES["fp4"]


def measured_share(chip: Chip) -> float:
    """Measured matrix rate over the datasheet's, relative to the usual 0.78; 1 where nobody measured."""
    if chip.gemm_bf16_tflops and chip.bf16_tflops:
        return chip.gemm_bf16_tflops / chip.bf16_tflops / 0.78
    return 1.0


def matrix_rate(p: Serving, c: ServeConstants, share: float) -> float:
    """FLOP/s of matrix products that reach this (logarithmic) share of the peak."""
    narrow = math.exp(c.narrow) if p.precision == "fp4" and p.chip.fp4_tflops else 1.0
    return gemm_peak(p.chip, p.precision) * math.exp(share) * measured_share(p.chip) * narrow


def unevenness(p: Serving, c: ServeConstants) -> float:
    """Rows of the busiest chip's experts over the mean; 1 where experts are not spread or the source says they were balanced."""
    return math.exp(c.experts) if p.split and p.replica > 1 and not p.balanced else 1.0


def used_weights(p: Serving, c: ServeConstants) -> float:
    """Matmul weights a token uses, a routed expert's counted as often as it costs more than a dense one; drafts aside."""
    s = p.shape
    routed = s.moe_layers * s.topk * s.expert_weights
    plain = s.active_weights - s.mtp_layers * s.mtp_weights - routed
    return plain + routed * math.exp(c.routed) * unevenness(p, c)


def step_s(p: Serving, c: ServeConstants, batch: float) -> dict[str, float]:
    """Seconds of one decoding step with `batch` sequences a decoding chip, by component. Matrix products overlap with reading their
    weights: both are scaled to the root of their summed squares. Attention's kernels hide little of one behind the other."""
    s, chip, n = p.shape, p.chip, p.replica
    everyone = batch * n
    shared = s.parameters - s.expert_parameters - s.head_weights
    touched = 1 - (1 - s.topk / s.experts) ** (everyone * p.accepted) if s.moe else 0.0
    weights = shared if p.split and s.moe else shared / n
    weights += s.expert_parameters * touched / n / math.exp(c.grouped)
    seen = min(p.context, 4.0 * s.selected) if s.selected else s.cached(p.context)
    seen += INDEX_READ * p.context if s.index_width else 0.0
    active = used_weights(p, c)
    good = everyone / (everyone + math.exp(c.rows))
    rate = matrix_rate(p, c, c.compute)
    span = min(p.context, s.selected) if s.selected else s.cached(p.context)
    bandwidth = memory_bytes_s(chip) * math.exp(c.memory)
    dense = {
        "weights": weights * p.element_bytes / bandwidth,
        "matmul": batch * p.accepted * 2 * active / rate / good,
    }
    overlap = math.hypot(*dense.values()) / sum(dense.values())
    flash = gemm_peak(chip, "bf16") * math.exp(c.attention)
    attended = {
        "cache": batch * seen * p.cache_bytes * p.copies / bandwidth,
        "attention": batch * p.accepted * (_span_flops(s) * span + _index_flops(p)) / flash,
    }
    floor = (s.layers - s.moe_layers + s.moe_layers * math.exp(c.layer_moe)) * math.exp(c.layer)
    return (
        {name: value * overlap for name, value in dense.items()}
        | attended
        | {
            "collectives": math.exp(c.exposed) * _collectives(p, batch * p.accepted),
            "launches": floor * (1 + 0.3 * math.log2(min(n, 64))),
            "scheduling": (batch if p.split and s.moe else everyone) * math.exp(c.sequence),
        }
    )


def _span_flops(s: Shape) -> float:
    """FLOPs a decoded token spends on each token of context, all layers (absorbed MLA works on the latent)."""
    if s.latent:
        return 2.0 * s.heads * (2 * s.latent.kv_lora + s.latent.rope) * s.layers
    return 4.0 * s.heads * s.head_dim * s.layers


def _index_flops(p: Serving) -> float:
    """FLOPs a decoded token spends on looking its whole context over for the positions it will read."""
    return 2.0 * p.shape.index_width * p.shape.layers * p.context


def _collectives(p: Serving, tokens: float) -> float:
    """Seconds of collectives for `tokens` a chip: two all-to-alls in each MoE layer, or two all-reduces in each layer."""
    s, n = p.shape, p.replica
    if n == 1:
        return 0.0
    if p.split and s.moe:
        return tokens * s.moe_layers * all_to_all_s(p.chip, s, n, 3 * s.hidden)
    return 2 * 2 * (n - 1) / n * tokens * n * s.hidden * 2 * s.layers / link_bytes_s(p.chip, n)


def prefill_s_per_token(p: Serving, c: ServeConstants) -> float:
    """Chip-seconds of one prompt token, those found in the prompt cache included."""
    s = p.shape
    active = used_weights(p, c) - s.head_weights
    rate = matrix_rate(p, c, c.prefill)
    attention = s.attention_flops(max(1, int(p.prompt))) / (
        gemm_peak(p.chip, "bf16") * math.exp(c.flash)
    )
    hidden = 0.5 if p.split else 1.0  # two halves of a batch hide each other's; all-reduces wait
    moved = hidden * math.exp(c.exposed) * _collectives(p, 1.0)
    ranks = 1 if p.split and s.moe else p.replica  # tensor parallelism's chips all wait for one
    admitted = math.exp(c.request) * ranks / max(1.0, p.prompt)
    return (2 * active / rate + attention + moved) * (1 - p.cached) + admitted


def memory_batch(p: Serving) -> float:
    """Sequences a decoding chip that its memory can hold beside the weights; at least a hundredth. A paged cache holds what is
    there, not what a sequence may come to: the mean of its context."""
    s, n = p.shape, p.replica
    dense = s.parameters - s.expert_parameters
    held = (dense if p.split and s.moe else dense / n) + s.expert_parameters / n
    room = MEMORY_USABLE * (p.chip.memory_gb or 64.0) * 1e9 - held * p.element_bytes
    return max(0.01, room / (p.cache_bytes * p.shape.cached(p.context) * p.copies))


def token_s(p: Serving, c: ServeConstants, batch: float) -> float:
    """Seconds between two tokens a user sees: a decoding step, and the prompts that share the chip in `both`."""
    step = sum(step_s(p, c, batch).values()) / p.accepted
    if p.phase == "both" and not p.apart:
        prompts = batch * prompts_s(p, c)
        if p.prefill_chips:
            return max(step, prompts * p.decoding / p.prefill_chips)
        step += prompts * math.exp(c.mixing)
    return step


def chosen_batch(p: Serving, c: ServeConstants) -> float:
    """The batch per decoding chip: given, else the largest whose token time keeps the limit, memory permitting. A limit below
    one and a half times the floor was reached with software whose floor is lower: it counts as that much. Spread experts are
    kept busy by a sequence a chip at least: nobody would spread them for less."""
    most = memory_batch(p)
    if p.batch is not None:
        return min(p.batch / decoding_share(p, c), most)
    fewest = min(most, 1.0 if p.split and p.replica > 1 else LEAST_BATCH)
    limit = max(p.tpot_s or 0.1, 1.5 * token_s(p, c, fewest))
    return _batch_at(p, c, limit, most)


def _batch_at(p: Serving, c: ServeConstants, limit: float, most: float) -> float:
    """The batch up to `most` at which a token takes `limit` seconds: a false position in logarithms (the Illinois rule)."""

    def late(x: float) -> float:
        return math.log(token_s(p, c, math.exp(x)) / limit)

    low, high = math.log(LEAST_BATCH), math.log(most)
    under, over = late(low), late(high)
    if over <= 0 or under >= 0:
        return most if over <= 0 else LEAST_BATCH
    x, side = low, 0
    for _ in range(60):
        x = high - over * (high - low) / (over - under)
        here = late(x)
        if abs(here) < 1e-6:
            break
        if here > 0:
            high, over, under = x, here, under * (0.5 if side > 0 else 1.0)
        else:
            low, under, over = x, here, over * (0.5 if side < 0 else 1.0)
        side = 1 if here > 0 else -1
    return math.exp(x)


def prompts_s(p: Serving, c: ServeConstants) -> float:
    """Chip-seconds of prompt behind each completion token."""
    return p.prompt / max(1.0, p.completion) * prefill_s_per_token(p, c)


def decoding_share(p: Serving, c: ServeConstants) -> float:
    """Share of the chips that decode where prompts run apart, both sides kept busy; the batch is all sequences over all chips."""
    share = 1.0
    for _ in range(6 if p.apart and p.batch is not None else 0):
        batch = (p.batch or 0.0) / share
        decode = token_s(p, c, batch) / batch
        share = decode / (decode + prompts_s(p, c))
    return share


def rate(p: Serving, c: ServeConstants) -> float:
    """Tokens a second and chip: prompt tokens in prefill, completion tokens in decode and both."""
    load = math.exp(c.load) if p.averaged else 1.0
    if p.phase == "prefill":
        return load / prefill_s_per_token(p, c)
    batch = chosen_batch(p, c)
    if p.phase == "both" and p.apart:
        return load / (token_s(p, c, batch) / batch + prompts_s(p, c))
    return load * batch / token_s(p, c, batch) * p.decoding / max(1, p.chips)
