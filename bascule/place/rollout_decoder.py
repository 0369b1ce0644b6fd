"""How the rollout engines of a run decode: one compiled call a step (infer/decoder.py), or torch's operators. No torch.

The two differ in the last bits, and after a fallback a run must end in the bits of the undisturbed one, so all pools of a run share one
answer, a function of the recipe alone. Faults of inference act on operators: where a pool simulates one, all pools decode in operators.
"""

from __future__ import annotations

from bascule.config.recipe import Recipe
from bascule.errors import UsageError
from bascule.faults.catalogue import open_profile
from bascule.records import RolloutDecoder


def decided(recipe: Recipe) -> RolloutDecoder:
    """Raises UsageError where the recipe asks for compiled steps that would hide a fault it simulates."""
    asked, faults = recipe.train.rollout_decoder, _faults(recipe)
    if asked == "operators":
        return RolloutDecoder(decoder="operators", reason="the recipe asks for torch's operators")
    if faults and asked == "compiled":
        raise UsageError(
            f"train.rollout_decoder=compiled was asked for, and {faults[0]}: compiled steps would hide it. Use auto or operators."
        )
    if faults:
        return RolloutDecoder(decoder="operators", reason=f"{faults[0]}, which compiled steps would hide")  # fmt: skip
    why = "the recipe asks for it" if asked == "compiled" else "no pool simulates a fault that acts on operators in inference"  # fmt: skip
    return RolloutDecoder(decoder="compiled", reason=f"on CPU pools; {why}")


def _faults(recipe: Recipe) -> list[str]:
    """Of every chip that a pool may open: which of two opens is known only then, and the answer must not depend on it."""
    found = []
    for pool in recipe.order:
        for choice in recipe.pools[pool].accelerator.split("|"):
            kind, _, rest = choice.strip().partition(":")
            if kind == "sim":
                struck = open_profile(rest.partition("@")[0]).strikes_operators("infer")
                found += [f"pool '{pool}' simulates {spec.kind} in inference" for spec in struck]
    return found
