"""Pipelines played event by event agree with the closed forms that hold for equal stages."""

from __future__ import annotations

import pytest

from bascule.errors import RecipeError
from bascule.plan.schedule import Stage, play


def equal(devices: int, virtual: int = 1) -> list[Stage]:
    return [Stage(1 / virtual, 1 / virtual, 1 / virtual)] * (devices * virtual)


@pytest.mark.parametrize(("devices", "micro_batches"), [(4, 8), (8, 16), (8, 100)])
def test_1f1b_idles_for_depth_minus_one_micro_batches(devices: int, micro_batches: int) -> None:
    played = play(equal(devices), devices, micro_batches, "1f1b")
    assert played.bubble == pytest.approx((devices - 1) / micro_batches)


def test_interleaving_divides_the_bubble_as_pangu_ultra_reports() -> None:
    plain = play(equal(8), 8, 16, "1f1b").bubble
    folded = play(equal(8, 6), 8, 16, "interleaved").bubble
    assert plain / (1 + plain) == pytest.approx(0.3045, abs=0.001)  # published: 30.45 % of the step
    assert folded / (1 + folded) == pytest.approx(0.068, abs=0.001)  # published: 6.8 %


def test_splitting_the_weight_gradient_shrinks_the_bubble() -> None:
    one, zero, dual = (play(equal(8), 8, 32, name).bubble for name in ("1f1b", "zb", "dualpipe"))
    assert dual < zero < one


def test_every_operation_is_played_once_and_devices_never_overlap() -> None:
    played = play(equal(4, 2), 4, 8, "interleaved")
    assert len(played.events) == 2 * 8 * 8 == len({event[1:4] for event in played.events})
    for device in range(4):
        times = sorted(event[4:] for event in played.events if event[0] == device)
        assert all(a[1] <= b[0] + 1e-9 for a, b in zip(times, times[1:], strict=False))


def test_a_slow_last_stage_sets_the_pace() -> None:
    stages = equal(4)
    slow = [*stages[:-1], Stage(2, 2, 2)]
    assert play(slow, 4, 40, "1f1b").seconds > 1.9 * play(stages, 4, 40, "1f1b").seconds * 40 / 43


def test_long_steps_are_extended_exactly() -> None:
    short, long = play(equal(4), 4, 40, "1f1b"), play(equal(4), 4, 41, "1f1b")
    assert long.seconds - short.seconds == pytest.approx(3.0)


def test_an_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="dualpipe"):
        play(equal(4), 4, 8, "dualpip")


def test_the_search_takes_the_schedules_that_the_stack_ships_and_the_one_that_is_asked_for() -> (
    None
):
    from bascule.plan.answer import answer

    words = "2048 x H800, 1T tokens, fp8"
    asked = {
        one: answer("deepseek-v3", train=[f"{words}, {one}"]).trainings[0]
        for one in ("1f1b", "zb", "dualpipe")
    }
    for name, found in asked.items():
        assert found.job.layout.schedule == name and found.job.layout.pp > 1
        assert found.memory.verdict == "fits"
    assert asked["zb"].played.bubble < asked["1f1b"].played.bubble
    usual = answer("deepseek-v3", train=[words]).trainings[0]
    assert usual.job.layout.schedule in ("1f1b", "interleaved")


def test_dualpipe_holds_the_mirrored_stage_too() -> None:
    from dataclasses import replace

    from bascule.plan.answer import answer
    from bascule.plan.memory import memory_of

    job = (
        answer("deepseek-v3", train=["2048 x H800, 1T tokens, fp8, TP4 PP8 EP64"]).trainings[0].job
    )
    plain, both = (
        memory_of(replace(job, layout=replace(job.layout, schedule=name))).parts
        for name in ("1f1b", "dualpipe")
    )
    assert (
        1.8 < both["weights"] / plain["weights"] < 2.5
    )  # multi-token prediction sits on the last stage
    assert both["activations"] > plain["activations"]
