"""The policy loss against gradients known in closed form, and the mismatch figures against arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bascule.train.mismatch import mismatch, mismatch_record
from bascule.train.policy import (
    ALGORITHMS,
    Clip,
    clip_metrics,
    standardised,
    with_contrast,
)

CLIP = Clip(0.2, 0.28, longest=4)
ONE = torch.ones(1, 1)


def test_the_default_advantage_is_reward_minus_group_mean_undivided():
    got = ALGORITHMS["default"].advantages(np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    assert np.array_equal(got, [[0.75, -0.25, -0.25, -0.25], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(standardised(np.array([[1.0, 0.0]])), [[1.0, -1.0]], atol=1e-5)


def test_a_group_without_contrast_is_dead_whether_all_right_or_all_wrong():
    assert with_contrast(np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])).tolist() == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("default", [1 / 4, 1 / 4, 1 / 4]),  # every token of the batch alike
        ("dapo", [1 / 4, 1 / 4, 1 / 4]),
        ("cispo", [1 / 4, 1 / 4, 1 / 4]),
        (
            "grpo",
            [1 / 3, 1 / 3, 1 / 6],
        ),  # every sample alike: the tokens of the sample with two get half each
        ("gspo", [1 / 3, 1 / 3, 1 / 6]),
        ("dr_grpo", [1 / 12, 1 / 12, 1 / 12]),  # three samples of at most four tokens
    ],
)
def test_on_a_bandit_each_algorithms_gradient_is_the_policy_gradient_in_closed_form(name, weights):
    """Three samples from one softmax policy p, the last of two tokens. d loss / d logits = -sum_tokens w A (onehot - p)."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    arms = torch.tensor([[0, 0], [1, 0], [2, 1]])
    mask = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    advantage = ALGORITHMS[name].advantages(np.array([[1.0, 0.0, 0.0]]))[0]
    new = logits.log_softmax(0)[arms]
    loss = ALGORITHMS[name].loss(
        new, new.detach(), torch.tensor(advantage)[:, None], torch.ones_like(new), mask, CLIP
    )
    (got,) = torch.autograd.grad(loss, logits)
    p, expected = logits.detach().softmax(0), torch.zeros(3, dtype=torch.float64)
    for row in range(3):
        for t in range(int(mask[row].sum())):
            expected -= (
                weights[row]
                * advantage[row]
                * (torch.eye(3, dtype=torch.float64)[arms[row, t]] - p)
            )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_off_policy_each_algorithms_gradient_is_that_of_its_paper(name):
    """Two samples drawn by an older policy q, the second of two tokens: r = p/q of a token, A +-1. Inside the clip
    d loss / d logits = -sum w r A (onehot - p): PPO's kind with the token's r, GSPO with the geometric mean over the sample,
    CISPO with r capped at 1.28 (which arm 0, 1.33, exceeds: the others' clip stops it there)."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    arms = torch.tensor([[0, 0], [2, 1]])
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    new = logits.log_softmax(0)[arms]
    ratio = torch.tensor([[1.33, 1.0], [1.1, 0.9]], dtype=torch.float64)
    advantage = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    loss = ALGORITHMS[name].loss(
        new, new.detach() - ratio.log(), advantage, torch.ones_like(new), mask, CLIP
    )
    (got,) = torch.autograd.grad(loss, logits)
    mean = math.sqrt(1.1 * 0.9)
    weight, used = {
        "default": ([1 / 3, 1 / 3], [0.0, 1.1, 0.9]),
        "dapo": ([1 / 3, 1 / 3], [0.0, 1.1, 0.9]),
        "grpo": ([1 / 2, 1 / 4], [0.0, 1.1, 0.9]),
        "dr_grpo": ([1 / 8, 1 / 8], [0.0, 1.1, 0.9]),
        "gspo": ([1 / 2, 1 / 4], [0.0, mean, mean]),
        "cispo": ([1 / 3, 1 / 3], [1.28, 1.1, 0.9]),
    }[name]
    p, onehot = logits.detach().softmax(0), torch.eye(3, dtype=torch.float64)
    expected = -weight[0] * used[0] * (onehot[0] - p)
    expected += weight[1] * (used[1] * (onehot[2] - p) + used[2] * (onehot[1] - p))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["default", "grpo", "dr_grpo", "dapo", "gspo"])
@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [
        (1.27, 1.0, True),
        (1.29, 1.0, False),
        (0.81, -1.0, True),
        (0.79, -1.0, False),
        (0.5, 1.0, True),
        (2.0, -1.0, True),
    ],
)
def test_the_clip_stops_the_gradient_beyond_its_own_side_only(name, ratio, advantage, moves):
    new = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss = ALGORITHMS[name].loss(new, torch.zeros(1, 1), advantage * ONE, ONE, ONE, CLIP)
    (grad,) = torch.autograd.grad(loss, new)
    assert bool(grad.abs().sum() > 0) is moves
    metrics = clip_metrics(new, torch.zeros(1, 1), advantage * ONE, ONE, CLIP)
    assert float(metrics["clipped_low_ratio"] + metrics["clipped_high_ratio"]) == (
        0.0 if moves else 1.0
    )
    assert float(metrics["max_policy_ratio"]) == pytest.approx(ratio)


def test_cispo_caps_the_weight_but_never_stops_the_gradient():
    new = torch.tensor([[math.log(2.0)]], requires_grad=True)
    loss = ALGORITHMS["cispo"].loss(new, torch.zeros(1, 1), ONE, ONE, ONE, CLIP)
    (grad,) = torch.autograd.grad(loss, new)
    assert float(grad) == pytest.approx(-1.28)


def test_importance_weights_scale_the_gradient_in_every_algorithm():
    for algorithm in ALGORITHMS.values():
        new = torch.zeros(1, 1, requires_grad=True)
        grads = [
            torch.autograd.grad(
                algorithm.loss(new, torch.zeros(1, 1), ONE, w * ONE, ONE, CLIP), new
            )[0]
            for w in (1.0, 1.7)
        ]
        assert float(grads[1]) == pytest.approx(1.7 * float(grads[0]))


def test_by_default_every_token_of_the_batch_weighs_the_same():
    new = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    loss = ALGORITHMS["default"].loss(
        new, torch.zeros(2, 3), torch.tensor([[1.0], [-1.0]]), torch.ones(2, 3), mask, CLIP
    )
    (grad,) = torch.autograd.grad(loss, new)
    assert torch.equal(grad, torch.tensor([[-0.25, 0.0, 0.0], [0.25, 0.25, 0.25]]))


def told(trainer_N, rollout_N, weight_N, cap):
    return {n: float(v) for n, v in mismatch(trainer_N, rollout_N, weight_N, cap).items()}


def test_mismatch_figures_are_the_textbook_ones():
    got = told(
        torch.tensor([math.log(0.5), math.log(0.2)]),
        torch.tensor([math.log(0.25), math.log(0.4)]),
        torch.tensor([1.5, 0.0]),
        1.5,
    )
    d = [math.log(2.0), -math.log(2.0)]
    assert got["mean_abs"] == pytest.approx(math.log(2.0)) and got["max_abs"] == pytest.approx(
        math.log(2.0)
    )
    assert got["k1_kl"] == pytest.approx(0.0, abs=1e-7)
    assert got["k3_kl"] == pytest.approx(((2 - 1 - d[0]) + (0.5 - 1 - d[1])) / 2)
    assert got["chi2"] == pytest.approx((4 + 0.25) / 2 - 1)
    assert got["effective_sample_ratio"] == pytest.approx(1.25**2 / 2.125)
    assert got["capped_ratio"] == 0.5 and got["masked_ratio"] == 0.5 and got["tokens"] == 2


def test_equal_log_probabilities_have_no_mismatch():
    x = torch.tensor([-1.0, -2.0, -0.5])
    got = told(x, x, torch.ones(3), 2.0)
    assert got == {
        "mean_abs": 0,
        "max_abs": 0,
        "k1_kl": 0,
        "k3_kl": 0,
        "chi2": 0,
        "effective_sample_ratio": 1,
        "capped_ratio": 0,
        "masked_ratio": 0,
        "tokens": 3,
    }


def test_the_ledgers_record_is_made_from_the_notes():
    notes = {
        "reward": 0.5,
        **{
            f"mismatch_{k}": v
            for k, v in mismatch(torch.zeros(3), torch.zeros(3), torch.ones(3), 2.0).items()
        },
    }
    record = mismatch_record(7, notes, pool="ascend")
    assert (
        record is not None
        and record.tokens == 3
        and record.pool == "ascend"
        and record.max_abs == 0.0
    )
    assert mismatch_record(7, {"reward": 0.5}) is None
