"""Give each role a pool: verdicts and the owner's preference in, a placement out."""

from __future__ import annotations

from bascule.config.recipe import Recipe
from bascule.fallback.policy import condemned
from bascule.ledger import Ledger, last, of_kind
from bascule.place.placement import place
from bascule.place.rollout_decoder import decided
from bascule.records import Placement, RolloutDecoder, Verdict
from bascule.stages.answer import say

_WORDS = {"compiled": "compiled steps", "operators": "torch's operators"}


def place_roles(recipe: Recipe, ledger: Ledger) -> Placement:
    """Return the run's present placement; make and record one where there is none, or where a condemnation overtook it."""
    records = ledger.read()
    _record_decoder(decided(recipe), last(records, RolloutDecoder), ledger)
    wanted = place(
        of_kind(records, Verdict),
        order=recipe.order,
        condemned=condemned(records),
        required=recipe.qualify.required,
    )
    present = last(records, Placement)
    if present and (present.train, present.infer) == (wanted.train, wanted.infer):
        return present
    ledger.append(wanted)
    say(
        f"train on {wanted.train} ({wanted.reasons.get('train', '')}); infer on {wanted.infer} ({wanted.reasons.get('infer', '')})"
    )
    return wanted


def _record_decoder(wanted: RolloutDecoder, present: RolloutDecoder | None, ledger: Ledger) -> None:
    if present is None or present.decoder != wanted.decoder:
        ledger.append(wanted)
        say(f"rollouts decode in {_WORDS[wanted.decoder]}: {wanted.reason}")
