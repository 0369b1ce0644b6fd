"""Memory of one chip while training, by component and pipeline stage (planner.md 7.6). Bytes.

Activations are summed over the tensors that the backward pass needs, from the architecture; a stage of a 1F1B pipeline holds as
many micro-batches as it has successors, the last one also holds the logits. A framework's own buffers and the allocator's
fragmentation are two constants fitted on the runs that printed their peak (fit.py).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

from bascule.plan.architecture import Shape
from bascule.plan.job import Job, Layout

GIB = 2.0**30


@dataclass(frozen=True)
class MemoryConstants:
    """`base_gib`: context, libraries, communication buffers; `slack`: peak over the counted sum (fragmentation), with a
    factor by stack where runs showed one; `kept`: share of the tensor list that is really kept; `logits_bytes`: bytes a logit costs at the last stage's peak; `spread`: factor to
    the ends of the 80 % interval."""

    base_gib: float = 2.0
    slack: float = 1.05
    kept: float = 0.9
    logits_bytes: float = 9.0
    spread: float = 1.15
    slack_by_stack: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Peak of the worst stage. `parts` in bytes; `verdict` fits / tight / does not fit with `margin_bytes` left (may be negative)."""

    stage: int
    stages: int
    parts: dict[str, float]
    total: float
    low: float
    high: float
    available: float | None
    verdict: str

    @property
    def margin_bytes(self) -> float | None:
        return None if self.available is None else self.available - self.total


@functools.cache
def shipped_memory() -> MemoryConstants:
    with (
        resources.files("bascule.plan")
        .joinpath("data/constants.json")
        .open(encoding="utf-8") as handle
    ):
        return MemoryConstants(**json.load(handle).get("memory", {}))


