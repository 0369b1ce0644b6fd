"""`bascule compare-runs A... --against B...`: did two groups of training runs learn the same?"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from bascule.errors import UsageError
from bascule.qualify.runs import compare_groups, read_group
from bascule.stages.answer import Answer


def main(arguments: Namespace) -> Answer:
    """Exit 0 whatever the answer, also when the comparison is refused: all four are answers."""
    if not 0 < arguments.margin < 1:
        raise UsageError(
            f"--margin {arguments.margin:g} is not a share between 0 and 1; 0.0025 means 0.25 % of the loss."
        )
    left_out: list[str] = []
    here = read_group([Path(path) for path in arguments.runs], left_out)
    there = read_group([Path(path) for path in arguments.against], left_out)
    found = compare_groups(here, there, margin=arguments.margin)
    notes = [f"left out, without a loss in it: {', '.join(left_out)}"] if left_out else []
    return Answer(
        text="\n".join([found.sentence(), *notes]), data={**found.data(), "left_out": left_out}
    )
