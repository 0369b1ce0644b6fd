"""The model under examination: its weights, its batches, its training step, its trace and its fp64 twin.

Everything is made from (config, seed) on the CPU and is the same on every machine, so a finding can be asked for again. The data
are sequences of a seeded Markov chain with a few likely successors per token: quick to learn something from, no files needed.
B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bascule import draws
from bascule.accelerators.base import Accelerator
from bascule.config.model import ModelConfig
from bascule.model import kernels, weights
from bascule.model.transformer import Transformer
from bascule.qualify.trace import Trace
from bascule.train.optimizer import SplitOptimizer
from bascule.train.state import StateDict

SUCCESSORS = 4
TRAINED_STEPS = 24
PROBE_VOCABULARY_LIMIT = (
    512  # tokens the chain uses; a larger vocabulary's other rows stay untouched
)


@dataclass(frozen=True)
class StepResult:
    """One training step's outcome, still on the device that made it."""

    loss: float
    grads: dict[str, Tensor]


class MasterOptimizer(SplitOptimizer):
    """Steps fp32 copies of half-precision weights and rounds them back, as mixed-precision training does.

    Without them an update below half a unit in the last place is lost, and AdamW's eps of 1e-8 is 0 in fp16.
    """

    def __init__(self, parameters: Mapping[str, Tensor], **settings: float) -> None:
        self.rounded = dict(parameters)
        masters = {name: value.detach().float().clone() for name, value in parameters.items()}
        super().__init__(masters, **settings)  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], *, factor: float, grad_scale: float = 1.0) -> None:
        wide = {name: grad.float() for name, grad in grads.items()}
        super().step(wide, factor=factor, grad_scale=grad_scale)
        self._round()

    def state_dict(self) -> StateDict:
        masters = {f"master/{name}": value.clone() for name, value in self.parameters.items()}
        return super().state_dict() | masters

    @torch.no_grad()
    def load_state_dict(self, state: StateDict) -> None:
        super().load_state_dict(state)
        for name, value in self.parameters.items():
            value.copy_(state[f"master/{name}"])
        self._round()

    def _round(self) -> None:
        for name, value in self.rounded.items():
            value.copy_(self.parameters[name])


