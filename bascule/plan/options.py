"""What a recipe would cost on each of its own pools, before anything is booked: memory by component, training time, money.

Small models on one box are bound by launches and narrow matrices, not by a datasheet's peak, so each figure says what it rests
on: `measured on this machine` (qualify's figures, or a matmul probe of this CPU), `datasheet`, or `assumed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bascule.config.recipe import Recipe
from bascule.config.trust import PoolConfig
from bascule.errors import RecipeError
from bascule.model import count
from bascule.plan.architecture import Shape, from_config
from bascule.plan.catalogue import find_chip
from bascule.plan.lengths import Lengths, assumed
from bascule.plan.probe import host_memory_bytes, measure_cpu
from bascule.records import OptionPriced

Measured = Mapping[str, Mapping[str, float | str]]

# Shares and costs of small eager-mode models, from our own runs on one CPU thread (0.46 M to 6 M parameters): matmul work
# reached 0.15 to 0.5 of the probe's rate; a training step issues about 600 operations a layer (Muon's iterations included), a
# decoding step 150; the guard's sampled checks add about a tenth.
MATMUL_SHARE = 0.25
OPERATIONS_PER_LAYER_STEP, OPERATIONS_PER_LAYER_DECODE = 600, 150
LAUNCH_S = {"cpu": 10e-6, "cuda": 8e-6, "npu": 16e-6}
GUARD_SHARE = 0.10
TYPICAL_COMPLETION_SHARE = 0.4  # mean completion over the cap
SPREAD = 2.0  # low = x / SPREAD, high = x * SPREAD where nothing was measured for this model
BF16_ELEMENT_BYTES = 3.0
"""Of an activation under bf16 products, on average: the residual stream, norms and what enters them stay fp32, the rest is bf16 (counted on
tick and mini: 58 to 76 % of what the same elements are taken to be in fp32)."""
PROCESS_BYTES = 300e6  # interpreter and libraries of one trainer process (250 MB, and what torch makes at its first step)


@dataclass(frozen=True)
class Rate:
    """How fast a pool is taken to compute. `spread` is the factor to the interval's ends; `step_flops_per_s` the rate of the
    model's own training step, launches included, where qualify ran it."""

    flops_per_s: float
    launch_s: float
    basis: str
    spread: float = SPREAD
    step_flops_per_s: float | None = None


def price_pools(
    recipe: Recipe,
    available: Mapping[str, float | None],
    measured: Measured | None = None,
    lengths: Lengths | None = None,
) -> list[OptionPriced]:
    """Price every pool of the recipe, preferred first.

    `available`: memory in bytes a pool offers (None: unknown; the host's own for CPU pools). `measured`: per pool any of
    `accelerator` (the name that opened), `chip` (as its driver names it), `matmul_flops_per_s`, `step_flops_per_s`, `sft_step_s`, `grpo_step_s`,
    `train_peak_bytes`, `power_w`; they replace the planner's own. `lengths` of the recipe's texts; unset, assumed.
    """
    texts = lengths or assumed(recipe)
    return [
        _price(
            recipe,
            name,
            recipe.pools[name],
            available.get(name),
            (measured or {}).get(name, {}),
            texts,
        )
        for name in recipe.order
    ]


def _price(
    recipe: Recipe,
    name: str,
    pool: PoolConfig,
    memory: float | None,
    seen: Mapping[str, float | str],
    lengths: Lengths,
) -> OptionPriced:
    shape = from_config(recipe.model)
    family = device_family(str(seen.get("accelerator", pool.accelerator)), memory)
    if memory is None and family == "cpu":
        memory = host_memory_bytes()
    rate = _rate(shape, family, seen)
    seconds = training_seconds(recipe, shape, rate, seen, lengths)
    components = memory_components(recipe, shape, lengths)
    needed = float(seen.get("train_peak_bytes", sum(components.values())))
    timed = timed_phases(recipe, seen)
    if recipe.guard.enabled and not any(timed.values()):
        seconds["guard"] = GUARD_SHARE * sum(seconds.values())
    total = sum(seconds.values())
    hours = total * pool.chips / 3600
    spread = 1.25 if all(timed.values()) else rate.spread
    return OptionPriced(
        pool=name,
        accelerator=pool.accelerator,
        parameters=shape.parameters,
        memory_bytes=needed,
        memory_available_bytes=memory,
        fits=fits(needed, memory),
        train_s=total,
        train_s_low=total / spread,
        train_s_high=total * spread * (1.5 if pool.accelerator.startswith("sim:") else 1.0),
        energy_j=float(seen["power_w"]) * total if "power_w" in seen else None,
        cost=hours * pool.price_per_hour if pool.price_per_hour is not None else None,
        cost_unit=pool.price_unit if pool.price_per_hour is not None else None,
        basis=_basis(rate, timed, seen, pool, lengths, _products(recipe, family)),
        memory_components_bytes=components,
        train_components_s=seconds,
    )


