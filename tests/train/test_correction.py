"""The weights that correct the rollout engine, against ratios written down by hand."""

from __future__ import annotations

import math

import pytest
import torch

from bascule.config.training import GrpoConfig
from bascule.train import correction
from bascule.train.policy import ALGORITHMS, Clip

RATIOS = torch.tensor([[0.4, 1.5, 6.0], [1.0, 1.02, 9.0]])
TRAINER = RATIOS.log()
ROLLOUT = torch.zeros(2, 3)
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("none", [[1, 1, 1], [1, 1, 1]]),
        ("token", [[0.4, 1.5, 2.0], [1.0, 1.02, 2.0]]),
        (
            "sequence",
            [[2.0] * 3, [1.02] * 3],
        ),  # 0.4 x 1.5 x 6 = 3.6, capped; the uncounted 9 is left out
        ("icepop", [[0, 1.5, 0], [1.0, 1.02, 0]]),
    ],
)
def test_each_rule_gives_the_weights_it_is_named_for(rule, expected):
    got = correction.weights(TRAINER, ROLLOUT, MASK, GrpoConfig(correction=rule))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32))


def test_weights_carry_no_gradient_into_the_policy():
    trainer = TRAINER.clone().requires_grad_()
    for rule in correction.RULES:
        assert not correction.weights(
            trainer, ROLLOUT, MASK, GrpoConfig(correction=rule)
        ).requires_grad


def test_the_geometric_guard_masks_whole_samples_by_the_mean_of_their_log_ratios():
    mean = math.exp(math.log(1.02) / 2)  # second sample, two counted tokens
    for width, kept in ((0.02, [0.0, 1.0]), (mean - 1.001, [0.0, 0.0]), (10.0, [1.0, 1.0])):
        assert correction.geometric_guard(TRAINER, ROLLOUT, MASK, width)[:, 0].tolist() == kept
    guarded = correction.weights(TRAINER, ROLLOUT, MASK, GrpoConfig(sequence_guard=0.02))
    assert guarded[0].tolist() == [0.0] * 3 and guarded[1, 1] > 1


def test_a_ratio_that_would_overflow_stays_finite():
    far = torch.full((1, 2), 80.0)
    config = GrpoConfig(correction="sequence", importance_cap=1e30)
    got = correction.weights(far, torch.zeros(1, 2), torch.ones(1, 2), config)
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("rule", ["token", "icepop"])
def test_on_a_bandit_the_weights_undo_a_stale_sampler(rule):
    """Arms drawn by an engine with other odds q: E_q[w A grad log p] is E_p[A grad log p] in closed form, p_k (A_k - E_p A)."""
    logits = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64, requires_grad=True)
    stale = torch.tensor([0.1, 0.3, 0.0], dtype=torch.float64).log_softmax(0)
    reward = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
    new = logits.log_softmax(0)[
        :, None
    ]  # one sample of each arm, weighed by how often the engine draws it
    weight = correction.weights(new, stale[:, None], torch.ones(3, 1), GrpoConfig(correction=rule))
    chances = 3 * stale.exp()[:, None]  # the loss is a mean over three tokens
    loss = ALGORITHMS["default"].loss(
        new, new.detach(), reward[:, None], weight * chances, torch.ones(3, 1, dtype=torch.float64), Clip(0.2, 0.28, 1)
    )  # fmt: skip
    (got,) = torch.autograd.grad(loss, logits)
    p = logits.detach().softmax(0)
    torch.testing.assert_close(got, -p * (reward - (p * reward).sum()))
