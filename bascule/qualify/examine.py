"""Put the battery to one chip, in this process. The child process runs this; tests and examples call `qualify` directly."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bascule.accelerators.base import Accelerator
from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.errors import OperatorMissing
from bascule.qualify.check import BOTH, Ask, asks
from bascule.qualify.context import CheckContext, ChipFailed, describe, dtype_name
from bascule.qualify.disk import is_unwritable
from bascule.qualify.judge import Examined, model_sha256, verdicts
from bascule.qualify.shortened import shortened, what_is_examined
from bascule.qualify.workload import Workload
from bascule.records import Evidence, Role, Verdict


def qualify(
    accelerator: Accelerator,
    model: ModelConfig,
    *,
    quick: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    only: Sequence[str] = (),
    roles: Sequence[Role] = BOTH,
    workdir: Path | None = None,
    on_evidence: Callable[[Evidence], None] | None = None,
) -> tuple[list[Evidence], list[Verdict]]:
    """Examine `accelerator` for `model` and judge it. A crash or hang takes this process along: `battery.run_battery` does not.

    Verdicts of a partial battery (`only`, `roles`) are at best `unproven`.
    """
    folder = workdir or Path(tempfile.mkdtemp(prefix="bascule-qualify-"))
    context = open_context(accelerator, model, quick=quick, seed=seed, dtype=dtype, workdir=folder)
    evidence: list[Evidence] = []
    for ask in asks(quick=quick, only=only, roles=roles):
        for item in put(context, ask):
            evidence.append(item)
            if on_evidence:
                on_evidence(item)
    known = examined(accelerator, model, dtype, quick=quick)
    return evidence, verdicts(evidence, known, quick=quick, roles=roles)


def open_context(
    accelerator: Accelerator,
    model: ModelConfig,
    *,
    quick: bool,
    seed: int,
    dtype: torch.dtype = torch.float32,
    workdir: Path,
) -> CheckContext:
    referee = open_accelerator("cpu")
    return CheckContext(
        accelerator=accelerator,
        referee=referee,
        model_config=model,
        quick=quick,
        seed=seed,
        workdir=workdir,
        workload=Workload(shortened(model) if quick else model, seed, dtype),
    )


def put(context: CheckContext, ask: Ask) -> list[Evidence]:
    """Ask one question. What the chip raised is evidence against it, what we raised leaves the question open. Raises only the OSError of a
    disk that takes no more: later questions would meet it too."""
    context.asked(ask)
    started_s = time.perf_counter()
    try:
        found = ask.check.function()(context)
    except ChipFailed as failure:
        found = [context.errored(_blame(failure))]
    except OSError as error:
        if is_unwritable(error):
            raise
        found = [context.skipped(f"the check itself failed: {describe(error)}")]
    except Exception as error:  # a bug or limit of the check itself must not condemn a chip, and must not be lost either
        found = [context.skipped(f"the check itself failed: {describe(error)}")]
    seconds = (time.perf_counter() - started_s) / max(len(found), 1)
    return [item.model_copy(update={"seconds": seconds}) for item in found]


def examined(
    accelerator: Accelerator,
    model: ModelConfig,
    dtype: torch.dtype = torch.float32,
    *,
    quick: bool = True,
) -> Examined:
    info = accelerator.info()
    return Examined(
        accelerator=accelerator.name,
        chip=info.name,
        driver=info.driver,
        simulated=info.simulated,
        model_sha256=model_sha256(model, dtype_name(dtype)),
        part=what_is_examined(model) if quick else None,
    )


def _blame(failure: ChipFailed) -> str:
    cause = failure.__cause__
    if isinstance(cause, (OperatorMissing, NotImplementedError)):
        return f"an operator is missing: {describe(cause)}"
    if isinstance(cause, (torch.OutOfMemoryError, MemoryError)):
        return f"out of memory: {describe(cause)}"
    return f"the chip raised {failure}"