def device_family(accelerator: str, memory: float | None) -> str:
    """`cpu`, `cuda` or `npu` for a pool's accelerator name; a simulated chip counts as its base.

    Of `a|b` the first is taken, unless the memory offered is unknown or the host's own: then the pool opened on the CPU.
    """
    words = [
        word.partition("@")[2] or "cpu" if word.startswith("sim:") else word
        for word in accelerator.split("|")
    ]
    families = [word.partition(":")[0] for word in words]
    host = memory is None or memory == host_memory_bytes()
    return "cpu" if len(families) > 1 and host and "cpu" in families else families[0]


Fits = Literal["fits", "tight", "does not fit", "unknown"]


def fits(needed: float, available: float | None) -> Fits:
    """`tight` above 85 % of what is there: fragmentation and collective buffers live in the rest."""
    if available is None:
        return "unknown"
    return (
        "does not fit" if needed > available else "tight" if needed > 0.85 * available else "fits"
    )


def memory_components(recipe: Recipe, shape: Shape, lengths: Lengths) -> dict[str, float]:
    """Bytes of a trainer on one device at its peak: fp32 weights (and what bf16 products read of them), two fp32 gradients (computed and
    proposed), optimizer, and what the largest step of any phase keeps. Where the chip will be asked (`auto`), of fp32, which is the more."""
    p = shape.parameters
    largest = batches(recipe, lengths).values()
    tokens = max((one.tokens for one in largest), default=0)
    counted = max((one.counted for one in largest), default=0)
    narrow = recipe.train.precision == "bf16"
    copies = 2.0 * (p - shape.head_weights) if narrow else 0.0
    element = BF16_ELEMENT_BYTES if narrow else 4.0
    return {
        "weights": 4.0 * p + copies,
        "gradients": 8.0 * p,
        "optimizer": 8.0 * p,
        "activations": element * tokens * activation_elements(shape),
        "logits": _logits_bytes(counted, shape),
        "process": PROCESS_BYTES,
    }


@dataclass(frozen=True)
class BatchTokens:
    """The largest batch of a phase: `tokens` that pass the layers, `counted` that pass the head."""

    tokens: int
    counted: int


def batches(recipe: Recipe, lengths: Lengths) -> dict[str, BatchTokens]:
    """By phase. Of a group GRPO works a prompt out once, and nothing is padding (model/seats.py): the largest batch is one in
    which every completion is as long as it may be."""
    found: dict[str, BatchTokens] = {}
    for phase in recipe.phase_steps():
        if phase == "pretrain":
            tokens = recipe.pretrain.batch_sequences * recipe.pretrain.sequence_length
            found[phase] = BatchTokens(tokens, tokens)
        elif phase == "sft":
            long = recipe.sft.pack_tokens or lengths.worked_longest
            said = long if recipe.sft.pack_tokens else max(1, long - round(lengths.prompt))
            found[phase] = BatchTokens(
                recipe.sft.batch_sequences * long, recipe.sft.batch_sequences * said
            )
        else:
            grpo = recipe.grpo
            prompts = grpo.prompts // grpo.updates_per_rollout
            said = prompts * grpo.group_size * grpo.max_completion_tokens
            found[phase] = BatchTokens(said + prompts * lengths.prompt_longest, said)
    return found


def _logits_bytes(counted: int, shape: Shape) -> float:
    """Logits, their gradient and one temporary, or of chunks and the head's gradient where they are too many to keep (model/head.py)."""
    whole = 4.0 * counted * shape.vocab
    if whole <= count.KEPT_LOGITS_BYTES:
        return 3.0 * whole
    return 3.0 * count.LOGITS_CHUNK_BYTES + 4.0 * shape.vocab * shape.hidden


def activation_elements(shape: Shape) -> float:
    """Elements kept for the backward pass per token, all layers, no recomputation. Fused attention keeps no scores."""
    inner = shape.ffn if not shape.moe else shape.topk * shape.moe_ffn + shape.shared_ffn
    if shape.latent is None:
        attention = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    else:
        attention = 4 * shape.heads * shape.latent.v
    per_layer = 8 * shape.hidden + attention + 4 * inner
    return float(shape.layers * per_layer)


def training_seconds(
    recipe: Recipe, shape: Shape, rate: Rate, seen: Mapping[str, float | str], lengths: Lengths
) -> dict[str, float]:
    """Seconds of each phase of the recipe, GRPO split into rollouts and updates; measured step times win."""
    result: dict[str, float] = {}
    for phase, steps in recipe.phase_steps().items():
        if f"{phase}_step_s" in seen:
            result[phase] = steps * float(seen[f"{phase}_step_s"])
            continue
        name = "grpo updates" if phase == "grpo" else phase
        if phase == "grpo":
            g = recipe.grpo
            said = TYPICAL_COMPLETION_SHARE * g.max_completion_tokens
            samples, rollouts = g.prompts * g.group_size, steps / g.updates_per_rollout
            result["grpo rollouts"] = rollouts * _rollout_seconds(
                shape, rate, samples, said, g.max_completion_tokens
            )
        tokens, length = typical_step(recipe, phase, lengths)
        result[name] = steps * _step_seconds(shape, rate, tokens, length)
    return result


