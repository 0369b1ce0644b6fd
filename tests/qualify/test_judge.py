"""Evidence in, verdicts out: pure, so every rule is a line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from bascule.config.model import ModelConfig
from bascule.errors import UsageError
from bascule.qualify.check import CHECKS, asks, required
from bascule.qualify.judge import Examined, model_sha256, outdated, verdicts
from bascule.records import Evidence, Role, Verdict

CHIP = Examined("cpu", "a chip", "a driver")


def all_passed() -> list[Evidence]:
    return [answer(ask.check.name, ask.role, "pass") for ask in asks(quick=True)]


def answer(check: str, role: Role, outcome: str, detail: str = "") -> Evidence:
    return Evidence(
        check=check,
        family=check.partition(".")[0],
        roles=(role,),
        outcome=outcome,
        bound="",
        detail=detail,
    )


def replaced(evidence: list[Evidence], new: Evidence) -> list[Evidence]:
    return [
        new if (item.check, item.roles) == (new.check, new.roles) else item for item in evidence
    ]


def words(evidence: list[Evidence]) -> dict[str, str]:
    return {verdict.role: verdict.verdict for verdict in verdicts(evidence, CHIP)}


def of_role(evidence: list[Evidence], role: Role) -> Verdict:
    return next(verdict for verdict in verdicts(evidence, CHIP) if verdict.role == role)


def test_all_checks_passed_is_fit_for_both_roles() -> None:
    assert words(all_passed()) == {"train": "fit", "infer": "fit"}


def test_no_evidence_at_all_is_unproven() -> None:
    assert words([]) == {"train": "unproven", "infer": "unproven"}


@pytest.mark.parametrize("outcome", ["fail", "error"])
def test_a_wrong_backward_pass_is_unfit_to_train_and_fit_to_infer(outcome: str) -> None:
    evidence = replaced(
        all_passed(), answer("numerics.backward", "train", outcome, "gradient of aten::mm")
    )
    assert words(evidence) == {"train": "unfit", "infer": "fit"}
    assert "gradient of aten::mm" in of_role(evidence, "train").reasons[0]


@pytest.mark.parametrize("role", ["train", "infer"])
def test_every_check_that_decides_is_missed_when_it_is_missing(role: Role) -> None:
    for name in required(role, quick=True):
        evidence = [item for item in all_passed() if (item.check, item.roles) != (name, (role,))]
        assert of_role(evidence, role).verdict == "unproven", name


def test_a_skipped_check_leaves_the_role_unproven_and_says_why() -> None:
    evidence = replaced(all_passed(), answer("learning.curve", "train", "skipped", "too few runs"))
    verdict = of_role(evidence, "train")
    assert verdict.verdict == "unproven"
    assert verdict.reasons == ("learning.curve: too few runs",)


def test_a_failure_outweighs_a_skipped_check() -> None:
    evidence = replaced(all_passed(), answer("learning.curve", "train", "skipped"))
    evidence = replaced(evidence, answer("exact.matmul", "train", "fail", "wrong"))
    assert of_role(evidence, "train").verdict == "unfit"


def test_speed_is_reported_and_never_decides() -> None:
    evidence = replaced(all_passed(), answer("speed.step", "train", "fail", "slow"))
    assert words(evidence) == {"train": "fit", "infer": "fit"}
    assert words([item for item in all_passed() if item.family != "speed"]) == {
        "train": "fit",
        "infer": "fit",
    }


def test_one_cause_seen_by_many_checks_is_said_once() -> None:
    evidence = all_passed()
    for name in ("coverage.forward", "determinism.training", "soak.training"):
        evidence = replaced(
            evidence, answer(name, "train", "error", "an operator is missing: aten::silu")
        )
    assert of_role(evidence, "train").reasons == (
        "coverage.forward and 2 checks more: an operator is missing: aten::silu",
    )


def test_a_chip_that_could_not_be_opened_is_unproven() -> None:
    evidence = [
        Evidence(
            check="open",
            family="open",
            roles=("train", "infer"),
            outcome="skipped",
            bound="",
            detail="no driver",
        )
    ]
    assert words(evidence) == {"train": "unproven", "infer": "unproven"}


def test_names_of_checks_are_unique_and_their_functions_exist() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        assert callable(check.function()), check.name


def test_an_unknown_check_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="exact.matmul"):
        asks(quick=True, only=["exact.matmull"])


def test_judge_and_supervisor_do_not_import_torch() -> None:
    code = "import sys, bascule.qualify.judge, bascule.qualify.battery, bascule.qualify.equivalence; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_verdict_is_void_when_old_or_for_another_model_or_other_libraries() -> None:
    nano, tick = ModelConfig(preset="nano"), ModelConfig(preset="tick")
    chip = Examined("cpu", model_sha256=model_sha256(nano))
    verdict = verdicts(all_passed(), chip)[0]
    now_s = verdict.time_s
    assert outdated(verdict, nano, now_s=now_s, max_age_days=90) is None
    assert "91 days old" in str(outdated(verdict, nano, now_s=now_s + 91 * 86400, max_age_days=90))
    assert "another model" in str(outdated(verdict, tick, now_s=now_s, max_age_days=90))
    newer = verdict.model_copy(update={"libraries": "torch 9.9"})
    assert "torch 9.9" in str(outdated(newer, nano, now_s=now_s, max_age_days=90))


def test_a_fit_verdict_says_of_which_part_of_the_model_it_speaks() -> None:
    part = dataclasses.replace(CHIP, part="2 of 30 layers")
    assert "(quick battery on 2 of 30 layers)" in verdicts(all_passed(), part)[0].reasons[0]
