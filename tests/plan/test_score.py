"""The score: what the planner claims about itself is measured here, with each row's family left out."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bascule.errors import RecipeError
from bascule.plan.fit import DATA
from bascule.plan.forecast import shipped
from bascule.plan.score import (
    as_text,
    left_out,
    left_out_serving,
    score_file,
    score_memory,
    score_training,
    summarise,
)
from bascule.plan.serving import shipped_serving
from bascule.plan.table import read_rows

ROWS = read_rows(DATA / "runs.csv")


def test_training_is_within_the_targets_with_families_left_out() -> None:
    found = summarise(left_out(shipped(), ROWS))
    assert found.coverage == 1.0
    assert found.median_abs_error <= 0.08
    assert abs(found.bias) <= 0.03
    assert 0.75 <= found.interval_coverage <= 0.85


def test_memory_is_within_its_target_and_nothing_is_falsely_said_to_fit() -> None:
    scored = score_memory(ROWS)
    assert summarise(scored).median_abs_error <= 0.05


def test_serving_points_are_predicted_from_their_sisters() -> None:
    found = summarise(
        left_out_serving(
            shipped_serving(), read_rows(DATA / "inference.csv"), by=lambda row: row["id"]
        )
    )
    assert found.coverage == 1.0 and found.median_abs_error <= 0.10


def test_answers_never_reach_the_prediction() -> None:
    answers = (
        "tok_s_chip",
        "step_time_s",
        "tflops_chip_pub",
        "mfu_pub_pct",
        "hfu_pub_pct",
        "mem_GiB_chip_pub",
        "d_tok_s_chip",
        "d_step_time_s",
        "d_flops_per_token_G",
        "d_tflops_chip",
        "d_mfu_bf16_pct",
    )
    from bascule.plan.table import job_of

    for row in ROWS[:60]:
        if row["tier"] in ("A", "A-"):
            blind = {**row, **dict.fromkeys(answers, "")}
            assert job_of(blind) == job_of(row)


def test_own_rows_are_scored_without_their_family() -> None:
    file = score_file(DATA / "runs.csv")
    own = summarise(left_out(shipped(), ROWS))
    assert file["left_out"] == own.n
    assert file["overall"]["median_abs_error"] == pytest.approx(own.median_abs_error, rel=0.1)
    assert {"overall", "by_vendor"} <= set(file) and set(file["overall"]) >= {
        "n",
        "coverage",
        "median_abs_error",
        "p90_abs_error",
        "bias",
        "interval_coverage",
    }
    assert "all" in as_text(file)


def test_a_row_that_cannot_be_read_is_a_miss_not_absent(tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS if row["tier"] == "A"][:3]
    rows[0]["chip"], rows[0]["id"] = "Abacus 9000", "new-1"
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    found = score_file(path)
    assert found["overall"]["coverage"] == pytest.approx(2 / 3)
    assert "Abacus" in found["refused"]["new-1"]


def test_a_new_row_is_predicted_with_everything_known() -> None:
    row = {**next(row for row in ROWS if row["id"] == "nv-mb-034"), "id": "fresh"}
    (one,) = score_training([row])
    assert abs(one.error) < 0.25


def test_a_wrong_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="allowed: train, inference"):
        score_file(DATA / "runs.csv", "trian")
    with pytest.raises(RecipeError, match="cannot be read"):
        score_file(tmp_path / "none.csv")


def test_no_recalled_row_is_shipped() -> None:
    for name in ("runs.csv", "inference.csv"):
        for row in read_rows(DATA / name):
            assert not row["verified"].startswith("recall")
            if name == "runs.csv":
                assert "recall" not in row["verified"]
