"""Does the chip have every operator this model calls, with these shapes, strides and types, and does it run them itself?

Each traced call is played on the chip: an operator that is missing, one that raises, and one that the runtime quietly sends to the
host are told apart; each is weighted by its calls and by the time those take on the reference. After that the whole step runs once, because a call alone may be dispatched otherwise than inside autograd.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bascule.errors import DeviceFault, OperatorMissing
from bascule.qualify import reproduce, workload
from bascule.qualify.context import CheckContext, Measured, describe
from bascule.qualify.hold import CPU, Miss
from bascule.qualify.trace import Call
from bascule.records import Evidence

# What PyTorch, torch_npu and others say when they send an operator to the host.
_FELL_BACK = re.compile(
    r"fall(s|ing|en)?[\s_-]*back.*\bcpu\b|\bcpu\b.*fall(s|ing|en)?[\s_-]*back",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class _Trouble:
    """`kind`: missing, raised or host. `words`: what was said."""

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
    clusters = [group for group in _clusters(troubles) if group[0].kind != "host"]
    times = _times(calls) if clusters else {}
    findings = [_finding(context, group, calls, times) for group in clusters]
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
        for place, (call, inputs) in enumerate(placed):
            context.progress(place, len(placed))
            try:
                call.run(device, moved=inputs)
            except (OperatorMissing, NotImplementedError) as error:
                troubles.append(_Trouble(call, "missing", describe(error)))
            except (RuntimeError, DeviceFault) as error:
                troubles.append(_Trouble(call, "raised", describe(error)))
            told = next((str(w.message) for w in said if _FELL_BACK.search(str(w.message))), None)
            if told or not has_own_kernel(call.op, device.type):
                troubles.append(
                    _Trouble(call, "host", told or "no kernel is registered for this device")
                )
            said.clear()
    return [
        trouble for trouble in troubles if trouble.kind != "raised" or _reference_runs(trouble.call)
    ]


def has_own_kernel(op: Any, device_type: str) -> bool:
    """Does the dispatcher hold a kernel for this device, or one for all? Without either, what ran was the back end's fallback, which
    sends the call to the host. (A private table of PyTorch's: there is no public way to ask.)"""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type, "PrivateUse1")
    name = op._schema.name + (f".{op._schema.overload_name}" if op._schema.overload_name else "")
    keys = (key, "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, one) for one in keys)


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
    """One group per root cause: the same words once names and numbers are taken out of them, whatever the operator."""
    groups: dict[tuple[str, str], list[_Trouble]] = {}
    for trouble in troubles:
        cause = re.sub(r"aten::\w+|\d+", "*", trouble.words.replace(trouble.call.base_name, "*"))
        groups.setdefault((trouble.kind, cause), []).append(trouble)
    return list(groups.values())


def _finding(
    context: CheckContext, group: list[_Trouble], calls: Sequence[Call], times: dict[str, float]
) -> Evidence:
    """`times`: seconds of the reference by operator."""
    first = group[0]
    names = list(dict.fromkeys(trouble.call.name for trouble in group))
    verb = {"missing": "missing", "raised": "raised"}[first.kind]
    share = _calls(trouble.call for trouble in group) / max(1, _calls(calls))
    time_share = sum(times[name] for name in names) / max(sum(times.values()), 1e-12)
    measured: Measured = {
        "operator": first.call.name,
        "operators": len(names),
        "signature": first.call.signature,
        "calls": _calls(trouble.call for trouble in group),
        "share_of_calls": share,
        "share_of_reference_time": time_share,
    }
    what = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    smallest = min(
        (trouble.call for trouble in group), key=lambda call: sum(t.numel() for t in call.tensors())
    )
    script = reproduce.operator_script(
        context, Miss(smallest, 0, f"{verb}: {first.words}", None, None)
    )
    return context.failed(
        f"{what} {verb}, {len(group)} signatures, {share:.1%} of calls, {time_share:.1%} of the reference's time: {first.words}",
        measured,
        script=script,
    )


def _calls(calls: Iterable[Call]) -> int:
    return sum(call.count for call in calls)


def _times(calls: Sequence[Call]) -> dict[str, float]:
    """Seconds that the reference spends by operator, all its calls together; those that it refuses count nothing."""
    spent: dict[str, float] = {}
    with torch.no_grad():
        for call in calls:
            spent.setdefault(call.name, 0.0)
            placed = call.place(CPU)
            began_s = time.perf_counter()
            try:
                call.run(CPU, moved=placed)
            except (RuntimeError, TypeError):
                continue
            spent[call.name] += call.count * (time.perf_counter() - began_s)
    return spent


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
