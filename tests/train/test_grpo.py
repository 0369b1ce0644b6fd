from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bascule.errors import UsageError
from bascule.guard.replay import some_sequences
from bascule.infer.routes import with_routes
from bascule.train.grpo import Group, Grpo, deal
from bascule.train.mismatch import mismatch_record

FIRST = 4  # the tiny run's first GRPO step


def at_grpo(run):
    run.stepper.step = FIRST - 1
    run.stepper.begin(run.grpo)
    return run


def test_groups_are_dealt_whole_and_evenly_and_none_is_lost():
    groups = [Group([i], [], []) for i in range(5)]
    hands = deal(groups, 2)
    assert [len(hand) for hand in hands] == [3, 2]
    assert sorted(g.prompt[0] for hand in hands for g in hand) == [0, 1, 2, 3, 4]
    assert deal(groups[:1], 2) == [groups[:1], []]


def test_one_rollout_serves_all_its_minibatches_and_asking_again_changes_nothing(tiny):
    run = at_grpo(tiny())
    asked = []
    sampler = run.grpo.sampler
    run.grpo.sampler = lambda request: asked.append(request.step) or sampler(request)
    first, second, again = (run.grpo.next_batch(step) for step in (FIRST, FIRST + 1, FIRST))
    assert asked == [FIRST] and again is first and second.step == FIRST + 1
    run.grpo.next_batch(FIRST + 2)
    assert asked == [FIRST, FIRST + 2]


def test_the_first_minibatch_has_policy_ratio_exactly_one_and_the_engine_agrees_with_the_trainer(
    tiny,
):
    run = at_grpo(tiny())
    proposal = run.stepper.propose(run.grpo.next_batch(FIRST))
    assert proposal.metrics["max_policy_ratio"] == 1.0
    assert proposal.metrics["clipped_low_ratio"] == proposal.metrics["clipped_high_ratio"] == 0.0
    record = mismatch_record(FIRST, proposal.metrics)
    assert record is not None and record.tokens > 0
    assert (
        record.max_abs < 1e-4
        and record.effective_sample_ratio > 0.9999
        and record.capped_ratio == 0.0
    )


def test_only_minibatches_that_come_after_an_update_are_scored(tiny):
    run = at_grpo(tiny())
    first, second = (run.grpo.next_batch(step) for step in (FIRST, FIRST + 1))
    assert "old_logprobs" not in first.tensors and "old_logprobs" in second.tensors
    bare = run.stepper.propose(first)
    old = run.stepper.score(first.tensors, FIRST)
    scored = run.stepper.propose(replace(first, tensors={**first.tensors, "old_logprobs": old}))
    assert all(torch.equal(grad, scored.grads[name]) for name, grad in bare.grads.items())


def test_the_second_minibatch_is_off_policy_by_the_first_update(tiny):
    run = at_grpo(tiny())
    run.stepper.commit(run.stepper.propose(run.grpo.next_batch(FIRST)))
    assert run.stepper.propose(run.grpo.next_batch(FIRST + 1)).metrics["max_policy_ratio"] != 1.0


def test_dead_groups_are_dropped_and_recorded(tiny):
    def reward(owners, completions):
        return [float(i % 4 == 0) if i < 4 else 1.0 for i in range(len(completions))]

    run = at_grpo(tiny(reward=reward))
    batches = [run.grpo.next_batch(step) for step in (FIRST, FIRST + 1)]
    assert (
        batches[0].notes["kept_group_ratio"] == 0.25
        and batches[0].notes["dead_group_ratio"] == 0.75
    )
    assert batches[0].notes["reward"] == 13 / 16
    assert batches[1].empty


def test_when_all_groups_are_dead_the_steps_are_no_ops_with_a_note(tiny):
    run = at_grpo(tiny(reward=lambda owners, completions: [1.0] * len(completions)))
    before = run.fingerprint()
    for step in (FIRST, FIRST + 1):
        proposal = run.stepper.propose(run.grpo.next_batch(step))
        run.stepper.commit(proposal)
        assert proposal.tokens == 0
    assert run.fingerprint() == before and run.stepper.step == FIRST + 1
    assert run.grpo.next_batch(FIRST).notes["dead_group_ratio"] == 1.0
    assert mismatch_record(FIRST, run.grpo.next_batch(FIRST).notes) is None


def test_truncated_answers_count_in_the_group_mean_but_not_in_the_loss(tiny):
    run = at_grpo(
        tiny(
            reward=lambda owners, completions: [float(i % 2) for i in range(len(completions))],
            max_tokens=3,
        )
    )
    batches = [run.grpo.next_batch(step) for step in (FIRST, FIRST + 1)]
    notes = batches[0].notes
    rows = sum(len(b.tensors["tokens"]) for b in batches if not b.empty)
    assert notes["truncated_ratio"] > 0 and notes["kept_group_ratio"] == 1.0
    assert rows == round(16 * (1 - notes["truncated_ratio"]))


