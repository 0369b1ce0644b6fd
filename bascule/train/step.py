"""One optimizer step as a transaction: propose, be judged, commit or discard (DESIGN section 2.2).

`propose` works out gradients and changes nothing, so there is nothing to undo and asking again is a replay. `commit` clips,
applies the optimizer and balances the router. The judge is handed in; this room knows it only as the Protocol below.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from bascule.accelerators.base import Accelerator, Role, Work
from bascule.config.training import Precision
from bascule.errors import SnapshotError
from bascule.model import seats
from bascule.model.precision import computing
from bascule.model.transformer import Transformer
from bascule.train.gradients import Computed, Told, by_layer, forward, forward_backward, told
from bascule.train.objective import Batch, Objective, counted_logprobs
from bascule.train.optimizer import SplitOptimizer
from bascule.train.recorded import RecordedSteps
from bascule.train.state import StateDict

Watch = Callable[[int, str, Transformer], AbstractContextManager[None]]


@dataclass(frozen=True)
class Proposal:
    """What a step would do. `grads` are the chip's own, unclipped, by parameter name; empty when the batch is empty.
    `layer_grad_norms`: their 2-norm by layer, in the order of the model. `played`: from a recording (recorded.py);
    `unlike`: what the recording would have made otherwise of this step, which went operator by operator."""

    step: int
    phase: str
    batch: Batch
    loss: float
    grad_norm: float
    tokens: int
    seconds: float
    grads: dict[str, Tensor]
    expert_loads: Tensor | None
    metrics: dict[str, float]
    learning_rate: float
    attempt: int = 0
    layer_grad_norms: Mapping[str, float] = field(default_factory=dict)
    played: bool = False
    unlike: str = ""


class Judge(Protocol):
    """Decides whether a step may change the weights."""

    def watch(self, step: int, phase: str, model: Transformer) -> AbstractContextManager[None]:
        """Entered around forward and backward, inside the accelerator's session: it sees what the chip really returned.

        Entered once more, with phase `commit`, around the update of an accepted step.
        """
        ...

    def looks(self, step: int) -> bool:
        """Does it look at the operators or parts of this step? Then none may be played back from a recording."""
        ...

    def judge(self, proposal: Proposal, stepper: Stepper) -> bool:
        """May this step commit? Raises ChipCondemned when the chip is proven guilty."""
        ...


class NoJudge:
    """Lets everything pass: for loops without a guard."""

    def watch(self, step: int, phase: str, model: Transformer) -> AbstractContextManager[None]:
        return nullcontext()

    def looks(self, step: int) -> bool:
        return False

    def judge(self, proposal: Proposal, stepper: Stepper) -> bool:
        return True


class Stepper:
    """Owns the model, the optimizer of the present phase, and the count of committed steps.

    `model` must already live on `accelerator`. Call `begin` before the first step of every phase. `precision` is the run's, not the
    chip's: every chip that is asked for a step computes it so, the referee too, or two right ones would not agree. `recorded` plays
    proposals back where it can; what is computed again (`recompute`) always goes operator by operator, so that it holds recordings to account.
    """

    def __init__(
        self,
        model: Transformer,
        accelerator: Accelerator,
        *,
        judge: Judge | None = None,
        router_bias_speed: float = 0.0,
        precision: Precision = "fp32",
        recorded: RecordedSteps | None = None,
    ) -> None:
        self.model = model
        self.accelerator = accelerator
        self.judge: Judge = judge or NoJudge()
        self.router_bias_speed = router_bias_speed
        self.precision: Precision = precision
        self.step = 0
        self.objective: Objective | None = None
        self.optimizer: SplitOptimizer | None = None
        self._recorded = recorded
        self._replicas: dict[str, Transformer] = {}
        self._buffers: dict[str, Tensor] | None = None

    def begin(self, objective: Objective) -> None:
        """Start a phase with a fresh optimizer."""
        self.objective = objective
        if self._recorded is not None:
            self._recorded.clear()
        self.optimizer = (
            None  # or the old one's moments would stand beside the new one's on the chip
        )
        self.optimizer = objective.new_optimizer(self.model)

    def propose(self, batch: Batch, *, attempt: int = 0) -> Proposal:
        """Gradients of `batch` at the present weights, on this chip, with the judge watching. Changes nothing."""
        return self._compute(batch, self.model, self.accelerator, attempt, self.judge.watch, self._recorded)  # fmt: skip

    def recompute(
        self,
        batch: Batch,
        accelerator: Accelerator | None = None,
        attempt: int = 0,
        watch: Watch | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Proposal:
        """The same step again: here, or on a copy of the present weights on another chip; with `weights` (by name, as `model_state`
        gives them) on a copy of those instead. Changes nothing. Raises ValueError for `weights` on this chip, which has no copy.

        The judge does not watch unless `watch` is given (it is usually the judge who asks).
        """
        if accelerator is None or accelerator is self.accelerator:
            if weights is not None:
                raise ValueError(
                    "Other weights were asked on the chip that trains; only another chip holds a copy."
                )
            return self._compute(batch, self.model, self.accelerator, attempt, watch)
        replica = self._replica(accelerator, weights)
        return self._compute(batch, replica, accelerator, attempt, watch)

    @torch.no_grad()
    def commit(self, proposal: Proposal) -> None:
        """Clip, apply the optimizer, balance the router, count the step. Raises ValueError for a step out of turn."""
        if proposal.step != self.step + 1:
            raise ValueError(
                f"Commit of step {proposal.step} was asked after step {self.step}; only step {self.step + 1} may follow."
            )
        objective, optimizer = self._phase(proposal.phase)
        if proposal.grads:
            factor, _ = objective.learning_rate(proposal.step)
            clip = min(1.0, objective.clip_grad_norm / (proposal.grad_norm + 1e-6))
            work = Work("train", proposal.step, proposal.attempt)
            with (
                self.accelerator.session(work),
                self.judge.watch(proposal.step, "commit", self.model),
            ):
                optimizer.step(proposal.grads, factor=factor, grad_scale=clip)
                if proposal.expert_loads is not None and self.router_bias_speed:
                    self.model.update_router_bias(proposal.expert_loads, self.router_bias_speed)
        self.step = proposal.step

    def reach(self, proposal: Proposal) -> dict[str, tuple[float, float]]:
        """How far `commit` can move each parameter at most, whatever the gradients (optimizer.reach)."""
        objective, optimizer = self._phase(proposal.phase)
        return optimizer.reach(objective.learning_rate(proposal.step)[0])

    def kept(self) -> dict[str, Tensor]:
        """What only `commit` writes to, beside the parameters: the live moments of the optimizer, and the router biases."""
        if self._buffers is None:
            persistent = self.model.state_dict(keep_vars=True)
            self._buffers = {n: b for n, b in self.model.named_buffers() if n in persistent}
        return {**self._buffers, **(self.optimizer.moments() if self.optimizer else {})}

    def rehearse(self, proposal: Proposal, accelerator: Accelerator) -> StateDict:
        """The weights and router biases that `commit` would leave, worked out on a copy on another chip. Changes nothing.

        The tensors are that copy's own: the next `rehearse` or `recompute` there overwrites them.
        """
        objective, optimizer = self._phase(proposal.phase)
        twin = Stepper(
            self._replica(accelerator), accelerator, router_bias_speed=self.router_bias_speed
        )
        twin.begin(objective)
        twin._phase(proposal.phase)[1].load_state_dict(optimizer.state_dict())
        twin.step = self.step
        loads = proposal.expert_loads
        grads = accelerator.to_device(proposal.grads)
        twin.commit(
            replace(
                proposal,
                grads=grads,
                expert_loads=None if loads is None else accelerator.to_device(loads),
            )
        )
        return twin.model_state()

    def discard(self, proposal: Proposal) -> None:
        """Drop a proposal. Nothing was changed, so nothing is put back; the gradients are freed."""
        proposal.grads.clear()

    def skip(self, step: int) -> None:
        """Count `step` as done without learning from it (a batch that the judge refuses for good)."""
        if step != self.step + 1:
            raise ValueError(f"Skip of step {step} was asked after step {self.step}.")
        self.step = step

    def score(
        self,
        tensors: Mapping[str, Tensor],
        step: int,
        temperature: float = 1.0,
        *,
        role: Role = "train",
    ) -> Tensor:
        """Log-probabilities of the targets that count under the present weights, (B,T) on the CPU: GRPO's old policy.

        Same shapes and kernels as the step that will learn from these tensors, so on a sound chip the first minibatch's
        policy ratio is exactly 1. The judge watches: what is scored here becomes data, and no replay of the batch would
        question it.
        """
        with (
            self.accelerator.session(Work(role, step)),
            torch.no_grad(),
            self.judge.watch(step, "score", self.model),
        ):
            names = ("tokens", "targets", "real", "mask", "documents", "routes", *seats.NAMES)
            placed = self.accelerator.to_device({n: tensors[n] for n in names if n in tensors})
            with computing(self.precision, self.accelerator.device):
                output = forward(self.model, placed)
            return counted_logprobs(output, placed, temperature).cpu()

    def model_state(self) -> StateDict:
        """Parameters and persistent buffers by name, tied weights once; the live tensors, not copies."""
        persistent = self.model.state_dict(keep_vars=True)
        names = dict(self.model.named_parameters())
        return {
            **names,
            **{name: b for name, b in self.model.named_buffers() if name in persistent},
        }

    @torch.no_grad()
    def load(
        self,
        step: int,
        model: StateDict,
        optimizer: StateDict,
        objective_state: StateDict | None,
        objective: Objective,
    ) -> None:
        """Put everything back as a snapshot had it, bit for bit, on whatever chip this stepper uses. Without an `objective_state` the
        objective keeps its own."""
        mine = self.model_state()
        if set(mine) != set(model):
            odd = sorted(set(mine) ^ set(model))
            raise SnapshotError(
                f"The snapshot holds another model: {len(odd)} names differ, first '{odd[0]}'. Use the recipe that saved it."
            )
        for name, tensor in mine.items():
            if tensor.shape != model[name].shape:
                raise SnapshotError(
                    f"The snapshot's '{name}' has shape {tuple(model[name].shape)}, this model's {tuple(tensor.shape)}."
                )
            tensor.copy_(model[name])
        self.begin(objective)
        self._phase(objective.phase)[1].load_state_dict(optimizer)
        if objective_state is not None:
            objective.load_state_dict(objective_state)
        self.step = step

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Weights, optimizer, phase and count are put back after the block, bit for bit, and no judge watches it: for steps that are
        not part of the run. The copies lie in host memory."""
        objective, optimizer = self.objective, self.optimizer
        if objective is None or optimizer is None:
            raise ValueError("A step aside was asked before the first phase began.")
        weights, moments = _on_host(self.model_state()), _on_host(optimizer.state_dict())
        step, judge = self.step, self.judge
        del optimizer
        self.judge = NoJudge()
        try:
            yield
        finally:
            self.judge = judge
            self.load(step, weights, moments, None, objective)

    def _phase(self, phase: str) -> tuple[Objective, SplitOptimizer]:
        if self.objective is None or self.optimizer is None or self.objective.phase != phase:
            raise ValueError(f"A step of phase '{phase}' came before begin() of that phase.")
        return self.objective, self.optimizer

    def _replica(
        self, accelerator: Accelerator, weights: Mapping[str, Tensor] | None = None
    ) -> Transformer:
        """This model on `accelerator` with the present weights or those given; the copy is kept, its weights are refreshed at every
        call."""
        replica = self._replicas.get(accelerator.name)
        if replica is None:
            replica = accelerator.move(copy.deepcopy(self.model))
            self._replicas[accelerator.name] = replica
        replica.load_state_dict(self.model.state_dict())
        if weights is not None:
            # A snapshot names tied weights once, which load_state_dict would call incomplete.
            odd = replica.load_state_dict(dict(weights), strict=False).unexpected_keys
            if odd:
                raise SnapshotError(
                    f"The weights given hold '{odd[0]}', which this model lacks. Use those of a snapshot of this run."
                )
        return replica

    def _compute(
        self,
        batch: Batch,
        model: Transformer,
        accelerator: Accelerator,
        attempt: int,
        watch: Watch | None,
        recorded: RecordedSteps | None = None,
    ) -> Proposal:
        objective, _ = self._phase(batch.phase)
        _, rate = objective.learning_rate(batch.step)
        if batch.empty:
            return Proposal(
                batch.step,
                batch.phase,
                batch,
                0.0,
                0.0,
                0,
                0.0,
                {},
                None,
                dict(batch.notes),
                rate,
                attempt,
            )
        watching = watch(batch.step, batch.phase, model) if watch else nullcontext()
        looks = self.judge.looks(batch.step)
        with accelerator.session(Work("train", batch.step, attempt)), watching:
            tensors = accelerator.to_device(batch.tensors)

            def compute(tensors: dict[str, Tensor]) -> Computed:
                return forward_backward(model, objective, tensors, self.precision)

            def work() -> tuple[Computed, bool, str, Told]:
                made = recorded.play(tensors) if recorded and not looks else None
                computed = made or compute(tensors)
                unlike = recorded.held(tensors, computed) if recorded and looks else ""
                return computed, made is not None, unlike, told(computed)

            (computed, played, unlike, (loss, metrics, norms)), seconds = accelerator.timed(work)
            if recorded and not looks and not played:
                recorded.met(tensors, computed, compute)
        return Proposal(
            step=batch.step,
            phase=batch.phase,
            batch=batch,
            loss=loss,
            grad_norm=metrics.pop("grad_norm"),
            tokens=int(batch.tensors["mask"].sum()),
            seconds=seconds,
            grads=computed.grads,
            expert_loads=computed.expert_loads,
            metrics={**batch.notes, **metrics},
            learning_rate=rate,
            attempt=attempt,
            layer_grad_norms=by_layer(computed.grads, norms),
            played=played,
            unlike=unlike,
        )


def _on_host(state: StateDict) -> StateDict:
    return {
        name: value.detach().to("cpu", copy=True)
        if isinstance(value, Tensor)
        else copy.deepcopy(value)
        for name, value in state.items()
    }
