"""Pricing a recipe's own pools before the run."""

from __future__ import annotations

from bascule.config.model import ModelConfig
from bascule.config.recipe import Recipe
from bascule.model import count
from bascule.plan.lengths import Lengths
from bascule.plan.options import BatchTokens, batches, device_family, price_pools


def recipe(**pools: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "t",
            "pools": pools
            or {"a": {"accelerator": "sim:ascend-r2@cpu"}, "b": {"accelerator": "cpu"}},
        }
    )


def test_every_pool_is_priced_in_the_owners_order() -> None:
    options = price_pools(recipe(), {"a": 8e9, "b": None}, None)
    assert [option.pool for option in options] == ["a", "b"]
    for option in options:
        assert option.train_s_low < option.train_s < option.train_s_high
        assert option.memory_bytes == sum(option.memory_components_bytes.values())
        assert option.fits == "fits"


def test_a_cpu_is_called_an_unknown_chip_and_the_probe_is_named() -> None:
    (option,) = price_pools(recipe(b={"accelerator": "cpu"}), {}, None)
    assert "unknown chip" in option.basis and "probe" in option.basis


def test_a_small_memory_does_not_fit() -> None:
    (option,) = price_pools(recipe(b={"accelerator": "cpu"}), {"b": 1e8}, None)
    assert option.fits == "does not fit"


def test_measured_step_times_replace_the_estimate() -> None:
    one = recipe(b={"accelerator": "cpu", "price_per_hour": 36.0})
    (option,) = price_pools(one, {"b": 8e9}, {"b": {"sft_step_s": 0.1, "grpo_step_s": 1.0}})
    assert abs(option.train_s - (800 * 0.1 + 150 * 1.0)) < 1e-9
    assert abs(option.cost - option.train_s / 100) < 1e-9
    assert "step times" in option.basis


def test_the_first_of_two_accelerators_is_planned_unless_the_host_answers() -> None:
    assert device_family("cuda|cpu", None) == "cpu"
    assert device_family("cuda|cpu", 80e9) == "cuda"
    assert device_family("sim:ascend-r2@cuda", 80e9) == "cuda"


def test_memory_and_time_follow_from_the_texts_own_lengths() -> None:
    """Regression: SmolLM2's short sums were planned as if every row were as long as the model reads: 36 GiB where it took 7."""
    one = recipe(b={"accelerator": "cpu"})
    short = Lengths(8, 10, 20, 25, "looked at")
    (guess,) = price_pools(one, {"b": 8e9})
    (found,) = price_pools(one, {"b": 8e9}, lengths=short)
    assert batches(one, short)["sft"].tokens == one.sft.batch_sequences * 25
    assert found.memory_bytes < guess.memory_bytes
    assert found.train_s < guess.train_s
    assert "looked at" in found.basis and "assumed" in guess.basis


def test_a_group_works_its_prompt_out_once_and_every_completion_at_its_cap() -> None:
    one = recipe(b={"accelerator": "cpu"})
    grpo = one.grpo
    prompts = grpo.prompts // grpo.updates_per_rollout
    said = prompts * grpo.group_size * grpo.max_completion_tokens
    found = batches(one, Lengths(8, 10, 20, 25, "looked at"))
    assert found["grpo"] == BatchTokens(said + prompts * 10, said)
    assert found["sft"] == BatchTokens(one.sft.batch_sequences * 25, one.sft.batch_sequences * 17)


def test_logits_cost_no_more_than_what_is_kept_of_them() -> None:
    many = {"b": {"accelerator": "cpu"}}
    wide = recipe(**many).model_copy(update={"model": ModelConfig(vocab_size=100_000)})
    (found,) = price_pools(wide, {"b": 8e9})
    head = 4 * 100_000 * wide.model.hidden_size
    assert found.memory_components_bytes["logits"] == 3 * count.LOGITS_CHUNK_BYTES + head
