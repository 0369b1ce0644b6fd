"""What an accelerator may be called; opening it is the registry's. No torch: a recipe's names are checked before anything is measured."""

from __future__ import annotations

from bascule.errors import RecipeError, nearest
from bascule.faults.catalogue import open_profile, profiles

CHIPS = ("cpu", "cuda", "npu")
"""The registry opens these."""


def known() -> list[str]:
    """Every name without device numbers, severities and knobs."""
    return [*CHIPS, *(f"sim:{profile}" for profile in profiles())]


def check_choices(name: str) -> list[str]:
    """The choices of `a|b`, each of which could be opened on some machine. Raises RecipeError."""
    choices = [choice.strip() for choice in name.split("|")]
    for choice in choices:
        check_name(choice)
    return choices


def check_name(name: str) -> None:
    """Raise RecipeError unless `name` (one choice, no `|`) could be opened on some machine."""
    kind, colon, rest = name.partition(":")
    if kind == "sim" and colon:
        plant, base = parse_simulated(name)
        open_profile(plant)
        if base.partition(":")[0] == "sim":
            raise RecipeError(
                f"'{name}': a simulated chip cannot be the base of another. Use one of {', '.join(CHIPS)} after '@'."
            )
        check_name(base)
    elif kind not in CHIPS or (colon and not rest.isdigit()) or (colon and kind == "cpu"):
        raise RecipeError(
            f"'{name}' is not an accelerator; allowed: cpu, cuda, cuda:N, npu, npu:N, sim:PROFILE[@BASE].{nearest(name, known())}"
        )


def parse_simulated(name: str) -> tuple[str, str]:
    """`sim:ascend-r2:high?onset_step=40@cpu` -> ('ascend-r2:high?onset_step=40', 'cpu')."""
    plant, _, base = name.removeprefix("sim:").partition("@")
    return plant, base or "cpu"


def device_of(name: str) -> str:
    """The kind of device behind an open chip's name: `sim:ascend-r2@cuda:1` -> 'cuda'."""
    base = parse_simulated(name)[1] if name.startswith("sim:") else name
    return base.partition(":")[0]
