"""Fitting the inference model to inference.csv: the same two steps as fit.py, on published serving points.

Answers are tokens a second and chip, or a latency; inputs never include them. A point whose model is not one of ours is built
from its published parameter counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from bascule.errors import RecipeError
from bascule.plan.architecture import Latent, Shape
from bascule.plan.catalogue import Chip, find_chip
from bascule.plan.job import precision_class
from bascule.plan.models import model_named
from bascule.plan.regress import Array, Point, Process
from bascule.plan.serving import (
    MTP_ACCEPTED,
    SERVE_NAMES,
    SERVE_NUMBERS,
    SERVE_PRIOR_SD,
    SERVE_TERMS,
    WEIGHT_BYTES,
    ServeConstants,
    Serving,
    serve_point,
    serve_value,
)
from bascule.plan.table import Row, number, whole

ASSUMED_PROMPT, ASSUMED_COMPLETION = 4096, 1024  # where a source prints no lengths
ASSUMED_INTERACTIVE_MS = 15.0  # a benchmark's interactive scenario, where the row prints no limit
MLPERF = {
    "DeepSeek-R1": (800, 3900),
    "Llama-2-70B": (300, 300),
    "Llama-3.1-8B": (780, 130),
}  # order of its data sets' lengths, assumed


def target_of(row: Row) -> tuple[str, float] | None:
    """What a row's answer is: (`rate` | `total` | `tpot`, value). Only fitting and scoring may call this."""
    if row.get("out_tok_s_chip") or row.get("in_tok_s_chip"):
        return "rate", number(row, "out_tok_s_chip") or number(row, "in_tok_s_chip") or 0.0
    if row.get("total_tok_s_chip"):
        return "total", number(row, "total_tok_s_chip") or 0.0
    if row.get("tpot_ms"):
        return "tpot", (number(row, "tpot_ms") or 0.0) / 1e3
    return None


def serving_of(row: Row) -> Serving:
    """A row of inference.csv as an operating point, from its inputs alone. Raises RecipeError for a chip nobody knows."""
    phase_text = row.get("phase", "")
    phase = (
        "prefill"
        if phase_text == "prefill"
        else "decode"
        if phase_text.startswith("decode")
        else "both"
    )
    prompt, completion = _lengths(row)
    deployment, chips_text = row.get("deployment", ""), row.get("chips", "")
    shape = served_shape(row)
    chip = find_chip(row["chip"])
    chips = whole(
        row, "chips", roomy_replica(shape, chip, precision_class(row.get("precision", "")))
    )
    dies = re.search(r"EP(\d+)", deployment)
    if not chips_text and dies:
        chips = int(dies.group(1))
    concurrency = (
        None
        if "token" in row.get("batch_or_concurrency", "").lower()
        else number(row, "batch_or_concurrency")
    )
    batch = None
    if "low-latency" in row.get("batch_or_concurrency", "") or phase_text == "decode latency":
        batch = 1.0 / chips
    elif concurrency is not None and concurrency > 0:
        per_chip = "per NPU" in row["batch_or_concurrency"] or "openpangu" in row["family"]
        batch = concurrency if per_chip else concurrency / chips
    limit = number(row, "slo_tpot_ms")
    if limit is None and "interactive" in phase_text:
        limit = ASSUMED_INTERACTIVE_MS
    user = number(row, "tok_s_user")
    if (
        user is not None and user > 0 and not chips_text
    ):  # a point of a Pareto frontier: the speed a user sees is the input, the chips are not printed
        batch, limit = None, 1e3 / user
    return Serving(
        shape=shape, chip=chip, chips=chips, precision=precision_class(row.get("precision", "")), phase=phase, prompt=prompt, completion=completion,
        batch=batch, tpot_s=limit / 1e3 if limit and limit > 0 else (0.05 if phase == "decode" else 0.1),
        split="TP" not in deployment and shape.moe, accepted=MTP_ACCEPTED if "MTP" in row.get("spec_decode", "") else 1.0,
        software=_software(row),
    )  # fmt: skip


def roomy_replica(shape: Shape, chip: Chip, precision: str) -> int:
    """Chips of a replica where nobody printed them: a power of two, weights in less than half of the memory, eight at least
    for large models."""
    need = shape.parameters * WEIGHT_BYTES[precision] / (0.45 * (chip.memory_gb or 64.0) * 1e9)
    return max(8 if shape.parameters > 5e10 else 1, int(2 ** math.ceil(math.log2(max(1.0, need)))))


def _software(row: Row) -> str:
    text = f"{row.get('framework', '')} {row.get('deployment', '')}".lower()
    return next(
        (
            word
            for word in (
                "disagg sglang",
                "disagg",
                "sglang",
                "vllm",
                "tensorrt",
                "cloudmatrix",
                "deepseek",
            )
            if word in text
        ),
        "vendor",
    )


def _lengths(row: Row) -> tuple[float, float]:
    prompt, completion = (
        value if (value := number(row, key)) and value > 0 else None for key in ("isl", "osl")
    )
    if prompt is None and "MLPerf" in row.get("phase", ""):
        prompt, completion = MLPERF.get(row["model"], (ASSUMED_PROMPT, ASSUMED_COMPLETION))
    cached = number(row, "kv_len")
    if cached is not None and cached > 0 and completion is None:
        return cached, 1.0
    return prompt or ASSUMED_PROMPT, completion or (
        1.0 if row.get("phase") == "prefill" else ASSUMED_COMPLETION
    )


