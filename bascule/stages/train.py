"""The training stage, supervisor's side: launch, and on a setback decide and launch again. No torch.

`launch.py` starts the workers, watches them and reads why they ended; `setback.py` says what follows.
"""

from __future__ import annotations

from collections.abc import Callable

from bascule.config.recipe import Recipe
from bascule.errors import Preempted
from bascule.folder import RunFolder
from bascule.ledger import Ledger
from bascule.stages.launch import Launcher
from bascule.stages.place import place_roles
from bascule.stages.reexamine import Reexamination
from bascule.stages.setback import Setbacks


def train(
    recipe: Recipe, folder: RunFolder, ledger: Ledger, *, should_stop: Callable[[], bool]
) -> None:
    """Train to the end, over as many launches and pools as it takes. Raises the error that ends the run."""

    def check_stop() -> None:
        if should_stop():
            raise Preempted(
                "Stopped on request, after what had just happened was settled. Run the same command again to go on."
            )

    setbacks = Setbacks(recipe, folder, ledger, should_stop)
    start = setbacks.settle_unfinished()
    reexamination = Reexamination(recipe, folder, ledger, check_stop)
    launcher = Launcher(recipe, folder, ledger, should_stop, reexamination)
    try:
        while (ending := launcher.launch(place_roles(recipe, ledger), start)).error is not None:
            assert launcher.placement is not None
            start = setbacks.react(launcher.placement, ending)
            check_stop()
    finally:
        reexamination.close()
