"""The seam to a chip: what the rest of bascule may ask of any accelerator, real or simulated.

Everything a chip computes happens inside `session(work)`. On a real chip that is a plain block; on a simulated one it is where
faults act, and `work` is what makes them reproducible: the same work on the same chip meets the same faults.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeVar, overload

import torch

Result = TypeVar("Result")
AnyModule = TypeVar("AnyModule", bound=torch.nn.Module)
Role = Literal["train", "infer"]
Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs what it is given, records what that queues on the chip, and returns what plays the recording: the same operators on the same memory.
Raises RuntimeError where an operator cannot be recorded."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a session is for. `step`: optimizer step or request number, from 1. `attempt`: 0 first try, 1.. replays of it."""

    role: Role
    step: int = 0
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class ChipInfo:
    """`base` is the name of the accelerator that a simulated one wraps, None on real chips."""

    vendor: str
    name: str
    driver: str
    memory_bytes: int | None
    simulated: bool
    base: str | None


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """`peak_bytes` since the last `reset_peak_memory`. None where the chip does not tell."""

    allocated_bytes: int | None
    peak_bytes: int | None
    total_bytes: int | None


class Accelerator(ABC):
    """One opened chip. `name` is what the owner asked for; `device` is where tensors live.

    `fallback_note` says what `a|b` skipped and why; the caller must pass it on as a warning (nothing falls back silently).
    """

    name: str
    device: torch.device
    collective_backend: str
    fallback_note: str | None = None

    @abstractmethod
    def info(self) -> ChipInfo: ...

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until everything queued on the chip is done."""

    @abstractmethod
    def memory(self) -> MemoryUse: ...

    @abstractmethod
    def reset_peak_memory(self) -> None: ...

    def free_bytes(self) -> int | None:
        """Memory of the chip that nobody holds, None where that cannot be said. What an allocator keeps for later is held."""
        return None

    @abstractmethod
    def empty_cache(self) -> None: ...

    def needs_operators(self, role: Role) -> bool:
        """Must `role` be computed in torch's operators, because a simulated fault acts on them? On a real chip never."""
        return False

    def recorder(self, role: Role) -> Recorder | None:
        """What records work of this role on this chip (CUDA graphs and their like); None where there is no such thing."""
        return None

    def telemetry(self) -> dict[str, float]:
        """`power_w` and `temperature_c` where they can be read; an empty dict elsewhere. Never raises."""
        return {}

    def session(self, work: Work) -> AbstractContextManager[None]:
        """The block in which `work` is computed. Sessions may nest; the innermost one counts."""
        return nullcontext()

    def timed(self, fn: Callable[[], Result]) -> tuple[Result, float]:
        """Run `fn` between two waits for the chip and return its result and the seconds it took."""
        self.synchronize()
        start = time.perf_counter()
        result = fn()
        self.synchronize()
        return result, time.perf_counter() - start

    def prepare(self, threads: int) -> None:
        """Set what bit-equality needs, process-wide: thread count, deterministic kernels, full fp32 matmuls.

        Uninitialised memory is left alone (torch would fill every `empty` with NaN): nothing here reads it.
        """
        torch.set_num_threads(threads)
        # As use_deterministic_algorithms(True), without its import of the compiler, which takes a worker's start two seconds.
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.set_float32_matmul_precision("highest")

    def move(self, module: AnyModule) -> AnyModule:
        """Move `module` here in place, keeping tied weights tied.

        Trap: on a private-use device `Module.to` gives every name its own copy, so an embedding and a head that shared one
        weight train apart from the second step on. Hence the names are noted before and tied again after.
        """
        shared = _shared_parameters(module)
        module.to(self.device)
        for first, *others in shared:
            parameter = module.get_parameter(first)
            for other in others:
                owner, _, leaf = other.rpartition(".")
                setattr(module.get_submodule(owner), leaf, parameter)
        return module

    @overload
    def to_device(self, values: torch.Tensor) -> torch.Tensor: ...

    @overload
    def to_device(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...

    def to_device(
        self, values: torch.Tensor | Mapping[str, torch.Tensor]
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        if isinstance(values, torch.Tensor):
            return values.to(self.device)
        return {name: tensor.to(self.device) for name, tensor in values.items()}


def _shared_parameters(module: torch.nn.Module) -> list[list[str]]:
    """Groups of names that are one parameter, for instance [['embed.weight', 'head.weight']]."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]
