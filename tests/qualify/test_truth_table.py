"""Every planted fault against the check that must see it, and clean chips on which all must stay silent.

The pairs come from the checks themselves (`Check.catches`), so a check cannot promise what it does not keep. Whole batteries with
the verdict of each role are slow and marked so; the fast tests put single questions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.faults.catalogue import load_profile, profiles
from bascule.qualify import examine
from bascule.qualify.battery import BatteryResult, run_battery
from bascule.qualify.check import CHECKS, Ask, Check
from bascule.qualify.context import CheckContext
from bascule.qualify.handbook import OUT_OF_REACH
from bascule.qualify.workload import Workload
from bascule.records import Evidence

NANO = ModelConfig(preset="nano")
TICK = ModelConfig(preset="tick")  # where the chip does not get far
FAST_PROMISES = 2  # of each check; the rest run with the slow tests
PROMISES = [
    pytest.param(
        check,
        profile,
        id=f"{check.name}-{profile}",
        marks=[pytest.mark.slow] if place >= FAST_PROMISES else [],
    )
    for check in CHECKS
    for place, profile in enumerate(check.catches)
]
PROCESS_FAULTS = ("hang", "dies")
Ready = Callable[[str], CheckContext]


@pytest.fixture(scope="module")
def on_chip(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """A context on the named accelerator; the model and its trace are made once for all tests."""
    folder = tmp_path_factory.mktemp("qualify")
    work = Workload(NANO, 0)

    def ready(name: str) -> CheckContext:
        accelerator = open_accelerator(name)
        accelerator.prepare(1)
        return CheckContext(accelerator, open_accelerator("cpu"), NANO, True, 0, folder, work)

    return ready


def put_all(context: CheckContext, check: Check) -> list[Evidence]:
    return [item for role in check.roles for item in examine.put(context, Ask(check, role))]


@pytest.mark.parametrize(("check", "profile"), PROMISES)
def test_check_catches_what_it_promises(check: Check, profile: str, on_chip: Ready) -> None:
    found = put_all(on_chip(f"sim:{profile}"), check)
    caught = {role for item in found if item.outcome in ("fail", "error") for role in item.roles}
    assert caught, [item.detail for item in found]
    assert not caught & set(load_profile(profile).fit_for), (
        "a role was blamed that this fault leaves alone"
    )
    for item in found:
        if item.outcome == "fail":
            assert (
                f"bascule qualify sim:{profile}" in item.reproduce and check.name in item.reproduce
            )


def test_every_profile_is_promised_by_a_check_or_listed_as_out_of_reach() -> None:
    promised = {profile for check in CHECKS for profile in check.catches}
    bad = {name for name in profiles() if set(load_profile(name).fit_for) != {"train", "infer"}}
    assert bad - promised - set(OUT_OF_REACH) - set(PROCESS_FAULTS) == set()


def test_a_chip_that_dies_is_unfit_for_the_role_it_died_in(tmp_path: Path) -> None:
    only = ["learning.curve", "determinism.inference"]
    result = run_battery("p", "sim:dies", TICK, tmp_path, time_limit_s=120, only=only)
    assert outcomes(result) == {
        ("learning.curve", "train"): "error",
        ("determinism.inference", "infer"): "pass",
    }
    death = next(item for item in result.evidence if item.check == "learning.curve")
    assert "SIGKILL" in death.detail and death.pool == "p"
    assert Path(death.detail.partition("; see ")[2]).is_file()  # the log it names is where it says


def test_a_chip_that_hangs_is_evidence_and_the_battery_goes_on(tmp_path: Path) -> None:
    only = ["learning.curve", "soak.training", "soak.inference"]
    result = run_battery(
        "p", "sim:hang", TICK, tmp_path, time_limit_s=120, only=only, ask_limit_s=15
    )
    found = outcomes(result)
    assert found["learning.curve", "train"] == "error"
    assert found["soak.training", "train"] == "skipped", (
        "after a hang the role is lost; the time goes to the other role"
    )
    assert found["soak.inference", "infer"] == "pass"
    assert {verdict.role: verdict.verdict for verdict in result.verdicts}["train"] == "unfit"


def outcomes(result: BatteryResult) -> dict[tuple[str, str], str]:
    return {(item.check, role): item.outcome for item in result.evidence for role in item.roles}


CLEAN_CHECKS = (
    "numerics.forward",
    "numerics.backward",
    "numerics.layers",
    "numerics.gradients",
    "numerics.shapes",
    "exact.matmul",
)


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4))]
)
def test_a_clean_chip_raises_no_false_alarm(seed: int, tmp_path: Path) -> None:
    accelerator = open_accelerator("cpu")
    evidence, _ = examine.qualify(accelerator, NANO, seed=seed, only=CLEAN_CHECKS, workdir=tmp_path)
    assert [item.detail for item in evidence if item.outcome != "pass"] == []


@pytest.mark.slow
@pytest.mark.parametrize("profile", [name for name in profiles() if name not in OUT_OF_REACH])
def test_whole_battery_gives_each_role_its_verdict(profile: str, tmp_path: Path) -> None:
    result = run_battery(
        profile, f"sim:{profile}", NANO, tmp_path, time_limit_s=300, ask_limit_s=60
    )
    fit = load_profile(profile).fit_for
    expected = {role: "fit" if role in fit else "unfit" for role in ("train", "infer")}
    found = {verdict.role: verdict.verdict for verdict in result.verdicts}
    assert found == expected, [verdict.reasons for verdict in result.verdicts]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_whole_battery_on_the_clean_cpu_is_fit_for_every_seed(seed: int, tmp_path: Path) -> None:
    result = run_battery("cpu", "cpu", NANO, tmp_path, time_limit_s=300, seed=seed)
    assert {verdict.verdict for verdict in result.verdicts} == {"fit"}, [
        verdict.reasons for verdict in result.verdicts
    ]


@pytest.mark.slow
def test_the_story_chip_passes_a_quick_qualification_for_both_roles(tmp_path: Path) -> None:
    result = run_battery("ascend", "sim:ascend-r2", NANO, tmp_path, time_limit_s=300)
    assert {verdict.verdict for verdict in result.verdicts} == {"fit"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["numerics.half"])
def test_checks_of_the_full_battery_pass_on_the_cpu_and_see_a_softmax_of_099(
    name: str, tmp_path: Path
) -> None:
    for accelerator, expected in (("cpu", {"pass"}), ("sim:softmax-0.99", {"fail"})):
        opened = open_accelerator(accelerator)
        evidence, _ = examine.qualify(opened, NANO, quick=False, only=[name], workdir=tmp_path)
        assert {item.outcome for item in evidence} == expected, [item.detail for item in evidence]


def test_a_wrong_product_is_shrunk_to_the_smallest_shape_that_fails(on_chip: Ready) -> None:
    exact = next(check for check in CHECKS if check.name == "exact.matmul")
    found = put_all(on_chip("sim:buffer-1024"), exact)
    assert "smallest shape that fails: 1025x1x2" in found[0].detail  # one row past the buffer
