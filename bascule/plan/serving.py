"""Inference on one kind of chip: prefill and decode under latency limits, from bytes and FLOPs plus the floors a roofline forgets.

A decoding step reads the weights it touches and the cache, computes, waits for its collectives, and pays a launch-and-sync floor
in every layer; without those floors a roofline promises two to four times too much (planner.md 7.3). The batch is what the
time-per-token limit and the memory leave. Published points nearest to the question correct the physics, as in training.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, fields, replace
from importlib import resources

import numpy as np

from bascule.plan.architecture import Shape
from bascule.plan.catalogue import Chip
from bascule.plan.cost import all_to_all_s, gemm_peak, link_bytes_s, memory_bytes_s
from bascule.plan.regress import Point, Process, Term

WEIGHT_BYTES = {
    "bf16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "fp4": 0.5625,
}  # 4-bit formats carry a scale for every 16 or 32 values
MTP_ACCEPTED = (
    1.7  # tokens a step with one draft token; assumed (no source read prints the acceptance)
)
MEMORY_USABLE = 0.88


@dataclass(frozen=True)
class ServeConstants:
    """Natural logarithms of positive constants, as in cost.py."""

    memory: float = math.log(0.70)  # share of memory bandwidth reached
    compute: float = math.log(0.45)  # share of the matrix peak in decoding
    prefill: float = math.log(0.42)  # the same in prefill
    attention: float = math.log(0.45)
    layer: float = math.log(60e-6)  # launch and synchronisation floor of a layer
    sequence: float = math.log(
        8e-6
    )  # scheduling and sampling a sequence and step, by one scheduler (a data-parallel rank's own)
    exposed: float = math.log(0.7)  # share of collectives not hidden
    rows: float = math.log(24.0)  # rows per chip at which half of the matrix rate is lost


SERVE_PRIOR_SD = ServeConstants(
    memory=0.25,
    compute=0.4,
    prefill=0.3,
    attention=0.4,
    layer=0.7,
    sequence=0.8,
    exposed=0.5,
    rows=0.7,
)
SERVE_NAMES = tuple(f.name for f in fields(ServeConstants))


@dataclass(frozen=True, kw_only=True)
class Serving:
    """One operating point of a service. `batch`: sequences per chip (None: the largest the limit and the memory allow).

    `split`: experts are spread and attention is data-parallel (else tensor-parallel over the replica's chips). `phase` is
    prefill, decode, or both (prompts and completions share the chips).
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
    software: str = "unknown"

    @property
    def context(self) -> float:
        """Mean tokens in the cache of a sequence while it decodes."""
        return self.prompt + self.completion / 2


def step_s(p: Serving, c: ServeConstants, batch: float) -> dict[str, float]:
    """Seconds of one decoding step with `batch` sequences a chip, by component."""
    s, chip, n = p.shape, p.chip, max(1, p.chips)
    size = WEIGHT_BYTES[p.precision]
    dense = s.parameters - s.expert_parameters - s.head_weights
    everyone = batch * n
    touched = 1 - (1 - s.topk / s.experts) ** everyone if s.moe else 0.0
    weights = (
        dense if p.split and s.moe else dense / n
    ) * size + s.expert_parameters * touched / n * size
    copies = n if s.latent and not p.split else 1  # a latent cache cannot be cut by heads
    cache = (
        batch
        * p.context
        * s.cache_bytes(element_bytes=2 if p.precision == "bf16" else 1.5)
        * copies
    )
    active = s.active_weights - s.mtp_layers * s.mtp_weights
    good = batch * n / (batch * n + math.exp(c.rows))
    spans = _span_flops(s) * p.context
    work = {
        "weights": weights / memory_bytes_s(chip) / math.exp(c.memory),
        "cache": cache / memory_bytes_s(chip) / math.exp(c.memory),
        "matmul": batch
        * p.accepted**0.5
        * 2
        * active
        / (gemm_peak(chip, p.precision) * math.exp(c.compute) * good),
        "attention": batch * copies * spans / (gemm_peak(chip, "bf16") * math.exp(c.attention)),
        "collectives": math.exp(c.exposed) * _collectives(p, batch),
        "launches": s.layers * math.exp(c.layer) * (1.0 if n == 1 else 1 + 0.15 * math.log2(n)),
        "scheduling": (batch if p.split and s.moe else everyone) * math.exp(c.sequence),
    }
    return work


def _span_flops(s: Shape) -> float:
    """FLOPs a decoded token spends on each token of context, all layers (absorbed MLA works on the latent)."""
    if s.latent:
        return 2.0 * s.heads * (2 * s.latent.kv_lora + s.latent.rope) * s.layers
    return 4.0 * s.heads * s.head_dim * s.layers


def _collectives(p: Serving, tokens: float) -> float:
    """Seconds of collectives for `tokens` a chip: two all-to-alls in each MoE layer, or two all-reduces in each layer."""
    s, n = p.shape, max(1, p.chips)
    if n == 1:
        return 0.0
    if p.split and s.moe:
        return tokens * s.moe_layers * all_to_all_s(p.chip, s, n, 3 * s.hidden)
    return 2 * 2 * (n - 1) / n * tokens * n * s.hidden * 2 * s.layers / link_bytes_s(p.chip, n) / 2


def prefill_s_per_token(p: Serving, c: ServeConstants) -> float:
    """Chip-seconds of one prompt token."""
    s = p.shape
    active = s.active_weights - s.mtp_layers * s.mtp_weights - s.head_weights
    matmul = 2 * active / (gemm_peak(p.chip, p.precision) * math.exp(c.prefill))
    attention = s.attention_flops(max(1, int(p.prompt))) / (
        gemm_peak(p.chip, "bf16") * math.exp(c.attention)
    )
    return matmul + attention + 0.5 * math.exp(c.exposed) * _collectives(p, 1.0)


def memory_batch(p: Serving) -> float:
    """Sequences a chip that its memory can hold beside the weights; at least a hundredth."""
    s, n = p.shape, max(1, p.chips)
    size = WEIGHT_BYTES[p.precision]
    dense = s.parameters - s.expert_parameters
    held = (dense if p.split and s.moe else dense / n) * size + s.expert_parameters / n * size
    room = MEMORY_USABLE * (p.chip.memory_gb or 64.0) * 1e9 - held
    copies = n if s.latent and not p.split else 1
    return max(
        0.01,
        room
        / (
            s.cache_bytes(element_bytes=2 if p.precision == "bf16" else 1.5)
            * (p.prompt + p.completion)
            * copies
        ),
    )


def token_s(p: Serving, c: ServeConstants, batch: float) -> float:
    """Seconds between two tokens a user sees: a decoding step, and the prompts that share the chip in `both`."""
    step = sum(step_s(p, c, batch).values()) / p.accepted
    if p.phase == "both":
        step += batch * p.prompt / max(1.0, p.completion) * prefill_s_per_token(p, c)
    return step


def chosen_batch(p: Serving, c: ServeConstants) -> float:
    """The batch per chip of a point: given, else the largest whose token time keeps the limit, memory permitting."""
    most = memory_batch(p)
    if p.batch is not None:
        return min(p.batch, most)
    limit = p.tpot_s or 0.1
    low, high = 0.01, most
    if token_s(p, c, high) <= limit:
        return high
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if token_s(p, c, middle) <= limit else (low, middle)
    return low


def rate(p: Serving, c: ServeConstants) -> float:
    """Tokens a second and chip: prompt tokens in prefill, completion tokens in decode and both."""
    if p.phase == "prefill":
        return 1 / prefill_s_per_token(p, c)
    batch = chosen_batch(p, c)
    return batch / token_s(p, c, batch)


SERVE_TERMS = (
    Term(()),
    Term(("vendor",)),
    Term(("chip",)),
    Term(("model",)),
    Term(("kind",)),
    Term(("software",)),
    Term((), "near"),
    Term(("chip", "model"), "near"),
    Term(("chip", "model", "software"), "near"),
    Term(("chip", "model", "style")),
    Term(("chip",), "constants"),
)
SERVE_NUMBERS = (
    "log2 batch",
    "log2 prompt",
    "log2 completion",
    "log2 chips",
    "log2 active",
    "log2 token time",
    "memory share",
)


def serve_point(
    p: Serving,
    c: ServeConstants,
    *,
    target: str = "rate",
    family: str = "",
    name: str = "",
    noise: float = 1.0,
) -> Point:
    batch = chosen_batch(p, c) if p.phase != "prefill" else 64.0
    parts = step_s(p, c, batch)
    numbers = (
        math.log2(max(batch, 0.01)),
        math.log2(max(1.0, p.prompt)),
        math.log2(max(1.0, p.completion)),
        math.log2(max(1, p.chips)),
        math.log2(p.shape.active_weights),
        math.log2(token_s(p, c, batch)),
        (parts["weights"] + parts["cache"]) / sum(parts.values()),
    )
    slopes = []
    for key in SERVE_NAMES:
        value = getattr(c, key)
        up, down = (serve_value(p, replace(c, **{key: value + d}), target) for d in (1e-2, -1e-2))
        slopes.append((math.log(up) - math.log(down)) / 2e-2)
    words = {
        "vendor": p.chip.vendor,
        "chip": p.chip.name,
        "model": p.shape.name,
        "software": p.software,
        "kind": p.phase,
        "style": "split" if p.split else "tensor",
    }
    return Point(words, tuple(numbers), tuple(slopes), family, name, noise)


def serve_value(p: Serving, c: ServeConstants, target: str) -> float:
    """`rate`: tokens/s/chip; `tpot`: seconds per token at the point's batch; `total`: prompt and completion tokens/s/chip."""
    if target == "tpot":
        return token_s(p, c, chosen_batch(p, c))
    value = rate(p, c)
    return value * (1 + p.prompt / max(1.0, p.completion)) if target == "total" else value


@dataclass(frozen=True)
class ServeModel:
    """Constants, regression on published points, and the factor that makes its intervals hold 80 %."""

    constants: ServeConstants
    process: Process
    interval_width: float

    def predict(self, p: Serving, target: str = "rate") -> tuple[float, float, float]:
        """Value, low and high of `serve_value`. The regression learns rates; a latency errs the other way."""
        point = serve_point(p, self.constants, target=target)
        back = np.array(
            [getattr(ServeConstants(), n) - getattr(self.constants, n) for n in SERVE_NAMES]
        )
        sign = -1.0 if target == "tpot" else 1.0
        mirrored = replace(point, gradient=tuple(sign * g for g in point.gradient))
        mean, sd = self.process.predict([mirrored])
        value = serve_value(p, self.constants, target) * math.exp(
            sign * (float(mean[0]) + float(np.array(mirrored.gradient) @ back))
        )
        width = math.exp(self.interval_width * float(sd[0]))
        return value, value / width, value * width

    def nearest(self, p: Serving) -> list[str]:
        return self.process.nearest(serve_point(p, self.constants))


@functools.cache
def shipped_serving() -> ServeModel:
    with (
        resources.files("bascule.plan")
        .joinpath("data/serving.json")
        .open(encoding="utf-8") as handle
    ):
        raw = json.load(handle)
    points = tuple(
        Point(
            a["words"],
            tuple(a["numbers"]),
            tuple(a["gradient"]),
            a["family"],
            a["name"],
            a["noise"],
        )
        for a in raw["anchors"]
    )
    process = Process(
        points, np.array([a["target"] for a in raw["anchors"]]), SERVE_TERMS, np.array(raw["sizes"]), np.array([raw["lengths"][n] for n in SERVE_NUMBERS]),
        np.array([getattr(SERVE_PRIOR_SD, n) for n in SERVE_NAMES]), raw["noise"],
    )  # fmt: skip
    return ServeModel(
        ServeConstants(*[raw["constants"][n] for n in SERVE_NAMES]), process, raw["interval_width"]
    )
