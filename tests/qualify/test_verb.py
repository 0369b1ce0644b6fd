"""`bascule qualify` and `bascule compare-runs` as a user types them: exit codes and machine-readable answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bascule.cli import main


def qualify(tmp_path: Path, *words: str) -> int:
    return main(["qualify", *words, "--preset", "tick", "--out", str(tmp_path), "--json"])


def test_an_unfit_chip_exits_3_and_json_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = qualify(tmp_path, "sim:gain-0.2-percent", "--check", "exact.matmul", "--seed", "3")
    answer = json.loads(capsys.readouterr().out)["pools"]["sim:gain-0.2-percent"]
    assert code == 3
    assert (
        answer["verdicts"]["train"]["verdict"] == answer["verdicts"]["infer"]["verdict"] == "unfit"
    )
    assert answer["evidence"][0]["outcome"] == "fail"
    assert (
        "bascule qualify sim:gain-0.2-percent --preset tick --check exact.matmul --seed 3"
        in answer["evidence"][0]["reproduce"]
    )


def test_require_asks_for_fit_and_not_only_for_not_unfit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qualify(tmp_path, "cpu", "--check", "exact.reduction") == 0
    assert (
        qualify(tmp_path, "cpu", "--check", "exact.reduction", "--resume", "--require", "train")
        == 3
    )
    capsys.readouterr()


def test_compare_runs_answers_in_json_and_refuses_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rate, gain in (("a", 1, 1.0), ("b", 1, 1.03), ("c", 2, 1.0)):
        for run in range(3):
            lines = [json.dumps({"config": {"learning_rate": rate}})]
            lines += [
                json.dumps({"step": step, "loss": gain * (2 + 1 / step) * (1 + 1e-4 * run)})
                for step in range(5, 40)
            ]
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{run}.jsonl").write_text("\n".join(lines) + "\n")
    answers = {}
    for other in "abc":
        assert (
            main(
                ["compare-runs", str(tmp_path / "a"), "--against", str(tmp_path / other), "--json"]
            )
            == 0
        )
        answers[other] = json.loads(capsys.readouterr().out)
    assert [answers[other]["answer"] for other in "abc"] == ["equal", "different", "refused"]
    assert answers["b"]["difference"] == pytest.approx(-0.0296, abs=1e-3)
    assert {"answer", "margin", "difference", "ci90", "power", "runs_needed"} <= set(answers["a"])


def test_a_recipe_brings_its_model_and_what_its_plan_counts_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(Path(__file__).parents[2] / "runs" / "tiny.toml")
    words = ["qualify", "cpu", "--recipe", recipe, "--check", "speed", "--out", str(tmp_path)]
    assert main([*words, "--json"]) == 0
    evidence = json.loads(capsys.readouterr().out)["pools"]["cpu"]["evidence"]
    measured = next(one["measured"] for one in evidence if "train" in one["roles"])
    assert measured["plan_gflops"] == pytest.approx(
        measured["plan_step_gflop"] / measured["plan_step_s"]
    )
    assert measured["plan_share"] == pytest.approx(
        measured["step_gflops"] / measured["plan_gflops"]
    )
    assert "the plan counts on, in its step" in (tmp_path / "report.html").read_text()