class Workload:
    """One model configuration with one seed and one type. `rows` x `tokens` is a batch; small, so that a check takes seconds."""

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        dtype: torch.dtype = torch.float32,
        *,
        rows: int = 8,
        tokens: int = 48,
    ) -> None:
        self.config = config
        self.seed = seed
        self.dtype = dtype
        self.rows = rows
        self.tokens = min(tokens, config.max_position_embeddings - 1)

    def new_model(self, *, seed: int | None = None) -> Transformer:
        """A freshly initialised model of `dtype` on the CPU; the same weights on every call."""
        model = Transformer(self.config)
        weights.initialise(model, self.seed if seed is None else seed)
        return model.to(self.dtype)

    def new_twin(self) -> Transformer:
        """The same weights, rounded to `dtype`, held in fp64. (Its router and rotary tables stay fp32, as in the model.)"""
        return self.new_model().to(torch.float64)

    @cached_property
    def trained(self) -> Transformer:
        """A model trained a little on the CPU, so that its choices are choices and not ties. Nobody may change its weights."""
        model = self.new_model()
        optimizer = self.optimizer(model)
        for step in range(1, TRAINED_STEPS + 1):
            train_step(model, optimizer, self.batch(step))
        return model

    def model_on(self, accelerator: Accelerator, *, seed: int | None = None) -> Transformer:
        return accelerator.move(self.new_model(seed=seed))

    def optimizer(self, model: Transformer) -> SplitOptimizer:
        """The optimizer of a run's SFT phase (Muon and AdamW), so that its operators are examined too."""
        kind = SplitOptimizer if self.dtype == torch.float32 else MasterOptimizer
        return kind(dict(model.named_parameters()), learning_rate=3e-3, muon_learning_rate=0.02)

    def batch(self, step: int, *, seed: int | None = None) -> dict[str, Tensor]:
        """`tokens` and `targets` (B,T) int64 of one step, on the CPU."""
        chain = self._chain
        key = draws.key(self.seed if seed is None else seed, "qualify.batch", step)
        pick = draws.integers(
            key, SUCCESSORS * (SUCCESSORS + 1) // 2, self.rows * (self.tokens + 1)
        )
        choice_BT = np.searchsorted(_TRIANGLE, pick, side="right").reshape(self.rows, -1)
        sequence_BT = np.empty((self.rows, self.tokens + 1), dtype=np.int64)
        sequence_BT[:, 0] = choice_BT[:, 0]
        for t in range(1, self.tokens + 1):
            sequence_BT[:, t] = chain[sequence_BT[:, t - 1], choice_BT[:, t]]
        return {
            "tokens": torch.from_numpy(sequence_BT[:, :-1].copy()),
            "targets": torch.from_numpy(sequence_BT[:, 1:].copy()),
        }

    def follows(self, tokens: Sequence[int]) -> bool:
        """Is every token one of the chain's successors of the token before it? An exact verifier of what the model generates."""
        size = len(self._chain)
        return all(
            before < size and after in self._chain[before]
            for before, after in zip(tokens, tokens[1:], strict=False)
        )

    @cached_property
    def _chain(self) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        size = min(self.config.vocab_size, PROBE_VOCABULARY_LIMIT)
        key = draws.key(self.seed, "qualify.chain")
        return draws.integers(key, size, size * SUCCESSORS).reshape(size, SUCCESSORS)

    @cached_property
    def trace(self) -> Trace:
        """Every operator of one training step and one prefill plus decode on the CPU, by phase: forward, backward, optimizer,
        inference. Without our own CPU kernels: these are the operators that other chips run."""
        with kernels.plain():
            return self._traced()

    def _traced(self) -> Trace:
        trace = Trace()
        model, batch = self.new_model(), self.batch(1)
        optimizer = self.optimizer(model)
        with trace.recording("forward"):
            value = loss(model, batch)
        parameters = dict(model.named_parameters())
        with trace.recording("backward"):
            grads = torch.autograd.grad(value, list(parameters.values()))
        with trace.recording("optimizer"):
            optimizer.step(dict(zip(parameters, grads, strict=True)), factor=1.0)
        with trace.recording("inference"), torch.no_grad():
            self.prefill_and_decode(model, batch["tokens"], steps=2)
        return trace

    def prefill_and_decode(self, model: Transformer, tokens_BT: Tensor, *, steps: int) -> Tensor:
        """Logits (B, steps, V) of reading half the tokens into the cache and then decoding `steps` more, one at a time."""
        half = tokens_BT.shape[1] // 2
        cache = model.new_cache(tokens_BT.shape[0], half + steps)
        logits = [model(tokens_BT[:, :half], cache=cache).logits_BTV[:, -1]]
        for step in range(steps - 1):
            one = tokens_BT[:, half + step : half + step + 1]
            logits.append(model(one, cache=cache).logits_BTV[:, -1])
        return torch.stack(logits, 1)

    @cached_property
    def twin(self) -> Transformer:
        """The reference of all checks: nobody may change its weights."""
        return self.new_twin()


_TRIANGLE = np.cumsum(
    np.arange(SUCCESSORS, 0, -1)
)  # the first successor is the likeliest, the last the rarest


def loss(model: Transformer, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy in nats per token."""
    logits_BTV = model(batch["tokens"]).logits_BTV
    return F.cross_entropy(logits_BTV.flatten(0, 1), batch["targets"].flatten())


def forward_backward(model: Transformer, batch: dict[str, Tensor]) -> StepResult:
    """Loss and the gradient of every parameter by name. Nothing is changed."""
    parameters = dict(model.named_parameters())
    value = loss(model, batch)
    grads = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    filled = {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True)
    }
    return StepResult(float(value.detach()), filled)


def train_step(
    model: Transformer, optimizer: SplitOptimizer, batch: dict[str, Tensor], *, clip: float = 1.0
) -> StepResult:
    """One whole step with clipping, as a run takes it (linear decay left out: short runs)."""
    result = forward_backward(model, batch)
    norm = float(torch.stack([grad.float().norm() for grad in result.grads.values()]).norm())
    scale = min(1.0, clip / (norm + 1e-6))
    optimizer.step(result.grads, factor=1.0, grad_scale=scale)
    return result
