"""What a rollout's figures mean when they leave the usual, and the usual cure. Thresholds are published ones, named beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sign:
    """`what` names the warning, `far` says when `figure` has gone too far, `text` what it means and what helps."""

    what: str
    figure: str
    far: Callable[[float], bool]
    text: str


SIGNS = (
    Sign(
        "rollout mismatch",
        "mismatch_mean_abs",
        lambda x: x > 0.05,  # NeMo-RL: a mean factor above 1.05 between the two probabilities is to be investigated
        "the rollout engine's log-probabilities lie {value:.3f} from the trainer's on average (0.05 is much): it runs other kernels, "
        "another precision or other weights. Qualify its pool, compute the head in fp32, or place both roles on one kind of chip",
    ),
    Sign(
        "rollout mismatch, divergence",
        "mismatch_k3_kl",
        lambda x: x > 0.015,  # prime-rl refuses to merge a change above it
        "the rollouts come from another policy than the trainer's: KL {value:.4f} nats (prime-rl's bar is 0.015). Beside the cures "
        "of rollout mismatch: grpo.one_step_off = false, fewer grpo.updates_per_rollout, a lower learning rate",
    ),
    Sign(
        "masked tokens",
        "mismatch_masked_ratio",
        lambda x: x > 0.05,  # training.md 2.6: warn at 5 %, stop at 20 %
        "the correction throws {value:.1%} of the tokens away (5 % is much, 20 % a reason to stop): the gap between engine and "
        "trainer is the fault, the mask only hides it. Watch mismatch mean |dlogp|, and mend the engine rather than the band",
    ),
    Sign(
        "no reward",
        "reward",
        lambda x: x <= 0.0,
        "not one answer of a whole rollout was right: there is nothing to reinforce. Train SFT longer, begin with easier problems "
        '(grpo.curriculum = "easy_first"), give more tries (grpo.group_size), or look at the answers: the format may be wrong',
    ),
    Sign(
        "dead groups",
        "dead_group_ratio",
        lambda x: x > 0.8,  # training.md 2.7: below 20 % kept groups nothing is learnt
        "{value:.0%} of the groups are all right or all wrong and teach nothing. All wrong: as for no reward. All right: harder "
        "problems, or grpo.retire_after = 2. Either way grpo.refill_rounds = 2 fills the batch",
    ),
    Sign(
        "truncated answers",
        "truncated_ratio",
        lambda x: x > 0.2,  # DAPO masks them; a fifth lost is a fifth of the rollout's cost
        "{value:.0%} of the answers were cut off and are left out of the loss: only short thoughts are learnt. Raise "
        "grpo.max_completion_tokens, or train SFT until the model ends its answers",
    ),
    Sign(
        "policy ratio",
        "max_policy_ratio",
        lambda x: x > 4.0,  # feasibility.md 4: seen before every collapse
        "a token's probability moved {value:.1f}-fold within one rollout (over 4 a collapse is near). Lower grpo.learning_rate or "
        "grpo.updates_per_rollout",
    ),
)  # fmt: skip


def signs(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(what, text) of every sign that a step's metrics show."""
    return [
        (sign.what, sign.text.format(value=metrics[sign.figure]))
        for sign in SIGNS
        if sign.figure in metrics and sign.far(metrics[sign.figure])
    ]
