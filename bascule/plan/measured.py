"""What a run's own ledger says of its chips: qualify's figures in place of the datasheet's, recovery times in place of guesses."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bascule.config.load import recipe_from
from bascule.config.recipe import Recipe
from bascule.errors import RecipeError
from bascule.folder import RunFolder
from bascule.ledger import last, memory_peaks, of_kind, read_ledger
from bascule.plan.architecture import from_config
from bascule.plan.catalogue import Chip, find_chip, with_measured
from bascule.plan.goodput import Recovery
from bascule.plan.job import Job, Layout
from bascule.records import (
    AnyRecord,
    Evidence,
    Incident,
    Migration,
    RecipeResolved,
    StepStats,
)

FEWEST_STEPS = 5  # that a pool's mean step is taken from, its first one aside
OWN_STACK = "bascule"  # the software of a run's own steps

# What `speed.step` measured, by the name that `options.price_pools` knows, in giga-units.
FIGURES = {
    "gemm_gflops": "matmul_flops_per_s",
    "step_gflops": "step_flops_per_s",
    "attention_gflops": "attention_flops_per_s",
    "copy_gb_per_s": "memory_bytes_per_s",
}


def read_run(folder: Path) -> list[AnyRecord]:
    """The ledger of a run's folder. Raises RecipeError when it has none."""
    path = RunFolder(folder).ledger
    if not path.is_file():
        raise RecipeError(
            f"'{folder}' is a folder without a ledger; give a run's folder or a chip file in TOML."
        )
    return read_ledger(path)


def pools_of(records: Sequence[AnyRecord]) -> dict[str, dict[str, float | str]]:
    """Per pool, what its last qualification for training measured."""
    found: dict[str, dict[str, float | str]] = {}
    for item in of_kind(records, Evidence):
        if item.check == "speed.step" and "train" in item.roles and item.pool:
            seen = {
                name: rate * 1e9
                for key, name in FIGURES.items()
                if isinstance(rate := item.measured.get(key), (int, float)) and rate > 0
            }
            chip = item.measured.get("datasheet_chip")
            found[item.pool] = {
                **seen,
                **({"datasheet_chip": chip} if isinstance(chip, str) else {}),
            }
    return {pool: seen for pool, seen in found.items() if seen}


def chips_of(records: Sequence[AnyRecord]) -> dict[str, Chip]:
    """Per pool a chip of its name: the datasheet's row that its driver names, measured figures in place of printed ones."""
    return {pool: _chip(pool, seen) for pool, seen in pools_of(records).items()}


def _chip(pool: str, seen: dict[str, float | str]) -> Chip:
    tera = {key: float(value) / 1e12 for key, value in seen.items() if isinstance(value, float)}
    named = seen.get("datasheet_chip")
    matmul = tera.get("matmul_flops_per_s")
    base = find_chip(str(named)) if named else Chip(name=pool, bf16_tflops=matmul)
    figures = {
        "gemm_bf16_tflops": matmul,
        "attention_tflops": tera.get("attention_flops_per_s"),
        "memory_tbs": tera.get("memory_bytes_per_s"),
    }
    measured = with_measured(base, {key: value for key, value in figures.items() if value})
    return replace(measured, name=pool, like=base.name if named else "")


def recipe_run(records: Sequence[AnyRecord]) -> Recipe | None:
    """The recipe that a run was of; None where its ledger holds none."""
    resolved = last(records, RecipeResolved)
    return recipe_from(resolved.recipe, source="the run's ledger") if resolved else None


def step_seconds_of(records: Sequence[AnyRecord]) -> dict[tuple[str, str], float]:
    """Mean seconds of a step by pool and phase, rollouts included, the pool's first step aside."""
    seen: dict[tuple[str, str], list[float]] = {}
    for step in of_kind(records, StepStats):
        seen.setdefault((step.pool or "", step.phase), []).append(step.seconds)
    return {
        key: statistics.mean(seconds[1:])
        for key, seconds in seen.items()
        if len(seconds) > FEWEST_STEPS
    }


def measured_pools(
    records: Sequence[AnyRecord], recipe: Recipe
) -> dict[str, dict[str, float | str]]:
    """Per pool what `options.price_pools` takes: what qualify measured, and the time of this recipe's own steps where the run
    trained the same model with the same batches."""
    found = pools_of(records)
    run = recipe_run(records)
    if run is None or from_config(run.model) != from_config(recipe.model):
        return found
    for (pool, phase), seconds in step_seconds_of(records).items():
        if _sized(run, phase) == _sized(recipe, phase):
            found.setdefault(pool, {})[f"{phase}_step_s"] = seconds
    phases = recipe.phase_steps()
    for pool, peaks in memory_peaks(records).items():
        if all(name in peaks and _sized(run, name) == _sized(recipe, name) for name in phases):
            found.setdefault(pool, {})["train_peak_bytes"] = float(max(peaks.values()))
    return found


def _sized(recipe: Recipe, phase: str) -> tuple[object, ...]:
    """What makes a step of a phase as large as it is, and as long."""
    grpo = recipe.grpo
    size: tuple[object, ...] = {
        "pretrain": (recipe.pretrain.batch_sequences, recipe.pretrain.sequence_length),
        "sft": (recipe.sft.batch_sequences, recipe.sft.pack_tokens),
        "grpo": (grpo.prompts, grpo.group_size, grpo.updates_per_rollout, grpo.max_completion_tokens),
    }[phase]  # fmt: skip
    return (*size, recipe.train.precision)


def pretrained(records: Sequence[AnyRecord], chips: Mapping[str, Chip]) -> list[tuple[Job, float]]:
    """The run's own pretraining on each pool that qualify measured, as a job with its tokens a second and chip."""
    run = recipe_run(records)
    found = []
    for (pool, phase), seconds in step_seconds_of(records).items():
        if run is None or phase != "pretrain" or pool not in chips or pool not in run.pools:
            continue
        count = run.pools[pool].chips
        job = Job(
            shape=from_config(run.model), chip=chips[pool], chips=count, sequence=run.pretrain.sequence_length, precision="bf16",
            global_batch=run.pretrain.batch_sequences, layout=Layout(dp=count, zero=0, micro_batch=max(1, run.pretrain.batch_sequences // count)),
            software=OWN_STACK,
        )  # fmt: skip
        found.append((job, job.tokens_per_step / count / seconds))
    return found


def recovery_of(records: Sequence[AnyRecord]) -> Recovery | None:
    """Detection and restart as the run itself (a drill, most likely) took them: from its last good step to the incident, and from
    there to the first step elsewhere; medians. None when it never had to move."""
    lost = [move.seconds_lost for move in of_kind(records, Migration) if move.seconds_lost > 0]
    if not lost:
        return None
    good = [step.time_s for step in of_kind(records, StepStats)]
    seen = [
        incident.time_s - before[-1]
        for incident in of_kind(records, Incident)
        if incident.rollback and (before := [time for time in good if time <= incident.time_s])
    ]
    return Recovery(detect_s=statistics.median(seen or [0.0]), restart_s=statistics.median(lost))