def memory_of(job: Job, constants: MemoryConstants | None = None) -> Memory:
    """The worst pipeline stage's peak. `tight`: the upper end of the interval would not fit."""
    c = constants or shipped_memory()
    stages = [
        (stage_parts(job, stage, c), stage) for stage in {0, job.layout.pp // 2, job.layout.pp - 1}
    ]
    parts, stage = max(stages, key=lambda pair: sum(pair[0].values()))
    total = sum(parts.values())
    available = job.chip.memory_gb * 1e9 if job.chip.memory_gb else None
    low, high = total / c.spread, total * c.spread
    if available is None:
        verdict = "unknown"
    else:
        verdict = "does not fit" if total > available else "tight" if high > available else "fits"
    return Memory(stage, job.layout.pp, parts, total, low, high, available, verdict)


def stage_parts(job: Job, stage: int, c: MemoryConstants) -> dict[str, float]:
    """Bytes of one pipeline stage (0 is the first), with fragmentation spread over the parts."""
    s, lay = job.shape, job.layout
    dense, experts = stage_parameters(s, lay.pp, stage)
    if lay.schedule == "dualpipe":  # a device also holds the stage that mirrors its own
        mirrored = stage_parameters(s, lay.pp, lay.pp - 1 - stage)
        dense, experts = dense + mirrored[0], experts + mirrored[1]
    dense, experts = dense / lay.tp, experts / max(lay.ep, 1)
    replicas = max(1, lay.dp * lay.cp)
    expert_replicas = max(1.0, job.chips / lay.pp / max(lay.ep, 1))
    split = dense / replicas + experts / expert_replicas
    both = dense + experts
    # Sharded weights stay gathered, and gradients whole, through a pipeline's micro-batches; else one layer at a time is there.
    whole = both if lay.pp > 1 else 2 * both / max(1.0, s.layers / lay.pp)
    parts = {
        "weights": 2 * (split + whole) if lay.zero >= 3 else 2 * both,
        "gradients": 4 * split + (2 * both if lay.zero >= 3 and lay.pp > 1 else 0.0)
        if lay.zero >= 2
        else 4 * both,
        "optimizer": 12 * (split if lay.zero >= 1 else both),
        "activations": _activations(job, stage, c),
        "logits": _logits(job, stage, c),
    }
    slack = c.slack * c.slack_by_stack.get(job.software, 1.0)
    return {name: value * slack for name, value in parts.items()} | {"framework": c.base_gib * GIB}


def stage_parameters(s: Shape, pp: int, stage: int) -> tuple[float, float]:
    """(all but routed experts, routed experts) of one stage: layers spread evenly, embedding first, head last."""
    layers = s.layers / pp
    dense_first = min(layers, max(0.0, s.dense_layers - stage * layers)) if s.moe else layers
    moe = layers - dense_first
    plain = (
        layers * s.attention_weights
        + dense_first * s.dense_ffn_weights
        + moe * (s.shared_weights + s.router_weights)
    )
    experts = moe * s.experts * s.expert_weights
    if stage == 0:
        plain += s.head_weights
    if stage == pp - 1:
        plain += s.head_weights * (0 if s.tied and pp == 1 else 1)
        plain += s.mtp_layers * (s.attention_weights + s.shared_weights + 2 * s.hidden**2)
        experts += s.mtp_layers * s.experts * s.expert_weights if s.moe else 0
    return float(plain), float(experts)


def in_flight(lay: Layout, micro_batches: int, stage: int) -> float:
    """Micro-batches whose activations a stage holds at its peak, in units of the whole stage (planner.md 7.5 and 7.6): 1F1B and
    zero-bubble as many as stages follow, DualPipe one more than the pipeline is deep."""
    pp, vpp = lay.pp, lay.vpp
    held = float(pp + 1 if lay.schedule == "dualpipe" else min(micro_batches, pp - stage))
    if vpp > 1 and pp > 1:
        held *= 1 + (pp - 1) / (pp * vpp)
    return min(held, float(micro_batches))


def layer_activation_bytes(s: Shape, tp: int, *, recompute: str) -> float:
    """Bytes one token leaves behind in one (average) layer, bf16, flash attention, sequence parallel with tensor parallel."""
    if recompute == "full":
        return 2.0 * s.hidden / tp
    if s.latent is None:
        attention = 2 * s.hidden + s.head_dim * (3 * s.heads + 2 * s.kv_heads)
    else:
        m = s.latent
        wide = s.heads * (2 * (m.nope + m.rope) + 2 * m.v)
        attention = 2 * s.hidden + (m.q_lora or 0) + 2 * m.kv_lora + m.rope + wide
    dense = 2 * s.hidden + (3 if s.gated else 2) * s.ffn
    if not s.moe:
        return 2.0 * (attention + dense) / tp
    inner = 3 if s.gated else 2
    routed = s.topk * (2 * s.hidden + inner * s.moe_ffn) + inner * s.shared_ffn + 2 * s.hidden
    share = s.moe_layers / s.layers
    return 2.0 * (attention + share * routed + (1 - share) * dense) / tp


def every_second_product(s: Shape, tp: int) -> float:
    """Bytes one token leaves behind in a layer under op-level selective recomputation (torchtitan's): the layer's input, the
    attention's output, and the outputs of every second matrix product (of queries, values, one of the feed-forward's, the last)."""
    inner = s.topk * s.moe_ffn + s.shared_ffn if s.moe else s.ffn
    attended = s.heads * (s.latent.v if s.latent else s.head_dim)
    return 2.0 * (2 * s.hidden + 2 * attended + s.kv_heads * s.head_dim + inner) / tp


def _activations(job: Job, stage: int, c: MemoryConstants) -> float:
    """What waits for the backward pass, and one layer at work there: its gradients, and its tensors where they are rebuilt."""
    s, lay = job.shape, job.layout
    whole = c.kept * layer_activation_bytes(s, lay.tp, recompute="none")
    rebuilt = lay.recompute == "full" or (lay.recompute == "selective" and lay.zero >= 3)
    kept = whole
    if rebuilt:
        full = lay.recompute == "full"
        kept = (
            layer_activation_bytes(s, lay.tp, recompute="full")
            if full
            else every_second_product(s, lay.tp)
        )
    waiting = kept * s.layers / lay.pp * in_flight(lay, job.micro_batches, stage)
    return job.micro_tokens * (waiting + whole * (2 if rebuilt else 1))


def _logits(job: Job, stage: int, c: MemoryConstants) -> float:
    last = job.layout.pp - 1
    if stage != last and not (job.layout.schedule == "dualpipe" and stage == 0):
        return 0.0
    return (
        job.micro_tokens
        * job.shape.vocab
        * c.logits_bytes
        / job.layout.tp
        * (1 + job.shape.mtp_layers)
    )
