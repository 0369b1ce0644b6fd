"""The score: what the planner claims about itself is measured here, with each row's family left out."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from bascule.errors import RecipeError
from bascule.plan.catalogue import chip_like
from bascule.plan.fit import DATA, fit_memory, memory_rows
from bascule.plan.memory import GIB
from bascule.plan.runs_table import job_of, read_rows
from bascule.plan.score import (
    as_text,
    score_file,
    score_memory,
    score_serving,
    score_training,
    summarise,
)
from bascule.plan.serving_forecast import shipped_serving
from bascule.plan.serving_table import serving_of

ROWS = read_rows(DATA / "runs.csv")


def write(folder: Path, rows: list[dict[str, str]], without: tuple[str, ...] = ()) -> Path:
    """Rows as a table, some columns dropped."""
    path = folder / "rows.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(
            handle, [key for key in rows[0] if key not in without], extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_columns_that_a_table_lacks_refuse_no_row(tmp_path: Path) -> None:
    without = (
        "id",
        "family",
        "vendor",
        "notes",
        "source",
        "verified",
        "tier",
        "arch_json",
        "recompute",
        "kv_heads",
        "topk",
    )
    one = score_file(write(tmp_path, ROWS[:40], without))["overall"]
    assert one["coverage"] == 1.0 and one["median_abs_error"] < 0.4
    rows = read_rows(DATA / "inference.csv")[:30]
    without = (
        "id",
        "family",
        "vendor",
        "notes",
        "deployment",
        "framework",
        "precision",
        "spec_decode",
        "chips",
    )
    assert score_file(write(tmp_path, rows, without), "inference")["overall"]["coverage"] == 1.0


@pytest.mark.parametrize(
    ("words", "chip"),
    [("NVIDIA H100 80GB HBM3", "H100 SXM"), ("Ascend 910B3", "Ascend 910B"), ("GB200 NVL72", "GB200"), ("MI350X", "MI355X"),
     ("Ironwood (TPU7x)", "TPU7x Ironwood"), ("h200", "H200 SXM")],
)  # fmt: skip
def test_a_tables_own_words_for_a_chip_are_understood(words: str, chip: str) -> None:
    assert chip_like(words).name == chip


def test_a_chip_that_another_makers_stands_in_for_keeps_its_own_maker(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        "chip,model,chips,tok_s_chip\n"
        "Cambricon MLU590,Qwen3-30B-A3B,64,4000\nKunlunxin P800,DeepSeek-V4,64,300\nAtlas 800T A2,Qwen2.5 72B,512,330\n"
    )
    found = score_file(path)
    assert set(found["by_vendor"]) == {"Cambricon", "Kunlun", "Huawei"}
    assert found["overall"]["coverage"] == 1.0


def test_training_is_within_the_targets_with_families_left_out() -> None:
    found = summarise(score_training(ROWS))
    assert found.coverage == 1.0
    assert found.median_abs_error <= 0.08
    assert abs(found.bias) <= 0.03
    assert 0.75 <= found.interval_coverage <= 0.85


def test_memory_is_within_its_target_and_nothing_is_falsely_said_to_fit() -> None:
    scored = score_memory(ROWS)
    assert summarise(scored).median_abs_error <= 0.05


def test_serving_points_are_predicted_from_their_sisters_and_from_other_families() -> None:
    rows = read_rows(DATA / "inference.csv")
    sisters = summarise(score_serving(rows, by=lambda point: point.name))
    others = summarise(score_serving(rows))
    assert sisters.coverage == others.coverage == 1.0
    assert sisters.median_abs_error <= 0.12 and others.median_abs_error <= 0.30


def test_answers_never_reach_the_prediction() -> None:
    training = ("tok_s_chip", "step_time_s", "tflops_chip_pub", "mfu_pub_pct", "hfu_pub_pct", "mem_GiB_chip_pub",
                "d_tok_s_chip", "d_step_time_s", "d_flops_per_token_G", "d_tflops_chip", "d_mfu_bf16_pct")  # fmt: skip
    for row in ROWS:
        if row["tier"] in ("A", "A-"):
            assert job_of({**row, **dict.fromkeys(training, "")}) == job_of(row)
    serving = ("ttft_s", "tpot_ms", "tok_s_user", "in_tok_s_chip", "out_tok_s_chip", "total_tok_s_chip", "published_value",
               "power_W_chip", "J_per_out_token", "J_per_total_token", "cost_USD_per_Mtok")  # fmt: skip
    for row in read_rows(DATA / "inference.csv"):
        assert serving_of({**row, **dict.fromkeys(serving, "9")}) == serving_of(row)


def test_wrong_answers_in_the_file_are_scored_as_wrong() -> None:
    row = next(row for row in ROWS if row["id"] == "nv-mb-034")
    (right,), (doubled,) = (
        score_training([{**row, "tok_s_chip": str(factor * float(row["tok_s_chip"]))}])
        for factor in (1, 2)
    )
    assert doubled.predicted == pytest.approx(right.predicted)
    assert doubled.error < right.error - 0.3


def test_own_rows_are_scored_without_their_family_whatever_they_are_called(tmp_path: Path) -> None:
    file = score_file(DATA / "runs.csv")
    assert file["left_out"] == file["overall"]["n"] == 224
    again = write(tmp_path, [{**row, "id": f"x{n}"} for n, row in enumerate(reversed(ROWS))])
    assert score_file(again)["overall"] == pytest.approx(file["overall"])
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
    found = score_file(write(tmp_path, rows))
    assert found["overall"]["coverage"] == pytest.approx(2 / 3)
    assert "Abacus" in found["refused"]["new-1"]


def test_rows_that_cannot_be_scored_are_named_not_dropped(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "id": "kept"}, {**ROWS[1], "id": "whole-run", "tier": "B"}]
    found = score_file(write(tmp_path, rows))
    assert (found["overall"]["n"], found["set_aside"]) == (1, ["whole-run"])
    assert "set aside, counted nowhere: 1 (whole-run); training needs tier A" in as_text(found)
    assert "set aside" not in as_text(score_file(write(tmp_path, rows[:1])))


@pytest.mark.parametrize("apart", [";", "\t"])
def test_a_spreadsheets_own_separators_are_read(apart: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ROWS[0], delimiter=apart)
        writer.writeheader()
        writer.writerows(ROWS[:3])
    assert read_rows(path) == ROWS[:3]


def test_a_new_row_is_predicted_with_everything_known() -> None:
    row = {**next(row for row in ROWS if row["id"] == "nv-mb-034"), "id": "fresh"}
    (one,) = score_training([row])
    assert abs(one.error) < 0.25


def test_columns_may_be_in_any_case_and_order_and_strange_cells_crash_nothing(
    tmp_path: Path,
) -> None:
    rows = [row for row in ROWS if row["tier"] == "A"][:12]
    odd = ("1e400", "nan", "-", "TP8", "0.0001", "8-16", "none stated", '{"mla": 3}', "\u00bd")
    columns = ("seq_len", "hidden", "topk", "arch_json", "chips", "ffn_hidden", "tp", "vpp", "micro_batch", "moe_ffn", "recompute", "ep")  # fmt: skip
    shifted = [
        {**row, columns[i]: odd[(i + 3 * j) % len(odd)]}
        for i, row in enumerate(rows)
        for j in range(3)
    ]
    path = tmp_path / "odd.csv"
    with path.open("w", newline="") as handle:
        keys = sorted(shifted[0], reverse=True)
        writer = csv.writer(handle)
        writer.writerow([*(key.upper().replace("_", " ") for key in keys), "something else"])
        writer.writerows([*(row[key] for key in keys), "x"] for row in shifted)
    found = score_file(path)
    assert found["kind"] == "train" and found["overall"]["n"] == len(shifted)
    assert found["overall"]["coverage"] > 0.9
    served = read_rows(DATA / "inference.csv")[:12]
    columns = ("isl", "osl", "chips", "batch_or_concurrency", "slo_tpot_ms", "spec_decode", "precision", "kv_len", "deployment", "prefix_cache", "framework", "notes")  # fmt: skip
    again = [{**row, columns[i]: odd[i % len(odd)]} for i, row in enumerate(served)]
    assert all(math.isfinite(one.predicted) for one in score_serving(again))


def test_memory_holds_where_a_family_is_left_out_and_nothing_is_falsely_said_to_fit() -> None:
    printed = memory_rows(ROWS)
    found = []
    for family in {row["family"] for row in printed}:
        known = fit_memory([row for row in printed if row["family"] != family])
        found += score_memory([row for row in printed if row["family"] == family], known)
    assert summarise(found).median_abs_error <= 0.05
    room = {row["id"]: (job_of(row).chip.memory_gb or math.inf) * 1e9 / GIB for row in printed}
    assert not [one for one in found if one.predicted <= room[one.name] < one.published]


def test_a_published_figure_below_nothing_is_no_figure(tmp_path: Path) -> None:
    rows = [row for row in ROWS if row["tier"] == "A"][:3]
    bad = {**rows[0], "tok_s_chip": "-5", "d_tok_s_chip": "", "step_time_s": "-2"}
    assert score_file(write(tmp_path, [bad, *rows[1:]]))["overall"]["n"] == 2


def test_a_model_that_a_table_does_not_describe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bare.csv"
    path.write_text("chip,model,tok_s_chip\nH100,UnknownNet,500\n")
    (why,) = score_file(path)["refused"].values()
    assert why.startswith("'row 1': the model 'UnknownNet' is not known")


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


@pytest.mark.parametrize(
    "changed",
    [
        {"chip": "Kunlun P800", "vendor": "Baidu"},
        {"chip": "Ascend 910D", "vendor": "Huawei"},
        {"chip": "GB300 NVL72"},
        {"model": "GLM-5", "params_total_B": "", "params_active_B": ""},
        {"model": "ERNIE-4.5-300B-A47B", "params_total_B": "", "params_active_B": ""},
        {"model": "DeepSeek-R1-Distill-Llama-70B", "params_total_B": "", "params_active_B": ""},
        {"precision": "", "chips": "8"},
        {"precision": "BF16", "chips": "8"},
        {"chips": "2 x 8"},
        {"chips": "1 node"},
        {"deployment": "", "chips": "", "batch_or_concurrency": ""},
        {"isl": "8k", "osl": "1k", "spec_decode": "MTP"},
    ],
)
def test_an_odd_inference_row_is_neither_refused_nor_absurd(changed: dict[str, str]) -> None:
    row = next(
        r for r in read_rows(DATA / "inference.csv") if r["id"] == "ix-r1-mi300x-b200-vs-mi300x-1"
    )
    asked = serving_of({**row, "id": "fresh", **changed})
    value = shipped_serving().predict(asked)[0]
    assert 10 < value < 20_000


@pytest.mark.parametrize(
    "changed",
    [{"chips": ""}, {"seq_len": ""}, {"tp": "", "pp": "", "ep": "", "sharding": ""}, {"chips": "32 nodes"}, {"precision": ""}],
)  # fmt: skip
def test_a_blank_training_cell_costs_accuracy_not_the_row(changed: dict[str, str]) -> None:
    row = next(
        row for row in ROWS if row["model"] == "DeepSeek-V3" and row["chip"].startswith("H100")
    )
    (one,) = score_training([{**row, "id": "fresh", **changed}])
    assert one.predicted is not None and abs(math.log(one.predicted / one.published)) < 0.7
