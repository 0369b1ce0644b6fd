"""Simulated chips: they fail when planned, the same way each time, under other modes, and cost nothing while no fault can act."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from bascule.accelerators.base import Accelerator, Work
from bascule.accelerators.registry import open_accelerator
from bascule.accelerators.simulated import SimulatedAccelerator
from bascule.faults.catalogue import FaultSpec, Profile

A = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
B = torch.randn(64, 48, generator=torch.Generator().manual_seed(2))
RIGHT = A @ B


def planted(tmp_path: Path | None = None, *, seed: int = 0, **knobs: Any) -> SimulatedAccelerator:
    profile = Profile(
        name="planted",
        title="planted",
        faults=(FaultSpec.model_validate({"kind": "zeroed", **knobs}),),
    )
    log = tmp_path / "truth" / "log.jsonl" if tmp_path else None
    return SimulatedAccelerator(
        "sim:planted", open_accelerator("cpu"), profile, seed=seed, fault_log=log
    )


def log_of(tmp_path: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (tmp_path / "truth" / "log.jsonl").read_text().splitlines()
    ]


def products(chip: Accelerator, work: Work, count: int = 1) -> torch.Tensor:
    with chip.session(work):
        return torch.stack([A @ B for _ in range(count)])


def right(chip: Accelerator, work: Work, count: int = 1) -> bool:
    return torch.equal(products(chip, work, count), RIGHT.expand(count, 32, 48))


class Count(TorchDispatchMode):
    """A guard in small: entered inside the session, it notes the sum that each product came out with."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.sums.append(float(result.sum()))
            torch.mv(result, torch.ones(result.shape[1]))
        return result


def test_nothing_happens_before_the_onset_nor_after_the_end() -> None:
    chip = planted(onset_step=5, until_step=6)
    assert [right(chip, Work("train", step)) for step in range(3, 9)] == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]


def test_a_fault_of_one_role_leaves_the_other_alone() -> None:
    chip = planted(roles=("train",))
    assert right(chip, Work("infer", 5)) and not right(chip, Work("train", 5))


def test_outside_a_session_the_chip_computes_well() -> None:
    chip = planted()
    assert not right(chip, Work("train", 1))
    assert torch.equal(A @ B, RIGHT)


def test_no_mode_is_entered_when_no_fault_can_act() -> None:
    chip = planted(onset_step=9)
    with chip.session(Work("train", 8)):
        assert not _get_current_dispatch_mode_stack()
    with chip.session(Work("train", 9)):
        assert len(_get_current_dispatch_mode_stack()) == 1


def test_a_persistent_fault_repeats_bit_for_bit_on_every_attempt_and_after_reopening() -> None:
    first = products(planted(kind="mixed", amount=0.0, rate=0.5), Work("train", 7), 8)
    assert not torch.equal(first, RIGHT.expand(8, 32, 48))
    for attempt in range(3):
        again = products(planted(kind="mixed", amount=0.0, rate=0.5), Work("train", 7, attempt), 8)
        assert torch.equal(first, again)


def test_a_transient_fault_is_gone_on_the_second_attempt() -> None:
    chip = planted(transient=True)
    assert not right(chip, Work("train", 7, attempt=0)) and right(chip, Work("train", 7, attempt=1))
    assert not right(chip, Work("train", 7, attempt=0))


def test_other_steps_and_other_seeds_strike_other_calls() -> None:
    def struck(step: int, seed: int) -> list[bool]:
        return [
            bool((one == 0).any())
            for one in products(planted(rate=0.3, seed=seed), Work("train", step), 40)
        ]

    assert struck(1, 0) == struck(1, 0) != struck(2, 0) != struck(2, 1)
    assert 4 <= sum(struck(1, 0)) <= 20


def test_a_mode_entered_later_sees_the_corrupted_result_and_does_not_move_the_faults() -> None:
    chip, guard = planted(rate=0.5), Count()
    bare = products(chip, Work("train", 4), 12)
    with chip.session(Work("train", 4)), guard:
        watched = torch.stack([A @ B for _ in range(12)])
    assert torch.equal(bare, watched)
    assert guard.sums == [float(one.sum()) for one in bare]


def test_forward_and_backward_are_told_apart() -> None:
    def run(chip: Accelerator) -> tuple[torch.Tensor, torch.Tensor]:
        weight = B.clone().requires_grad_()
        with chip.session(Work("train", 1)):
            out = A @ weight
            out.square().sum().backward()
        return out.detach(), weight.grad

    clean, forward, backward = (
        run(open_accelerator("cpu")),
        run(planted(direction="forward")),
        run(planted(direction="backward")),
    )
    assert not torch.equal(forward[0], clean[0])
    assert torch.equal(backward[0], clean[0]) and not torch.equal(backward[1], clean[1])