def served_shape(row: Row) -> Shape:
    """The row's model: by name where we have its shape, else a stand-in with its published parameter counts."""
    name = row["model"]
    word = name.lower().split("/")[0]
    if word.startswith(("deepseek-v3", "deepseek-r1")):
        return model_named("deepseek-v3")
    try:
        return model_named(word)
    except RecipeError:
        pass
    total = number(row, "params_total_B")
    if total is None or total <= 0 or (number(row, "params_active_B") or 1) <= 0:
        raise RecipeError(
            f"Row {row.get('id')}: the model '{name}' is not known and its parameter count is missing or not above 0."
        )
    return stand_in(name, total * 1e9, (number(row, "params_active_B") or 0.08 * total) * 1e9)


def stand_in(name: str, total: float, active: float) -> Shape:
    """A plausible shape with these counts: for a dense model GQA with eight cache heads, for a sparse one a latent cache."""
    if active > 0.6 * total:
        layers = 80 if total > 5e10 else 32
        hidden = round(math.sqrt(total / layers / 13.3) / 128) * 128
        return Shape(
            name=name,
            hidden=hidden,
            layers=layers,
            heads=hidden // 128,
            kv_heads=8,
            head_dim=128,
            ffn=round(3.5 * hidden),
            vocab=32000,
            dense_layers=layers,
        )
    layers = 60
    hidden = max(1024, round(math.sqrt(active / layers / 12.0) / 256) * 256)
    experts, topk = 256, 8
    wide = max(128, round((total - 0.4 * active) / (layers * experts * 3 * hidden)))
    latent = Latent(q_lora=1536, kv_lora=512, nope=128, rope=64, v=128)
    return Shape(name=name, hidden=hidden, layers=layers, heads=max(16, hidden // 64), kv_heads=1, head_dim=128, ffn=4 * hidden, vocab=129280, latent=latent, experts=experts, topk=topk, moe_ffn=wide, shared_ffn=wide)  # fmt: skip


START_SIZES = np.array([0.1, 0.12, 0.15, 0.1, 0.1, 0.6, 0.3, 0.1, 0.08, 0.35, 1.0])
START_LENGTHS = np.array([5.0, 12.0, 2.0, 10.0, 4.0, 6.0, 1.0])
START_NOISE = {"prefill": 0.06, "decode": 0.13, "both": 0.06}


def fit_constants(
    points: Sequence[tuple[Serving, str, float]], *, rounds: int = 15, noise: float = 0.35
) -> ServeConstants:
    """Maximum a posteriori constants, robust Gauss-Newton on the logarithm of the answers."""
    start = np.array([getattr(ServeConstants(), n) for n in SERVE_NAMES])
    sd = np.array([getattr(SERVE_PRIOR_SD, n) for n in SERVE_NAMES])
    theta = start.copy()
    for _ in range(rounds):
        c = ServeConstants(*theta.tolist())
        here = np.array([math.log(serve_value(p, c, t)) for p, t, _ in points])
        slope = np.array([serve_point(p, c, target=t).gradient for p, t, _ in points])
        missed = np.log([value for *_, value in points]) - here
        weight = 1 / (noise**2 * (1 + (missed / noise) ** 2 / 4))
        system = slope.T @ (weight[:, None] * slope) + np.diag(1 / sd**2)
        theta = theta + np.clip(
            np.linalg.solve(system, slope.T @ (weight * missed) - (theta - start) / sd**2),
            -0.4,
            0.4,
        )
    return ServeConstants(*theta.tolist())


def build_serving(rows: Sequence[Row], c: ServeConstants) -> Process:
    """The regression over these rows: log(published / physics), latencies turned into rates."""
    points, targets = [], []
    back = np.array([getattr(ServeConstants(), n) - getattr(c, n) for n in SERVE_NAMES])
    for row in rows:
        kind, value = target_of(row) or ("rate", 1.0)
        p = serving_of(row)
        sign = -1.0 if kind == "tpot" else 1.0
        one = serve_point(p, c, target=kind, family=row["family"], name=row["id"])
        one = Point(
            one.words,
            one.numbers,
            tuple(sign * g for g in one.gradient),
            one.family,
            one.name,
            one.noise,
        )
        points.append(one)
        targets.append(
            sign * math.log(value / serve_value(p, c, kind)) - float(np.array(one.gradient) @ back)
        )
    prior = np.array([getattr(SERVE_PRIOR_SD, n) for n in SERVE_NAMES])
    return Process(
        tuple(points),
        np.array(targets),
        SERVE_TERMS,
        START_SIZES,
        START_LENGTHS,
        prior,
        START_NOISE,
    )


def usable_serving(row: Row) -> bool:
    return target_of(row) is not None and not row["verified"].startswith("recall")


def serving_points(rows: Sequence[Row]) -> list[tuple[Serving, str, float]]:
    found = []
    for row in rows:
        target = target_of(row)
        if target is not None:
            found.append((serving_of(row), *target))
    return found


def serving_plain(c: ServeConstants, process: Process, width: float) -> dict[str, Any]:
    """What `data/serving.json` holds."""
    anchors = [
        {"name": p.name, "family": p.family, "words": dict(p.words), "numbers": [round(x, 4) for x in p.numbers], "gradient": [round(x, 5) for x in p.gradient], "noise": p.noise, "target": round(float(t), 5)}
        for p, t in zip(process.points, process.targets, strict=True)
    ]  # fmt: skip
    return {
        "constants": {n: round(getattr(c, n), 5) for n in SERVE_NAMES},
        "sizes": [round(float(x), 5) for x in process.sizes],
        "lengths": dict(
            zip(SERVE_NUMBERS, [round(float(x), 4) for x in process.lengths], strict=True)
        ),
        "noise": {k: round(v, 5) for k, v in process.noise.items()},
        "interval_width": round(width, 4),
        "anchors": anchors,
    }


def lengths_vector(raw: dict[str, Any]) -> Array:
    return np.array([raw["lengths"][n] for n in SERVE_NUMBERS])
