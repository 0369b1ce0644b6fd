"""The whole answer: what it holds, how fast it comes, and that it is what the parts say."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bascule.errors import RecipeError
from bascule.plan.answer import Answer, answer
from bascule.plan.catalogue import find_chip
from bascule.plan.page import render_page
from bascule.plan.render import cli_text, to_json, training_text


@pytest.fixture(scope="module")
def asked() -> Answer:
    return answer(
        "deepseek-v3",
        train=["2048 x H800, 14.8T tokens"],
        versus=["6144 x Ascend 910C"],
        serve=["H20, 4k in, 1k out, 50 ms"],
    )


def test_the_break_even_price_comes_first_and_follows_from_chip_hours(asked: Answer) -> None:
    one = asked.preferences[0]
    assert one.break_even.value == pytest.approx(
        asked.trainings[0].chip_hours.value / asked.trainings[1].chip_hours.value
    )
    assert one.break_even.low < one.break_even.value < one.break_even.high
    first_lines = cli_text(asked).split("\n\n")[1].splitlines()
    assert "pays below" in first_lines[0]


def test_deepseeks_own_published_chip_hours_are_inside_the_interval(asked: Answer) -> None:
    """DeepSeek-V3 states 2.664 M H800 hours for 14.8 T tokens of pre-training; no H800 run is among the anchors."""
    hours = asked.trainings[0].chip_hours
    assert hours.low < 2.664e6 * 1.05 and hours.value < 2 * 2.664e6


def test_every_estimate_has_an_interval_a_unit_and_a_basis(asked: Answer) -> None:
    for training in asked.trainings:
        for one in (
            training.tokens_per_s_chip,
            training.days,
            training.chip_hours,
            training.energy,
        ):
            assert one.low < one.value < one.high and one.unit and one.basis
    assert asked.trainings[1].money is None  # no public price for the 910C, and none is made up


def test_parts_of_a_step_add_up(asked: Answer) -> None:
    for training in asked.trainings:
        assert sum(training.step.parts.values()) == pytest.approx(training.step.seconds)


def test_the_chosen_layout_uses_all_chips_and_fits(asked: Answer) -> None:
    for training in asked.trainings:
        lay = training.job.layout
        assert lay.tp * lay.pp * lay.cp * lay.dp == training.ask.chips
        assert training.memory.verdict == "fits"


def test_failures_are_told_by_cause_where_somebody_counted_them(asked: Answer) -> None:
    nvidia, ascend = to_json(asked)["options"]
    assert sum(nvidia["failures_by_cause"].values()) == pytest.approx(
        nvidia["failures"]["failures"]
    )
    assert ascend["failures_by_cause"] == {}
    assert cli_text(asked).count("by Llama 3's shares: GPU and NVLink") == 1


def test_the_finish_is_a_date_with_its_spread(asked: Answer) -> None:
    one = to_json(asked)["options"][0]["finish_if_begun_today"]
    assert one["low"] < one["value"] < one["high"]
    days = datetime.date.fromisoformat(one["value"]) - datetime.date.today()
    assert abs(days.days - asked.trainings[0].days.value) <= 1.5
    assert "begun today: " in cli_text(asked)


def test_a_training_of_a_million_years_has_no_date(asked: Answer) -> None:
    first = asked.trainings[0]
    days = replace(first.days, high=4e8)
    assert "more than a thousand years" in training_text(replace(first, days=days))
    assert "begun today: " in training_text(first)


def test_price_and_power_of_the_users_own_chip_say_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('["cheap"]\nlike = "H100 SXM"\nprice_usd_h = 1.0\npower_all_in_w = 900\n')
    found = answer("llama-3.1-8b", train=["64 x cheap, 1T tokens"], chip_file=path)
    money, energy = found.trainings[0].money, found.trainings[0].energy
    assert money and "(the chip file's own)" in money.basis
    assert "900 W a chip all in (the chip file's own figure)" in energy.basis


def test_json_holds_plain_values(asked: Answer) -> None:
    plain = json.loads(json.dumps(to_json(asked)))
    assert plain["options"][0]["memory"]["verdict"] == "fits"
    assert plain["options"][1]["money"] is None
    assert plain["preferences"][0]["break_even"]["unit"]


def test_the_page_is_self_contained_and_shows_every_chart(asked: Answer) -> None:
    page = render_page(asked, start=datetime.date(2026, 1, 1))
    drawn = re.findall(r"aria-label='([^']*)'", page)
    assert drawn.count("bars with 80 % intervals") == 4 and drawn.count("roofline") == 2
    assert (
        drawn.count("stacked bars") == 1 + 2 + 1
    )  # the steps, each option's memory, a decoding step
    assert "calendar with finish dates" in drawn and "sensitivity" in drawn
    whiskers = 3 * 2 + 1  # the second option has no public price
    assert page.count("<u style=") == whiskers and page.count("<span>no public price</span>") == 1
    assert "http://" not in page and "https://" not in page and "$" not in page.replace("USD", "")


def test_16384_chips_take_under_two_seconds_and_no_torch() -> None:
    code = (
        "import sys, time; t = time.process_time(); from bascule.plan.answer import answer; from bascule.plan.render import cli_text; "
        "print(len(cli_text(answer('deepseek-v3', train=['16384 x H100, 14.8T tokens'])))); "
        "assert 'torch' not in sys.modules; print(time.process_time() - t)"
    )
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PATH": ""},
    )
    assert float(done.stdout.split()[1]) < 2.0, f"{time.perf_counter() - begin:.1f} s of wall time"


def test_a_given_layout_is_priced_as_given() -> None:
    one = answer(
        "llama-3.1-70b", train=["64 x H100, 1T tokens, TP4 PP4 MB1, batch 256, seq 8k"]
    ).trainings[0]
    assert one.layout_basis == "given" and one.job.layout.pp == 4 and one.played is not None


def test_a_model_that_cannot_fit_is_said_not_to_fit() -> None:
    one = answer("deepseek-v3", train=["8 x H100, 1T tokens"]).trainings[0]
    assert one.memory.verdict == "does not fit" and one.notes


def test_an_own_measurement_moves_the_forecast_and_narrows_it() -> None:
    from bascule.plan.forecast import shipped

    one = answer("llama-3.1-70b", train=["64 x H100, 1T tokens"]).trainings[0]
    anchored = shipped().with_anchor(one.job, one.step.seconds * 1.3).predict(one.job)
    assert anchored.seconds == pytest.approx(one.step.seconds * 1.3, rel=0.1)
    assert anchored.high / anchored.low < one.step.high / one.step.low


def test_nothing_asked_is_refused() -> None:
    with pytest.raises(RecipeError, match="Nothing was asked"):
        answer("deepseek-v3")


def test_serving_keeps_its_limit_or_says_that_it_cannot(asked: Answer) -> None:
    (service,) = asked.services
    assert service.tpot_s[0] <= 0.05 * 1.1
    impossible = answer("deepseek-v3", serve=["H20, 4k in, 1k out, 1 ms"]).services[0]
    assert "cannot be kept" in impossible.notes[0]


def test_a_looser_limit_never_serves_less() -> None:
    slow, fast = (
        answer("deepseek-v3", serve=[f"H800, 4k in, 1k out, {ms} ms"]).services[0]
        for ms in (100, 25)
    )
    assert slow.decode[0] >= fast.decode[0] and slow.batch_per_chip >= fast.batch_per_chip


def test_the_tornado_shows_what_was_asked_and_what_turns_it() -> None:
    found = answer(
        "deepseek-v3",
        train=["2048 x H800, 14.8T tokens"],
        versus=["6144 x Ascend 910C, 1 USD/h"],
    )
    (one,) = found.preferences
    assert one.money_ratio == pytest.approx(one.cost_ratio, rel=1e-6)
    turning = [swing.assumption for swing in one.swings if swing.turns]
    page = render_page(found, start=datetime.date(2026, 1, 1))
    assert f"as asked, {one.cost_ratio:.2f}x" in page and f"{one.break_even.value:.2f}x" in page
    assert turning and all(words in page for words in turning)


@pytest.mark.parametrize(
    ("chip", "precision", "taken"), [("H800", "fp4", "fp8"), ("Ascend 910C", "fp8", "bf16")]
)
def test_a_precision_that_the_chip_lacks_is_said(chip: str, precision: str, taken: str) -> None:
    notes = (
        answer("llama-3.1-8b", train=[f"64 x {chip}, 1T tokens, {precision}"]).trainings[0].notes
    )
    assert any(f"no {precision} matrix units; its {taken} rate" in note for note in notes)
    plain = answer("llama-3.1-8b", train=[f"64 x {chip}, 1T tokens, {taken}"]).trainings[0].notes
    assert not any("matrix units" in note for note in plain)


def test_a_small_models_parameters_are_counted_in_its_own_size() -> None:
    assert cli_text(answer("nano", train=["8 x H100, 1B tokens"])).startswith("nano: 457.7 k param")


@pytest.mark.parametrize(("asked_for", "said"), [("2T tokens", "2.000 T tokens"), ("1B tokens", "1.000 B tokens"), ("3 tokens", ", 3 tokens,")])  # fmt: skip
def test_tokens_are_said_in_the_size_they_have(asked_for: str, said: str) -> None:
    assert said in cli_text(answer("llama-3.1-8b", train=[f"8 x H100, {asked_for}"]))


def test_figures_of_a_measured_chip_are_called_so() -> None:
    chip = replace(find_chip("H100"), basis="measured on this machine")
    assert chip.figures == "figures measured on this machine"