def test_a_checkpointed_forward_computed_again_in_backward_counts_as_forward(
    tmp_path: Path,
) -> None:
    chip = planted(tmp_path, direction="forward")
    weight = B.clone().requires_grad_()
    with chip.session(Work("train", 1)):
        checkpoint(lambda x: (x @ weight).relu() @ B.T, A, use_reentrant=False).sum().backward()
    assert {entry["direction"] for entry in log_of(tmp_path)} == {"forward"}
    assert len(log_of(tmp_path)) >= 3


def test_composite_operators_are_struck_under_inference_mode_too() -> None:
    chip = planted()
    with torch.inference_mode(), chip.session(Work("infer", 1)):
        out = torch.nn.functional.linear(A.view(2, 16, 64), B.T)
    assert int((out == 0).sum()) > 0


def test_small_results_matrix_vector_products_and_fp64_are_left_alone(tmp_path: Path) -> None:
    chip = planted(tmp_path)
    with chip.session(Work("train", 1)):
        assert int((A.double() @ B.double() == 0).sum()) == 0
        assert int((A[:2, :2] @ B[:2, :2] == 0).sum()) == 0
        assert int((torch.ones(512, 8) @ torch.ones(8, 1) == 0).sum()) == 0
        A @ B
    assert [entry["op_index"] for entry in log_of(tmp_path)] == [0]


def test_a_nested_session_counts_for_itself_and_does_not_disturb_the_outer_one() -> None:
    chip = planted(rate=0.5, roles=("train",))
    plain = products(chip, Work("train", 3), 10)
    with chip.session(Work("train", 3)):
        before = [A @ B for _ in range(5)]
        assert right(chip, Work("infer", 1), 5)
        products(chip, Work("train", 99), 7)
        after = [A @ B for _ in range(5)]
    assert torch.equal(torch.stack(before + after), plain)


def test_the_log_tells_the_truth(tmp_path: Path) -> None:
    chip = planted(tmp_path, rate=0.4, stride=50)
    out = products(chip, Work("train", 11, attempt=2), 10)
    struck = [index for index in range(10) if (out[index] == 0).any()]
    log = log_of(tmp_path)
    assert [entry["op_index"] for entry in log] == struck
    assert all(
        (entry["step"], entry["attempt"], entry["role"], entry["op"], entry["fault"])
        == (11, 2, "train", "mm", "zeroed")
        for entry in log
    )
    for entry in log:
        flat = out[entry["op_index"]].reshape(-1)
        assert entry["count"] == int((flat == 0).sum())
        assert all(flat[place] == 0 for place in entry["positions"])


def test_a_session_logs_at_most_sixteen_firings_and_says_that_there_were_more(
    tmp_path: Path,
) -> None:
    products(planted(tmp_path), Work("train", 1), 40)
    log = log_of(tmp_path)
    assert len(log) == 16 and log[-1]["more_not_logged"] and not log[-2]["more_not_logged"]


def test_sessions_of_two_threads_do_not_meet() -> None:
    chip, answers = planted(roles=("train",)), []
    with chip.session(Work("train", 1)):
        thread = threading.Thread(target=lambda: answers.append(right(chip, Work("infer", 1))))
        thread.start()
        thread.join()
        assert int((A @ B == 0).sum()) > 0
    assert answers == [True]


def test_a_slow_chip_is_slow_for_whoever_waits_for_it() -> None:
    chip = planted(kind="slow", amount=4.0)
    with chip.session(Work("train", 1)):
        _, seconds = chip.timed(lambda: time.sleep(0.05))
    assert 0.19 <= seconds < 1.0


def test_the_wrapped_chip_keeps_its_name_and_says_that_it_is_simulated() -> None:
    info = open_accelerator("sim:ascend-r2").info()
    assert info.simulated and info.base == "cpu" and "simulated: ascend-r2" in info.name


@pytest.mark.parametrize("name", ["sim:clean", "sim:ascend-r2"])
def test_a_chip_whose_fault_cannot_act_yet_costs_less_than_half_a_step_more(name: str) -> None:
    layers = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(40)])
    x = torch.randn(64, 64)

    def seconds(chip: Accelerator) -> float:
        start = time.thread_time()
        for step in range(1, 6):
            with chip.session(Work("train", step)):
                layers(x).sum().backward()
        return time.thread_time() - start

    base, simulated = open_accelerator("cpu"), open_accelerator(name)
    seconds(base)
    pairs = [(seconds(base), seconds(simulated)) for _ in range(4)]
    assert min(pair[1] for pair in pairs) < 1.5 * min(pair[0] for pair in pairs)
