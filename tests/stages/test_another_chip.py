"""A pool of several chips: when one fails, the next of the same pool takes over before another pool does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from bascule.config.load import read_resolved, recipe_from
from bascule.errors import RecipeError
from bascule.folder import RunFolder
from bascule.ledger import of_kind
from bascule.records import Continuation, Migration, PoolCondemned
from bascule.report.story import sentences
from bascule.stages.drill import _planted
from bascule.stages.drilled import Drilled, look, story
from tests import in_process

BAD, GOOD = "sim:zeroed?onset_step=6@cpu", "sim:clean@cpu"


def recipe(*chips: str, **more: object):  # type: ignore[no-untyped-def]
    return in_process.recipe(
        "cpu", sft={"steps": 9, "batch_sequences": 4}, data={"train_problems": 64}, train={"snapshot_every_steps": 3},
        pools={"chip": {"accelerator": list(chips), **more}, "spare": {"accelerator": "cpu"}},
        guard={"checksum_every_steps": 1, "audit_every_steps": 100},
    )  # fmt: skip


def test_a_list_of_accelerators_is_one_pool_a_chip_in_the_owners_order(tmp_path: Path) -> None:
    made = recipe(BAD, GOOD, price_per_hour=2.0)
    assert made.order == ("chip-0", "chip-1", "spare")
    assert [made.pools[one].accelerator for one in made.order] == [BAD, GOOD, "cpu"]
    assert made.pools["chip-1"].price_per_hour == 2.0
    assert made.siblings("chip-0") == ("chip-1",) and made.siblings("spare") == ()
    path = tmp_path / "recipe.json"
    path.write_text(made.model_dump_json())
    assert read_resolved(path) == made


@pytest.mark.parametrize(
    ("pools", "words"),
    [
        ({"a": {"accelerator": []}}, "pools.a.accelerator: the list is empty"),
        (
            {"a": {"accelerator": ["cpu", "cpu"]}, "a-1": {"accelerator": "cpu"}},
            "'a-1' is a chip's name already",
        ),
        ({"a": {"accelerator": ["cpu", 3]}}, "pools.a-1.accelerator"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused_by_name(pools: object, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe_from({"name": "r", "pools": pools}, source="test")


def test_the_next_chip_takes_over_with_a_verified_continuation_and_the_same_bits(
    tmp_path: Path,
) -> None:
    code, records = in_process.run(recipe(BAD, GOOD), tmp_path / "r")
    _, undisturbed = in_process.run(recipe(GOOD, GOOD), tmp_path / "u")
    assert code == 0
    assert in_process.weights_of(records) == in_process.weights_of(undisturbed)
    moves = of_kind(records, Migration)
    assert [(one.rung, one.from_pool, one.to_pool) for one in moves] == [
        ("another chip", "chip-0", "chip-1")
    ]
    assert [(one.pool, one.verified) for one in of_kind(records, Continuation)] == [
        ("chip-1", True)
    ]
    assert any("another chip of the same pool" in one.text for one in sentences(records))
    drilled = Drilled("zeroed", BAD, "chip-0", "finished", 0)
    look(drilled, RunFolder(tmp_path / "r"))
    assert drilled.rungs == ["another chip"] and not drilled.innocent_condemned
    assert any("another chip; continuation verified" in line for line in story(drilled))


def test_a_pool_whose_chips_all_fail_is_left_for_the_next_pool(tmp_path: Path) -> None:
    code, records = in_process.run(recipe(BAD, BAD), tmp_path)
    assert code == 0
    assert [(one.rung, one.to_pool) for one in of_kind(records, Migration)] == [
        ("another chip", "chip-1"),
        ("another pool", "spare"),
    ]
    assert [one.pool for one in of_kind(records, PoolCondemned)] == ["chip-0", "chip-1"]
    assert of_kind(records, Migration)[1].wait_s == 1.0


def test_a_drill_plants_on_the_chip_that_trains_and_leaves_its_siblings_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "r.toml"
    path.write_text('[pools.gpu]\naccelerator = ["cuda:0", "cuda:1|cpu"]\n')
    asked = SimpleNamespace(recipe=str(path), overrides=[], all=False)
    planted = _planted(asked, "gpu-1", "zeroed", "r-drill")  # type: ignore[arg-type]
    assert [planted.pools[one].accelerator for one in planted.order] == [
        "cuda:0",
        "sim:zeroed@cuda:1|sim:zeroed@cpu",
    ]
