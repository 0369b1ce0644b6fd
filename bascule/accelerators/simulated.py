"""A chip that fails as planned: wraps a real accelerator and lets faults of the catalogue act inside its sessions.

Faults on operators act through a TorchDispatchMode, which sees forward, backward and optimizer on whatever device the base has. It
is entered before any mode that the code inside the session enters, so it lies nearer the chip: a guard's checksum mode sees what
the chip made. No mode is entered when no fault can act on the work, and then a session costs nothing.

Backward: on the CPU autograd runs in the calling thread. On other devices it runs in a device thread, into which PyTorch carries the
dispatch modes with the rest of the thread-local state (at::ThreadLocalState). Seen on the stand-in npu, whose backward has such a
thread; not yet on a CUDA chip: tests/accelerators/test_contract.py asks it of one when there is one.

Trap: everything computed inside the session counts as computed by the chip, a guard's own arithmetic included, as it would on a real
one. Three things keep a checked step and an unchecked step at the same count of calls: arithmetic faults neither strike nor count
fp64 results (most accelerators have no fp64 matrix unit), matrix-vector products, and results below `min_elements`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bascule.accelerators.base import Accelerator, ChipInfo, MemoryUse, Recorder, Role, Work
from bascule.dispatch import OperatorMode
from bascule.faults.build import build
from bascule.faults.catalogue import Profile, kinds
from bascule.faults.fault import Call, Fault, Touched

LOGGED_PER_SESSION = 16
DELICATE = (torch.float32, torch.bfloat16, torch.float16)


class SimulatedAccelerator(Accelerator):
    """`fault_log` receives one JSON line per firing: the ground truth for drills and tests, which no guard may read."""

    def __init__(
        self,
        name: str,
        base: Accelerator,
        profile: Profile,
        *,
        seed: int = 0,
        fault_log: Path | None = None,
    ) -> None:
        self.name = name
        self.base = base
        self.profile = profile
        self.device = base.device
        self.collective_backend = base.collective_backend
        self._faults = build(profile.faults, seed)
        self._log = FaultLog(fault_log)
        self._here = threading.local()

    def info(self) -> ChipInfo:
        base = self.base.info()
        return replace(
            base,
            name=f"{base.name} (simulated: {self.name.removeprefix('sim:').partition('@')[0]})",
            simulated=True,
            base=self.base.name,
        )

    def needs_operators(self, role: Role) -> bool:
        return bool(self.profile.strikes_operators(role))

    def recorder(self, role: Role) -> Recorder | None:
        """A fault that acts on operators would act while recording, and never again."""
        return None if self.needs_operators(role) else self.base.recorder(role)

    def synchronize(self) -> None:
        self.base.synchronize()
        if (session := self._session()) is not None:
            session.drag()

    def memory(self) -> MemoryUse:
        return self.base.memory()

    def free_bytes(self) -> int | None:
        return self.base.free_bytes()

    def reset_peak_memory(self) -> None:
        self.base.reset_peak_memory()

    def empty_cache(self) -> None:
        self.base.empty_cache()

    def telemetry(self) -> dict[str, float]:
        return self.base.telemetry()

    def prepare(self, threads: int) -> None:
        self.base.prepare(threads)

    @contextmanager
    def session(self, work: Work) -> Iterator[None]:
        acting = [fault for fault in self._faults if fault.may_act(work)]
        outer = self._session()
        if not acting and outer is None:
            yield
            return
        with ExitStack() as stack:
            for fault in self._faults if outer is not None else ():
                stack.callback(fault.suspend())
            inner = _Session(work, acting, self._log)
            stack.enter_context(self._becoming(inner, outer))
            inner.begin()
            if any(fault.on_calls for fault in acting):
                stack.enter_context(_FaultMode(inner))
            yield
            inner.drag()

    def _session(self) -> _Session | None:
        return getattr(self._here, "session", None)

    @contextmanager
    def _becoming(self, inner: _Session, outer: _Session | None) -> Iterator[None]:
        """The outer session sleeps while the inner one runs, so that a call is never struck twice."""
        if outer is not None:
            outer.asleep = True
        self._here.session = inner
        try:
            yield
        finally:
            self._here.session = outer
            if outer is not None:
                outer.asleep = False


class _Session:
    def __init__(self, work: Work, acting: list[Fault], log: FaultLog) -> None:
        self.work = work
        self.acting = acting
        self.asleep = False
        self._log = log
        self._clock = time.perf_counter()
        self._logged = dict.fromkeys(range(len(acting)), 0)

    def begin(self) -> None:
        for fault in self.acting:
            fault.begin(self.work)
            self.record(fault, None, -1, fault.enter(self.work))

    def drag(self) -> None:
        """Let slow faults stretch the time since the last wait."""
        seconds = time.perf_counter() - self._clock
        for fault in self.acting:
            self.record(fault, None, -1, fault.drag(self.work, seconds))
        self._clock = time.perf_counter()

    def record(self, fault: Fault, call: Call | None, index: int, touched: Touched | None) -> None:
        place = self.acting.index(fault)
        if touched is None or self._logged[place] >= LOGGED_PER_SESSION:
            return
        self._logged[place] += 1
        self._log.write(
            step=self.work.step,
            attempt=self.work.attempt,
            role=self.work.role,
            fault=fault.spec.kind,
            op=call.op if call else None,
            op_index=index,
            direction=call.direction if call else None,
            count=touched.count,
            positions=touched.positions,
            detail=touched.detail,
            more_not_logged=self._logged[place] == LOGGED_PER_SESSION,
        )


class _FaultMode(OperatorMode):
    """Strikes the calls that a fault matches; all others pass after one dictionary look-up."""

    def __init__(self, session: _Session) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._strikers = [fault for fault in session.acting if fault.on_calls]
        self._matching: dict[Any, list[Fault]] = {}
        self._session = session

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        faults = self._matching.get(func)
        if faults is None:
            faults = self._matching[func] = self._match(func)
        if not faults or self._session.asleep:
            return func(*args, **(kwargs or {}))
        return self._strike(faults, Call(_name(func), func, args, kwargs or {}, direction()))

    def _match(self, func: Any) -> list[Fault]:
        if func.is_view:
            return []
        return [fault for fault in self._strikers if fault.matches(_name(func))]

    def _strike(self, faults: list[Fault], call: Call) -> Any:
        faults = [fault for fault in faults if _concerns(fault, call)]
        for fault in faults:
            if fault.on_operands and (index := fault.fires()) is not None:
                if fault.fatal:
                    self._session.record(fault, call, index, Touched(detail="about to act"))
                touched = fault.before(call, index)
                if not fault.fatal:
                    self._session.record(fault, call, index, touched)
        result = call.run()
        first = first_tensor(result)
        if first is None and call.func._schema.is_mutable:  # type: ignore[attr-defined]  # it wrote into what it was given
            first = first_tensor(call.args)
        if first is None:
            return result
        for fault in faults:
            if fault.on_operands or not _counts(fault, first):
                continue
            index = fault.fires()
            _wait_for_collective(call, result, first)
            if index is None:
                fault.passed(call, first)
            else:
                self._session.record(fault, call, index, fault.after(call, first, index))
        return result


class FaultLog:
    """Appends firings to a file as JSON lines; None keeps no log. Opened per line: firings are rare and the process may die."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def write(self, **entry: Any) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def direction() -> str:
    """`backward` inside autograd's pass, else `forward`. A checkpointed forward that backward recomputes is forward again.

    The engine gives every backward pass a task number in its own thread; while it recomputes, gradients are enabled.
    """
    inside = torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]
    return "backward" if inside and not torch.is_grad_enabled() else "forward"


