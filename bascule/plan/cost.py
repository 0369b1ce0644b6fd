"""Seconds of one training step on one chip, component by component, from first principles and a few fitted constants.

Formulae: planner.md section 7. All times are seconds a step for the busiest chip; bytes and FLOPs come from the architecture.
The constants are shares of a datasheet's figure (or of a measured matrix-product rate where one is published) and exposed
shares of communication; `fit.py` sets them from the published runs, `data/constants.json` holds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from bascule.errors import RecipeError
from bascule.plan.architecture import Shape
from bascule.plan.catalogue import Chip
from bascule.plan.job import Job

# Taken where a datasheet is silent (all stated in the answer's basis): a full-mesh node of the 910B class, a 200 Gb/s NIC.
TYPICAL_PEAK = 500e12  # FLOP/s at bf16, where `gemm` is taken
LEAST_PEAK = 150e12  # below it no run is published: smaller chips count as this one
ASSUMED_SCALEUP_GBS, ASSUMED_SCALEOUT_GBIT_S, ASSUMED_MEMORY_TBS = 150.0, 200.0, 1.6


@dataclass(frozen=True)
class Constants:
    """Natural logarithms of positive constants, so that a fit cannot leave their range; `PRIOR_SD` is their prior's width."""

    gemm: float = math.log(0.72)  # share of the peak that large matrix products reach (bf16)
    gemm_8bit: float = math.log(0.80)  # further share at 8 bit, casts included
    gemm_4bit: float = math.log(0.65)  # further share at 4 bit
    decline: float = math.log(
        0.1
    )  # how fast that share falls as chips grow: per factor of e in the bf16 peak
    width_half: float = math.log(
        250.0
    )  # local matrix width at which half of that is lost, at 300 TFLOPS
    rows_half: float = math.log(120.0)  # rows per expert likewise
    attention: float = math.log(0.50)  # share of the bf16 peak in flash attention
    window_saved: float = math.log(
        0.5
    )  # share of a sliding window's possible saving that kernels realise
    attention_half: float = math.log(1000.0)  # sequence at which half of that is lost
    elementwise: float = math.log(
        30.0
    )  # bytes touched per token, layer and hidden element, forward and backward
    permute: float = math.log(12.0)  # the same per routed copy of a token
    launch: float = math.log(60e-6)  # seconds a layer and micro-batch that no kernel hides
    launch_moe: float = math.log(500e-6)  # the same for a mixture-of-experts layer
    tp_exposed: float = math.log(0.80)  # share of tensor-parallel traffic that is not hidden
    tp_overlap: float = math.log(0.6)  # further share where the stack overlaps it
    ep_exposed: float = math.log(0.60)
    cp_exposed: float = math.log(0.30)
    dp_exposed: float = math.log(0.35)
    fsdp_exposed: float = math.log(0.30)
    head_stage: float = math.log(
        0.4
    )  # share of the last stage's language-model head that other stages wait for
    optimizer: float = math.log(1.5)  # passes over the optimizer's bytes
    scale: float = math.log(0.008)  # stragglers and jitter per doubling of chips beyond eight


PRIOR_SD = Constants(
    gemm=0.15, gemm_8bit=0.15, gemm_4bit=0.2, decline=0.7, width_half=0.5, rows_half=0.7, attention=0.3, window_saved=0.5, attention_half=0.7, elementwise=0.5, permute=0.6,
    launch=0.7, launch_moe=0.7, tp_exposed=0.4, tp_overlap=0.4, ep_exposed=0.5, cp_exposed=0.5, dp_exposed=0.6, fsdp_exposed=0.6,
    head_stage=0.5, optimizer=0.3, scale=0.7,
)  # fmt: skip

NAMES = tuple(f.name for f in fields(Constants))


