from __future__ import annotations

import pytest

from bascule.train.advice import SIGNS, signs

SOUND = {
    "mismatch_mean_abs": 0.001, "mismatch_k3_kl": 1e-6, "mismatch_masked_ratio": 0.0, "reward": 0.4, "dead_group_ratio": 0.3,
    "truncated_ratio": 0.02, "max_policy_ratio": 1.3,
}  # fmt: skip


def test_a_sound_rollout_shows_no_sign_and_an_sft_step_none_either():
    assert signs(SOUND) == [] and signs({"loss": 1.0}) == []


@pytest.mark.parametrize(
    ("figure", "value", "what"),
    [
        ("mismatch_mean_abs", 0.06, "rollout mismatch"),
        ("mismatch_k3_kl", 0.02, "rollout mismatch, divergence"),
        ("mismatch_masked_ratio", 0.07, "masked tokens"),
        ("reward", 0.0, "no reward"),
        ("dead_group_ratio", 0.9, "dead groups"),
        ("truncated_ratio", 0.5, "truncated answers"),
        ("max_policy_ratio", 5.0, "policy ratio"),
    ],
)
def test_each_figure_beyond_its_threshold_is_named_with_a_cure(figure, value, what):
    [(said, text)] = signs({**SOUND, figure: value})
    assert said == what and len(text) > 60


def test_every_sign_is_tested_above():
    assert {sign.figure for sign in SIGNS} == set(SOUND)
