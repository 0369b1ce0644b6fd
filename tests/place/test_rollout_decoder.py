"""Compiled rollouts are one decision for all pools of a run, and no simulated fault of inference stops acting because of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bascule.accelerators.cpu import CpuAccelerator
from bascule.accelerators.registry import open_accelerator
from bascule.accelerators.simulated import SimulatedAccelerator
from bascule.config.load import recipe_from
from bascule.config.recipe import Recipe
from bascule.errors import BasculeError, UsageError
from bascule.faults.build import CLASSES
from bascule.faults.catalogue import KINDS, SEVERITIES, FaultSpec, load_profile, profiles
from bascule.infer.engine import Engine
from bascule.infer.sampling import Sampling
from bascule.ledger import Ledger, of_kind
from bascule.place.rollout_decoder import decided
from bascule.records import RolloutDecoder
from bascule.stages.place import place_roles
from tests.infer.test_packed import random_model


def recipe(*accelerators: str, asked: str = "auto") -> Recipe:
    pools = {f"p{at}": {"accelerator": one} for at, one in enumerate(accelerators)}
    return recipe_from(
        {"name": "t", "pools": pools, "qualify": {"required": False}, "train": {"rollout_decoder": asked}}, source="test",
    )  # fmt: skip


def planted() -> list[Any]:
    """Every profile; at its other severities among the slow tests, because together they take most of a minute."""
    medium = [f"sim:{name}@cpu" for name in profiles()]
    others = [
        f"sim:{name}:{severity}@cpu"
        for name in profiles()
        for severity in SEVERITIES
        if severity != "medium" and getattr(load_profile(name), severity)
    ]
    return [*medium, *(pytest.param(one, marks=pytest.mark.slow) for one in others)]


UNMET = {
    "large-angles": "sines are worked out once, when the model is made",
    "over-read": "no sum of this small model is so long",
    "softmax-past-power": "no row of scores is so long",
    "buffer-1024:low": "no product of this small model has so many rows",
    "buffer-1024:medium": "no product of this small model has so many rows",
    "input-range:low": "gradients are so small, activations are not",
    "input-range:medium": "gradients are so small, activations are not",
    "one-tile:medium": "no product of this small model has exactly 33 columns",
    "intermittent:low": "one product in 100,000",
    "bad-page:low": "one operator in ten million",
}
"""Faults of inference that a rollout of the test's size does not meet, though it is made of operators. Nor do those of all-reduces: one chip
alone reduces nothing."""


@pytest.mark.parametrize(
    ("accelerators", "decoder"),
    [
        (["cpu"], "compiled"),
        (["sim:ascend-r2@cpu", "cpu"], "compiled"),
        (["sim:clean@cpu", "cuda|cpu"], "compiled"),
        (["sim:slow@cpu"], "compiled"),
        (["cpu", "sim:infer-bad@cpu"], "operators"),
        (["cuda | sim:infer-bad:low?rate=0.1", "cpu"], "operators"),
    ],
)
def test_one_pool_that_simulates_a_fault_of_inference_decides_for_all(
    accelerators: list[str], decoder: str
) -> None:
    assert decided(recipe(*accelerators)).decoder == decoder
    assert decided(recipe(*accelerators, asked="operators")).decoder == "operators"


def test_a_recipe_cannot_force_what_would_hide_a_fault() -> None:
    assert decided(recipe("cpu", asked="compiled")).decoder == "compiled"
    with pytest.raises(UsageError, match="'p1' simulates mixed in inference"):
        decided(recipe("cpu", "sim:infer-bad@cpu", asked="compiled"))


def test_the_decision_is_recorded_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", attempt=1)
    for _ in range(2):
        place_roles(recipe("cpu", "sim:infer-bad@cpu"), ledger)
    (found,) = of_kind(ledger.read(), RolloutDecoder)
    assert found.decoder == "operators" and "infer-bad" not in found.reason
    assert "'p1' simulates mixed in inference" in found.reason


def test_what_is_said_to_strike_operators_is_what_the_code_strikes() -> None:
    for kind in KINDS:
        on_calls = kind.name in CLASSES and CLASSES[kind.name].on_calls
        assert FaultSpec(kind=kind.name).on_operators == on_calls, kind.name


def struck(log: Path) -> list[dict[str, object]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [one for one in map(json.loads, lines) if one["op"]]


@pytest.mark.parametrize("name", planted())
def test_every_fault_of_inference_still_acts_in_rollouts(name: str, tmp_path: Path) -> None:
    """The engine opened as a rollout's is, from the recipe alone."""
    log = tmp_path / "log.jsonl"
    chip = open_accelerator(name, seed=0, fault_log=log)
    assert isinstance(chip, SimulatedAccelerator)
    native = decided(recipe("cpu", name)).decoder == "compiled"
    assert native != chip.needs_operators("infer")
    if not native:
        with pytest.raises(UsageError, match="would not be met"):
            Engine(random_model(), chip, eos_id=-1, pad_id=0, native=True)
    told: BasculeError | RuntimeError | None = None
    engine = Engine(random_model(), chip, eos_id=-1, pad_id=0, native=native)
    for step in range(1, 3 if native else 9):
        try:
            engine.generate([[1, 2, 3], [4, 5]], Sampling(max_tokens=16), group_size=16, work_step=step)  # fmt: skip
        except (BasculeError, RuntimeError, torch.OutOfMemoryError) as error:
            told = error
        if struck(log) or told is not None:
            break
    plant = name.removeprefix("sim:").partition("@")[0]
    alone = all(spec.ops == ("all_reduce",) for spec in chip.profile.strikes_operators("infer"))
    exact = plant if ":" in plant else f"{plant}:medium"
    if not UNMET.keys() & {exact, plant.partition(":")[0]} and (native or not alone):
        met = bool(struck(log)) or told is not None
        assert met == chip.needs_operators("infer"), (struck(log)[:2], told)


def test_pools_that_decode_compiled_give_the_same_bits_alone_or_together() -> None:
    """What a run that fell back relies on: a simulated chip sound in inference, and the CPU; a batch cut short by a kill, and a whole one."""
    model, sampling = random_model(preset="nano"), Sampling(max_tokens=20, seed=3)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    chip = open_accelerator("sim:ascend-r2@cpu")
    found = [
        Engine(model, one, eos_id=2, pad_id=0, native=True).generate(prompts, sampling, group_size=8)
        for one in (chip, CpuAccelerator())
    ]  # fmt: skip
    assert found[0] == found[1]
    small = Engine(model, chip, eos_id=2, pad_id=0, native=True, batch_size=8)
    assert [one.tokens for one in small.generate(prompts, sampling, group_size=8)] == [one.tokens for one in found[0]]  # fmt: skip