def typical_step(recipe: Recipe, phase: str, lengths: Lengths) -> tuple[float, float]:
    """(tokens that one step of `phase` works out, tokens of one sequence). Of a group GRPO works the prompt out once."""
    if phase == "pretrain":
        length = float(recipe.pretrain.sequence_length)
        return recipe.pretrain.batch_sequences * length, length
    if phase == "sft":
        length = float(recipe.sft.pack_tokens or lengths.worked)
        return recipe.sft.batch_sequences * length, length
    grpo = recipe.grpo
    prompts = grpo.prompts / grpo.updates_per_rollout
    said = TYPICAL_COMPLETION_SHARE * grpo.max_completion_tokens
    return prompts * (lengths.prompt + grpo.group_size * said), lengths.prompt + said


def _step_seconds(shape: Shape, rate: Rate, tokens: float, length: float) -> float:
    flops = tokens * shape.train_flops(int(length))
    if rate.step_flops_per_s:
        return flops / rate.step_flops_per_s
    work = flops / rate.flops_per_s
    return work + OPERATIONS_PER_LAYER_STEP * (shape.layers + 1) * rate.launch_s


def _rollout_seconds(shape: Shape, rate: Rate, samples: int, tokens: float, cap: int) -> float:
    """One batched rollout: every decoding step costs its launches until the longest sequence ends near the cap."""
    launches = cap * OPERATIONS_PER_LAYER_DECODE * (shape.layers + 1) * rate.launch_s
    return launches + samples * tokens * shape.train_flops(int(tokens)) / 3 / rate.flops_per_s


def _rate(shape: Shape, family: str, seen: Mapping[str, float | str]) -> Rate:
    launch = LAUNCH_S.get(family, LAUNCH_S["npu"])
    if "matmul_flops_per_s" in seen:
        return Rate(
            MATMUL_SHARE * float(seen["matmul_flops_per_s"]),
            launch,
            "measured on this machine (qualify's matrix products"
            + (" and the model's own step)" if "step_flops_per_s" in seen else ")"),
            1.6,
            float(seen["step_flops_per_s"]) if "step_flops_per_s" in seen else None,
        )
    if family == "cpu":
        speed = measure_cpu()
        wide = shape.hidden >= 512
        return Rate(
            MATMUL_SHARE * (speed.warm_flops_per_s if wide else speed.cold_flops_per_s),
            launch,
            "unknown chip: no catalogue row describes this CPU; measured on this machine by a quick numpy matmul probe",
        )
    if "chip" in seen:
        return _datasheet_rate(str(seen["chip"]), launch)
    return Rate(
        1e12,
        launch,
        f"assumed: no figure for this {family} chip yet; 1 TFLOPS effective, launches of {launch * 1e6:.0f} us",
        4.0,
    )


def _datasheet_rate(chip: str, launch: float) -> Rate:
    try:
        peak = find_chip(chip).bf16_tflops
    except RecipeError:
        peak = None
    if peak is None:
        return Rate(
            1e12, launch, f"assumed: '{chip}' is not in the catalogue; 1 TFLOPS effective", 4.0
        )
    return Rate(
        0.02 * peak * 1e12,
        launch,
        f"datasheet of {chip}; small matrices taken to reach 2 % of its bf16 peak",
        3.0,
    )


def timed_phases(recipe: Recipe, seen: Mapping[str, float | str]) -> dict[str, bool]:
    """Of each phase that the recipe trains, whether its step was measured."""
    return {
        phase: f"{phase}_step_s" in seen for phase, steps in recipe.phase_steps().items() if steps
    }


def _products(recipe: Recipe, family: str) -> str:
    """What a step's products are taken to be computed in, and how far the rates say so: qualify's and the probe's are fp32's."""
    asked = recipe.train.precision
    if asked == "auto" and family != "cpu":
        return "fp32, and so is the time (the chip is asked for bf16 before the first step)"
    if asked == "bf16":
        how = (
            "many times slower on a CPU without a bf16 unit"
            if family == "cpu"
            else "faster on most chips"
        )
        return f"bf16; rates are fp32's unless steps were measured (bf16 is {how})"
    return "fp32"


def _basis(
    rate: Rate,
    timed: Mapping[str, bool],
    seen: Mapping[str, float | str],
    pool: PoolConfig,
    lengths: Lengths,
    products: str,
) -> str:
    known = [phase for phase, measured in timed.items() if measured]
    steps = f"measured on this machine (step times of {' and '.join(known)})"
    words = [f"time: {steps}" if known else f"time: {rate.basis}"]
    if known and len(known) < len(timed):
        words.append(f"the other phases: {rate.basis}")
    words.append(
        "memory: measured on this machine"
        if "train_peak_bytes" in seen
        else f"memory: counted from the architecture, activations assumed eager {products}"
    )
    words.append(lengths.basis)
    words.append("80 % interval")
    if pool.accelerator.startswith("sim:"):
        words.append("simulated chip: its base's speed, faults up to 1.5x")
    return "; ".join(words)