def step_components(job: Job, c: Constants) -> dict[str, float]:
    """Seconds of a step by component; their sum is the step. Keys: matmul, uneven stages, experts, attention, elementwise, launch,
    tensor parallel, all-to-all, context parallel, pipeline bubble, data parallel, optimizer, stragglers."""
    lay = job.layout
    busy = _compute(job, c) | _inside_pipeline(job, c)
    total = sum(busy.values())
    result = dict(busy)
    result["pipeline bubble"] = total * bubble_share(
        lay.pp, job.micro_batches, lay.vpp, lay.schedule
    )
    result["data parallel"] = _data_parallel(job, c, total)
    result["optimizer"] = _optimizer(job, c)
    doublings = max(0.0, math.log2(job.chips / 8))
    result["stragglers"] = sum(result.values()) * math.exp(c.scale) * doublings
    return result


def bubble_share(pp: int, micro_batches: int, virtual: int, schedule: str) -> float:
    """Idle time of a pipeline with equal stages over its busy time (planner.md 7.5); `schedule.py` simulates unequal ones."""
    if pp == 1:
        return 0.0
    share = (pp - 1) / (micro_batches * max(1, virtual))
    return share * {"zb": 0.35, "dualpipe": 0.35}.get(schedule, 1.0)


def gemm_peak(chip: Chip, precision: str) -> float:
    """FLOP/s that matrix products are scaled by: the datasheet's dense peak. Raises RecipeError when nobody printed one."""
    peak = chip.peak_tflops(precision)
    if peak is None:
        if chip.fp8_tflops is None:
            raise RecipeError(
                f"No dense peak at {precision} is published for {chip.name}; give it in a chip file or measure it with qualify."
            )
        peak = (
            chip.fp8_tflops / 2
        )  # matrix units of this generation halve their rate at twice the width
    return peak * 1e12


def reached(chip: Chip, precision: str, c: Constants) -> float:
    """FLOP/s of large matrix products: a smaller share of a larger chip's peak. Where a measured rate is published, half of its departure from the typical is believed."""
    large = max(gemm_peak(chip, "bf16"), LEAST_PEAK) / TYPICAL_PEAK
    share = math.exp(c.gemm) * math.pow(large, -math.exp(c.decline))
    if chip.gemm_bf16_tflops and chip.bf16_tflops:
        share *= math.sqrt(chip.gemm_bf16_tflops / chip.bf16_tflops / 0.78)
    native = {"fp8": chip.fp8_tflops, "fp4": chip.fp4_tflops, "int8": chip.int8_tops}.get(precision)
    if precision != "bf16" and native:
        share *= math.exp(c.gemm_8bit) * (math.exp(c.gemm_4bit) if precision == "fp4" else 1.0)
    return gemm_peak(chip, precision) * share


def _narrow(width: float, half: float) -> float:
    return width / (width + half)


def _tiled(width: float, tile: int) -> float:
    """Share of whole tiles that a width fills."""
    return width / (math.ceil(width / tile) * tile)


def matrix_unit(chip: Chip) -> int:
    """Side of the chip's matrix unit: 256 on TPUs since v6e, else taken as 128."""
    return 256 if chip.vendor == "Google" and (chip.year or 0) >= 2024 else 128