def test_advantages_are_those_of_the_samples_they_stand_beside(tiny, material):
    run = at_grpo(tiny())
    batch = run.grpo.next_batch(FIRST)
    eos = material[0].eos_id
    for row in range(len(batch.tensors["tokens"])):
        said = batch.tensors["targets"][row][batch.tensors["mask"][row].bool()]
        assert int(said[-1]) == eos
        assert (float(batch.tensors["advantages"][row]) > 0) == (len(said) % 2 == 1)


def test_state_in_the_middle_of_a_rollout_continues_with_equal_bits(tiny):
    run = at_grpo(tiny())
    run.stepper.commit(run.stepper.propose(run.grpo.next_batch(FIRST)))
    state = run.grpo.state_dict()
    other = at_grpo(tiny())
    other.grpo.load_state_dict(state)
    other.grpo.sampler = None  # a second rollout would fail here
    mine, theirs = run.grpo.next_batch(FIRST + 1), other.grpo.next_batch(FIRST + 1)
    assert mine.tensors.keys() == theirs.tensors.keys() and mine.notes == theirs.notes
    assert all(torch.equal(t, theirs.tensors[n]) for n, t in mine.tensors.items())


def test_the_tasks_own_verifier_pays_a_worked_solution_and_not_a_cut_off_one(tiny, material):
    _, _, examples, _ = material
    reward = tiny.verifier
    whole = [completion for _, completion in examples[:4]]
    assert reward(range(4), whole) == [1.0] * 4
    assert reward(range(4), [tokens[:-1] for tokens in whole]) == [0.0] * 4
    assert reward([0, 0], [whole[0], whole[1]])[0] == 1.0


def test_a_short_reply_of_the_sampler_is_refused(tiny):
    run = at_grpo(tiny())
    sampler = run.grpo.sampler

    def short(request):
        reply = sampler(request)
        return type(reply)(reply.completions[:-1], None, None, 0.0)

    run.grpo.sampler = short
    with pytest.raises(ValueError, match="gave 15"):
        run.grpo.next_batch(FIRST)


def test_no_prompts_is_refused():
    with pytest.raises(UsageError, match="no prompts"):
        Grpo(None, [], seed=0, pad_id=0, sampler=None, score=None, reward=None)


@pytest.mark.parametrize("algorithm", ["default", "cispo"])
def test_a_reward_that_can_be_earned_is_earned_more_often(tiny, material, algorithm):
    """From a uniform policy: answers of at most twenty tokens are rewarded, so the end token must become likelier."""
    eos = material[0].eos_id
    run = tiny(
        reward=lambda owners, completions: [
            float(t[-1] == eos and len(t) <= 20) for t in completions
        ]
    )
    config = run.grpo.config.model_copy(
        update={
            "steps": 6,
            "learning_rate": 3e-3,
            "updates_per_rollout": 1,
            "group_size": 8,
            "algorithm": algorithm,
        }
    )
    run.grpo = Grpo(
        config,
        run.grpo.prompts,
        seed=0,
        pad_id=0,
        sampler=run.grpo.sampler,
        score=run.stepper.score,
        reward=run.grpo.reward,
    )
    run.stepper.begin(run.grpo)
    rewards = []
    for step in range(1, 7):
        proposal = run.stepper.propose(run.grpo.next_batch(step))
        run.stepper.commit(proposal)
        rewards.append(proposal.metrics["reward"])
    assert rewards[0] < 0.4 and rewards[-1] > 0.7, rewards


def configured(run, **changes):
    """The tiny run's GRPO with other settings, from the same prompts and the same engine."""
    old = run.grpo
    new = Grpo(
        old.config.model_copy(update=changes), old.prompts, seed=0, pad_id=0, sampler=old.sampler, score=run.stepper.score,
        reward=old.reward, first_step=FIRST, ahead=asked_ahead(old.sampler),
    )  # fmt: skip
    run.grpo = new
    return at_grpo(run)


def asked_ahead(sampler):
    """What a thread beside the trainer does, without the thread: the engine answers with the weights of the moment it is asked."""

    def ahead(request):
        reply = sampler(request)
        return lambda: reply

    return ahead


def test_with_one_update_a_rollout_nothing_is_scored_twice_and_the_gradient_is_the_same(tiny):
    run = configured(tiny(), updates_per_rollout=1)
    batch = run.grpo.next_batch(FIRST)
    assert "old_logprobs" not in batch.tensors and "mismatch_mean_abs" not in batch.notes
    bare = run.stepper.propose(batch)
    old = run.stepper.score(batch.tensors, FIRST)
    scored = run.stepper.propose(replace(batch, tensors={**batch.tensors, "old_logprobs": old}))
    assert bare.grads.keys() == scored.grads.keys()
    assert all(torch.equal(grad, scored.grads[name]) for name, grad in bare.grads.items())
    record = mismatch_record(FIRST, bare.metrics)
    assert record is not None and record.max_abs < 1e-4


