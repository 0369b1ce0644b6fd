"""Who gets which role, and why."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bascule.errors import NoPoolLeft
from bascule.place.placement import place
from bascule.records import CUT_OFF, Role, Verdict, VerdictWord


def verdict(pool: str, role: Role, word: VerdictWord) -> Verdict:
    return Verdict(
        pool=pool,
        role=role,
        verdict=word,
        reasons=(f"because of {word}.",),
        accelerator="cpu",
        chip=f"chip of {pool}",
        driver="1",
        simulated=False,
    )


def verdicts(**words: str) -> list[Verdict]:
    """`ascend="fit unfit"`: the words for train and infer."""
    return [
        verdict(pool, role, word)
        for pool, both in words.items()
        for role, word in zip(("train", "infer"), both.split(), strict=True)
    ]  # type: ignore[arg-type]


def test_the_owners_first_choice_wins_when_it_is_fit() -> None:
    found = place(verdicts(ascend="fit fit", nvidia="fit fit"), order=("ascend", "nvidia"))
    assert (found.train, found.infer) == ("ascend", "ascend")


def test_roles_are_placed_apart() -> None:
    found = place(verdicts(ascend="unfit fit", nvidia="fit fit"), order=("ascend", "nvidia"))
    assert (found.train, found.infer) == ("nvidia", "ascend")
    assert (
        "'ascend' (chip of ascend) is unfit for training: because of unfit"
        in found.reasons["train"]
    )


def test_a_condemned_pool_loses_only_the_role_it_was_condemned_for() -> None:
    found = place(
        verdicts(ascend="fit fit", nvidia="fit fit"),
        order=("ascend", "nvidia"),
        condemned={("ascend", "train")},
    )
    assert (found.train, found.infer) == ("nvidia", "ascend")
    assert "condemned for training" in found.reasons["train"]


def test_unproven_and_unasked_pools_are_taken_only_when_the_recipe_allows() -> None:
    facts = verdicts(ascend="unproven fit")
    with pytest.raises(NoPoolLeft, match=r"unproven for training.*\. Begin another run \(--name\).*qualify.time_limit_s"):  # fmt: skip
        place(facts, order=("ascend",))
    with pytest.raises(NoPoolLeft, match="no verdict for training"):
        place([], order=("ascend",))
    assert place(facts, order=("ascend",), required=False).train == "ascend"
    assert place([], order=("ascend",), required=False).infer == "ascend"


def test_what_was_cut_off_can_be_gone_on_with() -> None:
    facts = [
        one.model_copy(update={"reasons": (f"soak.training: {CUT_OFF} of 180 s",)})
        for one in verdicts(ascend="unproven fit")
    ]
    with pytest.raises(NoPoolLeft, match="Run the same command again: the examination goes on"):
        place(facts, order=("ascend",))


def test_the_newest_verdict_counts() -> None:
    facts = verdicts(ascend="unfit fit") + verdicts(ascend="fit fit")
    assert place(facts, order=("ascend",)).train == "ascend"


def test_no_pool_left_says_why_for_every_pool_and_what_to_do() -> None:
    with pytest.raises(NoPoolLeft) as caught:
        place(
            verdicts(ascend="fit fit", nvidia="unfit fit"),
            order=("ascend", "nvidia"),
            condemned={("ascend", "train")},
        )
    for part in (
        "training",
        "'ascend' was condemned",
        "'nvidia' (chip of nvidia) is unfit",
        "Mend a condemned chip, let it back with `bascule qualify POOL --readmit RUN`",
        "or begin another run (--name) with another pool under [pools].",
    ):
        assert part in str(caught.value)


def test_placement_needs_no_torch() -> None:
    code = "import sys, bascule.place.placement, bascule.place.client; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
