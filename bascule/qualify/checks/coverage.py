"""Does the chip have every operator this model calls, with these shapes, strides and types, and does it run them itself?

Each traced call is played on the chip: an operator that is missing, one that raises, and one that the runtime quietly sends to the
host are told apart. After that the whole step runs once, because a call alone may be dispatched otherwise than inside autograd.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bascule.errors import DeviceFault, OperatorMissing
from bascule.qualify import workload
from bascule.qualify.context import CheckContext, Measured, describe
from bascule.qualify.hold import CPU
from bascule.qualify.trace import Call
from bascule.records import Evidence

# What PyTorch, torch_npu and others say when they send an operator to the host.
_FELL_BACK = re.compile(
    r"fall(s|ing|en)?[\s_-]*back.*\bcpu\b|\bcpu\b.*fall(s|ing|en)?[\s_-]*back",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class _Trouble:
    """`kind`: missing, raised or host."""

    call: Call
    kind: str
    words: str


def forward(context: CheckContext) -> list[Evidence]:
    return _cover(context, ("inference",) if context.role == "infer" else ("forward",))


def training(context: CheckContext) -> list[Evidence]:
    return _cover(context, ("backward", "optimizer"))


def _cover(context: CheckContext, phases: Sequence[str]) -> list[Evidence]:
    calls = context.workload.trace.of(*phases)
    troubles = _play_all(context, calls)
    whole = _whole_step(context)
    findings = [
        _finding(context, group, calls) for group in _clusters(troubles) if group[0].kind != "host"
    ]
    if whole and not findings:
        findings = [
            context.failed(
                f"every call runs by itself but the whole step does not: {whole}",
                {"operator": None},
            )
        ]
    if findings:
        return findings
    return [_all_there(context, calls, [trouble for trouble in troubles if trouble.kind == "host"])]


def _play_all(context: CheckContext, calls: Sequence[Call]) -> list[_Trouble]:
    device = context.accelerator.device
    placed = [(call, call.place(device)) for call in calls]
    troubles = []
    with context.chip(), warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        for call, inputs in placed:
            try:
                call.run(device, moved=inputs)
            except (OperatorMissing, NotImplementedError) as error:
                troubles.append(_Trouble(call, "missing", describe(error)))
            except (RuntimeError, DeviceFault) as error:
                troubles.append(_Trouble(call, "raised", describe(error)))
            if any(_FELL_BACK.search(str(warning.message)) for warning in said):
                troubles.append(_Trouble(call, "host", str(said[-1].message)))
            said.clear()
    return [
        trouble for trouble in troubles if trouble.kind != "raised" or _reference_runs(trouble.call)
    ]


def _reference_runs(call: Call) -> bool:
    """What the CPU refuses as well is a limit of our playing it, not of the chip."""
    try:
        call.run(CPU)
    except (RuntimeError, TypeError):
        return False
    return True


def _whole_step(context: CheckContext) -> str | None:
    """Run what the role runs, whole, once. What it raised, or None."""
    work = context.workload
    model = work.model_on(context.accelerator)
    batch = context.accelerator.to_device(work.batch(1))
    optimizer = work.optimizer(model)
    try:
        with context.chip():
            if context.role == "infer":
                with torch.no_grad():
                    work.prefill_and_decode(model, batch["tokens"], steps=2)
            elif context.ask and context.ask.check.name == "coverage.forward":
                workload.loss(model, batch)
            else:
                workload.train_step(model, optimizer, batch)
    except DeviceFault as error:
        return describe(error.__cause__ or error)
    return None


def _clusters(troubles: Sequence[_Trouble]) -> list[list[_Trouble]]:
    """One group per operator and kind of trouble: its signatures fail for one reason."""
    groups: dict[tuple[str, str], list[_Trouble]] = {}
    for trouble in troubles:
        groups.setdefault((trouble.call.name, trouble.kind), []).append(trouble)
    return list(groups.values())


def _finding(context: CheckContext, group: list[_Trouble], calls: Sequence[Call]) -> Evidence:
    first = group[0]
    verb = "is missing" if first.kind == "missing" else "raised"
    share = sum(trouble.call.count for trouble in group) / max(1, sum(call.count for call in calls))
    measured: Measured = {
        "operator": first.call.name,
        "signature": first.call.signature,
        "calls": sum(trouble.call.count for trouble in group),
        "share_of_calls": share,
    }
    return context.failed(
        f"{first.call.name} {verb}, {len(group)} signatures, {share:.1%} of calls: {first.words}",
        measured,
    )


def _all_there(
    context: CheckContext, calls: Sequence[Call], on_host: Sequence[_Trouble]
) -> Evidence:
    operators = {call.name for call in calls}
    measured: Measured = {
        "operators": len(operators),
        "signatures": len(calls),
        "on_host": len(on_host),
    }
    detail = f"{len(operators)} operators in {len(calls)} signatures, all on the chip"
    if on_host:
        names = sorted({trouble.call.name for trouble in on_host})
        detail = f"{len(operators)} operators, all there, but run silently on the host: {', '.join(names)} (slow, not wrong)"
    return context.passed(detail, measured)