def test_one_step_off_samples_with_the_weights_of_the_rollout_before_and_says_so(tiny):
    run = configured(tiny(), one_step_off=True)
    for step in (FIRST, FIRST + 1):
        run.stepper.commit(run.stepper.propose(run.grpo.next_batch(step)))
    late = run.grpo.next_batch(FIRST + 2)
    assert late.notes["staleness"] == 2.0
    assert run.stepper.propose(late).metrics["mismatch_mean_abs"] > 1e-4
    fresh = at_grpo(tiny())
    for step in (FIRST, FIRST + 1):
        fresh.stepper.commit(fresh.stepper.propose(fresh.grpo.next_batch(step)))
    prompt = fresh.stepper.propose(fresh.grpo.next_batch(FIRST + 2))
    assert prompt.metrics["mismatch_mean_abs"] < 1e-5


def test_answers_that_were_asked_ahead_survive_a_resume_with_equal_bits(tiny):
    run = configured(tiny(), one_step_off=True)
    for step in (FIRST, FIRST + 1):
        run.stepper.commit(run.stepper.propose(run.grpo.next_batch(step)))
    other = configured(tiny(), one_step_off=True)
    other.grpo.load_state_dict(run.grpo.state_dict())
    other.grpo.sampler = None  # asking again, with newer weights, would be another run
    other.grpo.score = run.stepper.score
    mine, theirs = run.grpo.next_batch(FIRST + 2), other.grpo.next_batch(FIRST + 2)
    assert all(torch.equal(t, theirs.tensors[n]) for n, t in mine.tensors.items())


def test_groups_without_contrast_are_replaced_by_new_prompts_with_draws_of_their_own(tiny):
    calls = []

    def reward(owners, completions):
        calls.append(len(completions))
        return [
            float(len(calls) > 1 and i % 2) for i in range(len(completions))
        ]  # the first: all wrong

    run = configured(tiny(reward=reward), refill_rounds=3)
    asked = []
    sampler = run.grpo.sampler
    run.grpo.sampler = lambda request: asked.append(request) or sampler(request)
    batch = run.grpo.next_batch(FIRST)
    assert [request.first_index for request in asked] == [0, 16]
    assert asked[0].prompts != asked[1].prompts
    assert batch.notes["dead_group_ratio"] == 0.5 and not batch.empty


def test_the_batches_of_this_rollout_and_the_one_before_can_be_had_again_also_after_a_resume(tiny):
    run = at_grpo(tiny())
    made = {step: run.grpo.next_batch(step) for step in range(FIRST, FIRST + 4)}
    other = at_grpo(tiny())
    other.grpo.load_state_dict(run.grpo.state_dict())
    for step, batch in made.items():
        assert other.grpo.remembers(step)
        again = other.grpo.next_batch(step)
        assert all(torch.equal(t, again.tensors[n]) for n, t in batch.tensors.items())
    assert not other.grpo.remembers(FIRST + 4)


def test_router_replay_sends_tokens_where_the_engine_sent_them_and_records_the_agreement(tiny):
    run = tiny()
    sampler = run.grpo.sampler

    def routed(request):
        assert request.routes
        reply = sampler(request)
        model = run.stepper.model
        said = with_routes(model, request.prompts, reply.completions, device=torch.device("cpu"))
        return replace(reply, completions=said)

    run.grpo.sampler = routed
    run = configured(run, router_replay=True)
    batch = run.grpo.next_batch(FIRST)
    assert batch.tensors["routes"].shape[:2] == batch.tensors["tokens"].shape
    own = run.stepper.propose(batch)
    assert own.metrics["router_agreement"] == 1.0 and own.metrics["max_policy_ratio"] == 1.0
    with (
        torch.no_grad()
    ):  # the trainer's router drifts; the tokens still go where the engine sent them
        for moe in run.stepper.model.moe_layers():
            moe.gate.weight.normal_(generator=torch.Generator().manual_seed(0))
    drifted = run.stepper.propose(batch)
    assert drifted.metrics["router_agreement"] < 0.9
    assert torch.equal(drifted.expert_loads, own.expert_loads)
    record = mismatch_record(FIRST, drifted.metrics)
    assert record is not None and record.router_agreement == drifted.metrics["router_agreement"]


def test_the_guards_cut_of_a_rollout_is_a_step_too(tiny):
    """Regression: the figures of mismatch asked for numbers that a cut batch does not have, and a whole run ended at its last certificate."""
    run = tiny()
    run.stepper.step = run.grpo.first_step - 1
    run.stepper.begin(run.grpo)
    batch = run.grpo.next_batch(run.grpo.first_step)
    cut = some_sequences(batch, 3, 7)
    assert len(cut.tensors["tokens"]) == 3 and "counted" not in cut.tensors
    proposal = run.stepper.propose(cut)
    assert proposal.metrics["mismatch_tokens"] == float(cut.tensors["mask"].sum())
