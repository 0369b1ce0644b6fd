"""What the guard reads of a training step, and what it asks of who computes it: train's Proposal and Stepper fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from bascule.accelerators.base import Accelerator
from bascule.config.training import Precision

FIRST_REPLAY = 8
"""Attempt number of the first replay: beyond the loop's own retries of a step, so that no two computations share a number."""


class StepBatch(Protocol):
    @property
    def step(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def tensors(self) -> dict[str, Tensor]: ...


class StepProposal(Protocol):
    """What the guard reads of train's Proposal."""

    @property
    def step(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def batch(self) -> Any: ...
    @property
    def loss(self) -> float: ...
    @property
    def grad_norm(self) -> float: ...
    @property
    def tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def grads(self) -> dict[str, Tensor]: ...
    @property
    def expert_loads(self) -> Tensor | None: ...
    @property
    def metrics(self) -> dict[str, float]: ...
    @property
    def attempt(self) -> int: ...
    @property
    def layer_grad_norms(self) -> Mapping[str, float]: ...
    @property
    def played(self) -> bool: ...
    @property
    def unlike(self) -> str: ...


class Recomputer(Protocol):
    """What the guard asks of train's Stepper: the same weights (or older ones, given by name, on another chip), any batch, any chip,
    nothing changed. `rehearse` gives the
    weights by name that committing a proposal would leave, worked out on the given chip; `reach` how far it can move each at most
    (2-norm, share of the parameter's own length); `kept` the live tensors beside the parameters that only a commit changes."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def precision(self) -> Precision: ...

    def recompute(
        self,
        batch: Any,
        accelerator: Accelerator | None = None,
        attempt: int = 0,
        watch: Callable[[int, str, Any], AbstractContextManager[None]] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Any: ...

    def rehearse(self, proposal: Any, accelerator: Accelerator) -> Mapping[str, Tensor]: ...

    def reach(self, proposal: Any) -> Mapping[str, tuple[float, float]]: ...

    def kept(self) -> Mapping[str, Tensor]: ...