def _compute(job: Job, c: Constants) -> dict[str, float]:
    """Matrix products, attention, element-wise traffic and launches of one chip's share of a step."""
    s, lay, chip = job.shape, job.layout, job.chip
    tokens = job.tokens_per_step / job.chips  # token-passes through the whole model per chip
    rate, plain = reached(chip, job.precision, c), reached(chip, "bf16", c)
    again = {"none": 0.0, "selective": 0.0, "full": 1.0}[lay.recompute]
    faster = rate / 300e12
    half = math.exp(c.width_half) * math.sqrt(faster)
    inner = s.ffn if s.ffn else s.shared_ffn + s.topk * s.moe_ffn
    good = _narrow(min(s.hidden, inner / lay.tp), half) * _narrow(job.micro_tokens, 2 * half)
    dense = s.active_weights - s.head_weights - _routed(s)
    result = {"matmul": tokens * (6 + 2 * again) * dense / rate / good}
    head = tokens * 6 * s.head_weights / plain / good
    result["matmul"] += head
    if lay.pp > 1:
        result["uneven stages"] = math.exp(c.head_stage) * head * (lay.pp - 1)
    if s.moe:
        rows = job.micro_tokens * lay.ep * s.topk / s.experts
        fine = _narrow(rows, math.exp(c.rows_half) * math.sqrt(faster)) * _narrow(
            min(s.hidden, s.moe_ffn), half
        )
        fine *= _tiled(s.hidden, matrix_unit(chip)) * _tiled(s.moe_ffn, matrix_unit(chip))
        result["experts"] = tokens * (6 + 2 * again) * _routed(s) / rate / fine
    passes = 3.5 + (1.0 if lay.recompute in ("full", "selective") else 0.0)
    span = s.attention_flops(job.sequence, saved=min(1.0, math.exp(c.window_saved)))
    unit = (
        matrix_unit(chip) if matrix_unit(chip) > 128 else 96
    )  # what a head must fill for half the rate
    narrow_heads = _narrow(128 if s.latent else s.head_dim, unit) / _narrow(128, unit)
    narrow_heads *= _narrow(job.sequence, math.exp(c.attention_half))
    flash = gemm_peak(chip, "bf16") * math.exp(c.attention) * _attention_seen(chip, c)
    result["attention"] = tokens * passes * span / (flash * narrow_heads)
    traffic = tokens * s.layers * s.hidden * math.exp(c.elementwise) * (1 + again / 3)
    copies = tokens * s.moe_layers * s.hidden * s.topk * math.exp(c.permute)
    result["elementwise"] = (traffic + copies) / memory_bytes_s(chip)
    layers = s.layers / lay.pp * job.micro_batches
    moe_share = s.moe_layers / s.layers
    result["launch"] = (
        layers
        * (math.exp(c.launch) * (1 - moe_share) + math.exp(c.launch_moe) * moe_share)
        * (1 + again / 3)
    )
    return result


def _attention_seen(chip: Chip, c: Constants) -> float:
    """Where qualify measured attention (512 positions, heads of 64), half of its departure from the typical is believed."""
    if not chip.attention_tflops:
        return 1.0
    typical = (
        math.exp(c.attention)
        * _narrow(512, math.exp(c.attention_half))
        * _narrow(64, 96)
        / _narrow(128, 96)
    )
    return math.sqrt(chip.attention_tflops * 1e12 / gemm_peak(chip, "bf16") / typical)


def _routed(s: Shape) -> float:
    """Active weights of routed experts over the whole model, multi-token prediction included."""
    return (s.moe_layers + (s.mtp_layers if s.moe else 0)) * s.topk * s.expert_weights


def memory_bytes_s(chip: Chip) -> float:
    return (chip.memory_tbs or ASSUMED_MEMORY_TBS) * 1e12


def link_bytes_s(chip: Chip, group: int) -> float:
    """Bytes a second and chip in one direction for a collective over `group` neighbouring chips: the scale-up domain where it
    fits, else the network, with the part inside the domain done first."""
    up = (chip.scaleup_gbs or ASSUMED_SCALEUP_GBS) * 1e9 * 0.8
    out = (chip.scaleout_gbit_s or ASSUMED_SCALEOUT_GBIT_S) / 8 * 1e9 * 0.88
    domain = chip.scaleup_chips or 8
    return up if group <= domain else min(up, out * domain)


def all_to_all_s(chip: Chip, shape: Shape, group: int, bytes_per_copy: float) -> float:
    """Seconds a token's copies take to their experts, spread over `group` chips (planner.md 7.4).

    A copy crosses the network once for each distinct domain its experts sit in (at most the routing's limit) and is handed
    on inside; without a domain border every copy travels on the scale-up links.
    """
    domain = chip.scaleup_chips or 8
    up = (chip.scaleup_gbs or ASSUMED_SCALEUP_GBS) * 1e9 * 0.8
    inside = min(shape.topk, group) * (1 - 1 / group) * bytes_per_copy / up
    if group <= domain:
        return inside
    out = (chip.scaleout_gbit_s or ASSUMED_SCALEOUT_GBIT_S) / 8 * 1e9 * 0.88
    domains = math.ceil(group / domain)
    reached_domains = distinct_groups(shape.experts, shape.topk, domains)
    if shape.node_limit:
        reached_domains = min(reached_domains, shape.node_limit)
    return max(reached_domains * (1 - 1 / domains) * bytes_per_copy / out, inside)


