"""What a run's own ledger says of its chips: qualify's figures in place of the datasheet's, recovery times in place of guesses."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bascule.errors import RecipeError
from bascule.folder import RunFolder
from bascule.ledger import of_kind, read_ledger
from bascule.plan.catalogue import Chip, find_chip, with_measured
from bascule.plan.goodput import Recovery
from bascule.records import AnyRecord, Evidence, Incident, Migration, StepStats

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
    return replace(measured, name=pool)


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
