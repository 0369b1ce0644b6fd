"""Several seeds in one report: the band is their range, and other recipes are refused."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

import pytest

from bascule.errors import UsageError
from bascule.ledger import Ledger
from bascule.records import Evaluation, RecipeResolved, StepStats
from bascule.report import seeds
from bascule.stages import report


def written(folder: Path, rewards: list[float], steps: int = 4) -> Path:
    """A run folder whose GRPO earned `rewards` at every second step."""
    folder.mkdir()
    ledger = Ledger(folder / "ledger.jsonl")
    recipe = {"name": folder.name, "seed": ord(folder.name), "grpo": {"steps": steps}}
    ledger.append(RecipeResolved(recipe_sha256="ab", recipe=recipe))
    for number, reward in enumerate(rewards):
        ledger.append(
            StepStats(step=1 + 2 * number, phase="grpo", loss=0.0, grad_norm=1.0, learning_rate=1e-3, tokens=9, seconds=0.1, reward=reward)
        )  # fmt: skip
    ledger.append(
        Evaluation(after="grpo", step=4, n=8, samples=8, pass_at_1=rewards[-1], pass_at_8=1.0, greedy=0.9, truncated_ratio=0.0, seconds=1.0)
    )  # fmt: skip
    return folder


def test_the_band_lies_between_the_lowest_and_the_highest_seed(tmp_path: Path) -> None:
    runs = [written(tmp_path / name, of) for name, of in (("a", [0.2, 0.4]), ("b", [0.4, 0.8]), ("c", [0.3, 0.9]))]  # fmt: skip
    answer = report.main(Namespace(run=str(runs[0]), seeds=[str(run) for run in runs[1:]]))
    page = (runs[0] / "report.html").read_text()
    [band] = re.findall(r'<polygon class="band a" points="([^"]*)"', page)
    heights = [float(point.split(",")[1]) for point in band.split()]
    # along the lows 0.2, 0.3 (means of the rewards so far), back along the highs 0.6, 0.4; y runs downward from 1 at the top to 0.2, the tenth below the lowest
    shares = [1.0 - 0.8 * (y - 14.0) / (220.0 - 14.0 - 30.0) for y in heights]
    assert shares == pytest.approx([0.2, 0.3, 0.6, 0.4], abs=1e-3)
    assert answer.data["seeds"]["grpo"]["pass_at_1"] == [0.4, 0.8, 0.9]
    assert answer.data["seeds"]["grpo"]["lowest"] == 0.4
    assert "3 seeds after GRPO: pass@1 70.0% in the mean, 40.0% to 90.0%." in answer.text


def test_a_seed_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    a = written(tmp_path / "a", [0.2])
    with pytest.raises(UsageError, match="More than one of the runs has seed 97"):
        report.main(Namespace(run=str(a), seeds=[str(a)]))


def test_an_evaluation_asked_for_later_is_no_point_of_the_seeds() -> None:
    asked = Evaluation(after="evaluate", step=4, n=8, samples=8, pass_at_1=0.5, pass_at_8=1.0, greedy=0.9, truncated_ratio=0.0, seconds=1.0)  # fmt: skip
    assert seeds.chart([[asked], [asked]]) == ""
    assert "<circle" in seeds.chart([[asked.model_copy(update={"after": "grpo"})], []])


def test_a_report_of_one_run_has_no_band(tmp_path: Path) -> None:
    run = written(tmp_path / "a", [0.2, 0.4])
    assert "seeds" not in report.main(Namespace(run=str(run), seeds=[])).data
    assert "<polygon" not in (run / "report.html").read_text()


def test_runs_of_another_recipe_are_refused_by_the_section_that_differs(tmp_path: Path) -> None:
    a, b = written(tmp_path / "a", [0.2]), written(tmp_path / "b", [0.3, 0.3], steps=9)
    with pytest.raises(UsageError, match=r"differ in \[grpo\]"):
        report.main(Namespace(run=str(a), seeds=[str(b)]))


def test_seeds_that_were_never_rewarded_leave_the_chart_out() -> None:
    assert seeds.chart([[], []]) == ""
