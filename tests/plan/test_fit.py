"""The constants that are shipped are the ones that the script finds in the shipped data."""

from __future__ import annotations

import json

import pytest

from bascule.plan import fit
from bascule.plan.runs_table import read_rows


def test_the_physics_constants_are_reproduced_from_the_data() -> None:
    import numpy as np

    rows = [row for row in read_rows(fit.DATA / "runs.csv") if fit.usable(row)]
    jobs = [fit.job_of(row) for row in rows]
    seconds = np.log(
        [
            job.tokens_per_step / (fit.measured_tokens(row) or 1) / job.chips
            for row, job in zip(rows, jobs, strict=True)
        ]
    )
    found = fit.fit_physics(jobs, seconds)
    shipped = json.loads((fit.DATA / "constants.json").read_text())["constants"]
    assert {name: getattr(found, name) for name in shipped} == pytest.approx(shipped, abs=0.01)


def test_the_memory_constants_are_reproduced_from_the_data() -> None:
    found = fit.fit_memory(fit.memory_rows(read_rows(fit.DATA / "runs.csv")))
    shipped = json.loads((fit.DATA / "constants.json").read_text())["memory"]
    assert found.base_gib == pytest.approx(shipped["base_gib"], rel=0.01)
    assert found.logits_bytes == pytest.approx(shipped["logits_bytes"], rel=0.01)


@pytest.mark.slow
def test_the_whole_fit_is_reproduced() -> None:
    assert fit.main(["--check"]) == 0