def first_tensor(result: Any) -> torch.Tensor | None:
    """The result itself, or the first tensor of a tuple or list, nested ones included (an all-reduce returns ([tensor], work))."""
    if isinstance(result, torch.Tensor):
        return result
    if isinstance(result, (tuple, list)):
        return next((found for part in result if (found := first_tensor(part)) is not None), None)
    return None


def _name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


def _concerns(fault: Fault, call: Call) -> bool:
    spec = fault.spec
    if spec.direction not in ("both", call.direction):
        return False
    if spec.input_range is None:
        return True
    operands = [part for part in call.args if isinstance(part, torch.Tensor) and part.dim() >= 2][
        -2:
    ]
    size = 1.0
    for operand in operands:
        size *= float(operand.abs().mean())
    return spec.input_range[0] <= size <= spec.input_range[1]


def _counts(fault: Fault, result: torch.Tensor) -> bool:
    if result.numel() < fault.spec.min_elements:
        return False
    columns = fault.spec.last_dim
    if columns and not (result.dim() and columns[0] <= result.shape[-1] <= columns[1]):
        return False
    family = kinds()[fault.spec.kind].family
    if family == "arithmetic" and "matmul" in fault.spec.ops and result.shape[-1:] == (1,):
        return False  # a matrix-vector product in the shape of a matrix product
    return family not in ("arithmetic", "collective") or result.dtype in DELICATE


def _wait_for_collective(call: Call, result: Any, first: torch.Tensor) -> None:
    """A collective returns before the sum is there; spoiling it must wait."""
    namespace = call.func.namespace  # type: ignore[attr-defined]
    if namespace == "c10d" and hasattr(result[-1], "wait"):
        result[-1].wait()
    elif namespace == "_c10d_functional":
        torch.ops._c10d_functional.wait_tensor(first)
