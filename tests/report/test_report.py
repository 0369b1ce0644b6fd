"""The report tells what the ledger holds, and no more."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from bascule.records import (
    Continuation,
    Evaluation,
    Incident,
    Migration,
    Mismatch,
    OptionPriced,
    Placement,
    PoolCondemned,
    RecipeResolved,
    Replay,
    RunFinished,
    RunStarted,
    SnapshotEvent,
    StepStats,
    Verdict,
    Warned,
)
from bascule.report.charts import Mark, Series, line_chart
from bascule.report.page import render
from bascule.report.story import (
    corrupt_steps_left_behind,
    longest_uncertified_steps,
    sentences,
    status,
    summary,
)


def step(number: int, pool: str, loss: float = 1.0, time_s: float | None = None) -> StepStats:
    return StepStats(
        step=number,
        phase="sft",
        loss=loss,
        grad_norm=1.0,
        learning_rate=1e-3,
        tokens=10,
        seconds=0.1,
        pool=pool,
        attempt=1,
        time_s=100.0 + number if time_s is None else time_s,
    )


def fallback_run() -> list:
    replays = (
        Replay(where="same chip", agrees=True, error=0.0, bound=1e-6),
        Replay(where="referee", agrees=False, error=0.3, bound=1e-6),
    )
    return [
        RunStarted(name="demo", version="0.1.0", machine="test box", attempt=1, time_s=100.0),
        RecipeResolved(recipe_sha256="ab", recipe={"name": "demo"}, attempt=1, time_s=100.0),
        OptionPriced(pool="ascend", accelerator="sim:x", parameters=10, memory_bytes=1e6, memory_available_bytes=None, fits="unknown", train_s=None, basis="assumed", time_s=100.5),
        Verdict(pool="ascend", role="train", verdict="fit", reasons=("passed",), accelerator="sim:x@cpu", chip="pretend", driver="none", simulated=True, time_s=101.0),
        Placement(train="ascend", infer="ascend", reasons={"train": "preferred", "infer": "preferred"}, time_s=101.0),
        *(step(number, "ascend") for number in range(1, 11)),
        SnapshotEvent(step=10, state="certified", path="snapshots/step-00000010", sha256="cd", time_s=110.5),
        *(step(number, "ascend", loss=9.0) for number in range(11, 14)),
        Incident(incident_id="0001-checksum-step-14", step=14, sentinel="checksum", attribution="persistent chip fault", action="pool condemned", evidence="A <b>matmul</b> differs.", pool="ascend", replays=replays, time_s=114.0),
        PoolCondemned(pool="ascend", role="train", incident_id="0001-checksum-step-14", reason="proof", time_s=114.1),
        Migration(from_pool="ascend", to_pool="nvidia", failed_at_step=14, resumed_from_step=10, steps_recomputed=3, seconds_lost=4.0, snapshot="step-00000010", time_s=114.2),
        Continuation(pool="nvidia", verified=True, steps=(11,), max_error=1e-7, bound=1e-6, detail="step 11 agrees", time_s=115.0),
        *(step(number, "nvidia", time_s=105.0 + number) for number in range(11, 21)),
        Evaluation(after="sft", step=20, n=256, samples=8, pass_at_1=0.5, pass_at_8=0.9, greedy=0.6, truncated_ratio=0.0, seconds=1.0, pool="ascend", time_s=126.0),
        Warned(what="traces dropped", detail="3 of 100", time_s=127.0),
        RunFinished(final_weights_sha256="f" * 64, steps=20, wall_s=30.0, attempt=1, time_s=130.0),
    ]  # fmt: skip


def test_the_summary_holds_what_the_issue_promises() -> None:
    data = summary(fallback_run())
    assert data["status"] == "finished"
    assert data["incidents"] == [
        {
            "id": "0001-checksum-step-14",
            "step": 14,
            "sentinel": "checksum",
            "attribution": "persistent chip fault",
            "pool": "ascend",
            "action": "pool condemned",
        }
    ]
    assert (
        data["steps_recomputed"],
        data["continuation_verified"],
        data["final_weights_sha256"],
    ) == (3, True, "f" * 64)
    assert data["eval"]["sft"] == {
        "pass_at_1": 0.5,
        "pass_at_8": 0.9,
        "greedy": 0.6,
        "n": 256,
        "samples": 8,
    }
    assert {"placements", "verdicts"} <= data.keys()


def test_uncertain_steps_and_windows_are_counted() -> None:
    records = fallback_run()
    assert corrupt_steps_left_behind(records) == 3
    assert longest_uncertified_steps(records) == 10


def test_a_worker_that_died_and_goes_on_from_an_uncertified_snapshot_does_not_end_the_window() -> (
    None
):
    records = [
        move.model_copy(update={"resumed_from_step": 13, "trust": "verified"})
        if isinstance(move, Migration)
        else move
        for move in fallback_run()
    ]
    assert longest_uncertified_steps(records) == 20 - 10
    (told,) = (one.text for one in sentences(records) if "moved from" in one.text)
    assert "back to the verified snapshot of step 13" in told and "certified" not in told


def test_a_rollback_without_a_chip_fault_left_no_corrupt_step_behind() -> None:
    records = [
        one.model_copy(update={"attribution": "capacity"}) if isinstance(one, Incident) else one
        for one in fallback_run()
    ]
    assert corrupt_steps_left_behind(records) == 0


def test_status_follows_the_last_word() -> None:
    records = fallback_run()
    assert [status(records[:0]), status(records[:8]), status(records)] == [
        "empty",
        "unfinished",
        "finished",
    ]


def test_the_story_is_in_order_and_names_the_simulated_chip() -> None:
    told = sentences(fallback_run())
    assert [one.time_s for one in told] == sorted(one.time_s for one in told)
    assert any("simulated" in one.text for one in told)
    assert any("moved from ascend to nvidia" in one.text for one in told)


class Checker(HTMLParser):
    """Fails on tags that do not close, and collects everything that would leave the page."""

    VOID = {"meta", "line", "circle", "rect", "polyline", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_well_formed_self_contained_and_escaped() -> None:
    page = render(fallback_run())
    checker = Checker()
    checker.feed(page)
    assert checker.open == [] and checker.outside == []
    assert "A &lt;b&gt;matmul&lt;/b&gt; differs." in page
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()


def test_the_page_of_an_empty_run_says_so() -> None:
    assert "No step has been taken yet" in render([])


def test_a_chart_draws_every_finite_point_and_no_other() -> None:
    chart = line_chart(
        "t", "x", [Series("s", "a", [(0, 1.0), (1, float("nan")), (2, 3.0)])], [Mark(1, "here")]
    )
    (points,) = re.findall(r'points="([^"]*)"', chart)
    assert len(points.split()) == 2 and "here" in chart
    assert line_chart("t", "x", [Series("s", "a", [])]) == ""


def test_the_mismatch_is_told_of_each_pool_that_sampled() -> None:
    def sampled(step: int, pool: str, mean_abs: float, tokens: int) -> Mismatch:
        return Mismatch(
            step=step, pool=pool, mean_abs=mean_abs, max_abs=10 * mean_abs, k1_kl=0.0, k3_kl=mean_abs, chi2=0.0,
            effective_sample_ratio=1.0 - mean_abs, capped_ratio=0.0, tokens=tokens,
        )  # fmt: skip

    run = [sampled(1, "ascend", 0.1, 100), sampled(2, "ascend", 0.4, 300), sampled(3, "cpu", 0.0, 50)]  # fmt: skip
    found = summary(run)["mismatch"]
    assert found["ascend"]["mean_abs"] == pytest.approx((0.1 * 100 + 0.4 * 300) / 400)
    assert found["ascend"]["max_abs"] == 4.0 and found["ascend"]["effective_sample_ratio"] == 0.6
    assert found["cpu"]["steps"] == 1 and "router_agreement" not in found["cpu"]
    page = render(run)
    assert "<td>ascend</td><td>2</td><td>400</td>" in page
    assert "rollouts on ascend" in page and "rollouts on cpu" in page


def test_what_was_asked_after_the_run_is_no_wall_time_of_it() -> None:
    later = Warned(what="x", detail="y", attempt=0)
    run = fallback_run()
    before = summary(run)["wall_s"]
    late = [later.model_copy(update={"time_s": at}) for at in (1000.0, 9000.0)]
    assert summary([*run, *late])["wall_s"] == before > 0


def test_the_loss_chart_is_named_after_the_phases_it_shows() -> None:
    read = step(1, "a").model_copy(update={"phase": "pretrain"})
    assert "Pretraining and SFT loss" in render([read, step(2, "a")])
    assert "Pretraining loss" in render([read]) and "SFT loss" not in render([read])