def distinct_groups(experts: int, topk: int, groups: int) -> float:
    """Expected number of groups that `topk` uniform picks without replacement touch."""
    size = experts / groups
    missed = 1.0
    for i in range(topk):
        missed *= max(0.0, (experts - size - i) / (experts - i))
    return groups * (1 - missed)


def _inside_pipeline(job: Job, c: Constants) -> dict[str, float]:
    """Traffic that every micro-batch waits for: tensor, expert and context parallelism."""
    s, lay, chip = job.shape, job.layout, job.chip
    tokens = (
        job.tokens_per_step / lay.dp / lay.cp / lay.pp
    )  # tokens that pass through one chip's layers a step
    result: dict[str, float] = {}
    if lay.tp > 1:
        share = math.exp(c.tp_exposed) * (math.exp(c.tp_overlap) if lay.tp_overlap else 1.0)
        reduces = 4 + (2 if lay.recompute == "full" else 0)
        volume = reduces * 2 * (lay.tp - 1) / lay.tp * tokens * s.hidden * 2 * s.layers
        result["tensor parallel"] = share * volume / link_bytes_s(chip, lay.tp)
    if s.moe and lay.ep > 1:
        copy_bytes = s.hidden * ((1 if job.precision != "bf16" else 2) + 2)  # out and back
        passes = 2 * tokens / lay.tp * s.moe_layers  # forward and backward
        seconds = passes * all_to_all_s(chip, s, lay.ep * lay.tp, copy_bytes)
        result["all-to-all"] = math.exp(c.ep_exposed) * seconds
    if lay.cp > 1:
        width = (
            2 * s.kv_heads * s.head_dim
            if s.latent is None
            else s.heads * (s.latent.nope + s.latent.rope + s.latent.v)
        )
        volume = 3 * (lay.cp - 1) * tokens / lay.tp * width * 2 * s.layers
        result["context parallel"] = (
            math.exp(c.cp_exposed) * volume / link_bytes_s(chip, lay.cp * lay.tp)
        )
    return result


def _data_parallel(job: Job, c: Constants, busy: float) -> float:
    """Exposed gradient and weight traffic. Sharded weights are fetched again every micro-batch and hide behind compute."""
    s, lay, chip = job.shape, job.layout, job.chip
    replicas = lay.dp * lay.cp
    if replicas == 1:
        return 0.0
    dense = (s.parameters - s.expert_parameters) / lay.tp / lay.pp
    experts = s.expert_parameters / lay.ep / lay.pp if s.moe else 0.0
    speed = link_bytes_s(chip, replicas * lay.tp)
    part = (replicas - 1) / replicas
    if lay.zero >= 3:
        volume = 6 * (dense + experts) * part * (job.micro_batches if lay.pp == 1 else 1)
        wire = volume / speed
        return math.exp(c.fsdp_exposed) * wire + max(
            0.0, math.sqrt(math.hypot(busy**2, wire**2)) - busy
        )
    return math.exp(c.dp_exposed) * 6 * (dense + experts) * part / speed


def _optimizer(job: Job, c: Constants) -> float:
    """Read and write of weights, gradients and moments (26 bytes a parameter), states split by ZeRO."""
    s, lay = job.shape, job.layout
    split = lay.dp * lay.cp if lay.zero else 1
    dense = (s.parameters - s.expert_parameters) / lay.tp / lay.pp / split
    experts = (
        s.expert_parameters
        / lay.pp
        / max(lay.ep * lay.tp, job.chips / lay.pp if lay.zero else lay.ep)
    )
    return math.exp(c.optimizer) * 26 * (dense + experts) / memory_bytes_s(job.chip)


def step_seconds(job: Job, c: Constants) -> float:
    return sum(step_components(job, c).values())
