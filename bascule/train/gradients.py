"""Loss and gradients of one batch: the forward and backward pass, with nothing in between that makes the host wait."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bascule.config.training import Precision
from bascule.model import seats
from bascule.model.names import layer_of
from bascule.model.precision import computing
from bascule.model.routing import replaying
from bascule.model.transformer import Output, Transformer
from bascule.train import extra
from bascule.train.objective import Objective, head_later


@dataclass(frozen=True)
class Computed:
    """Forward and backward pass as they lie on the chip, nothing fetched. `norms_P`: 2-norm of each of `grads`, in order."""

    loss: Tensor
    metrics: dict[str, Tensor]
    grads: dict[str, Tensor]
    norms_P: Tensor
    expert_loads: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by a name for people."""
        loads = {} if self.expert_loads is None else {"expert loads": self.expert_loads}
        return {"the loss": self.loss, **self.metrics, **self.grads, "norms": self.norms_P, **loads}

    def copied(self) -> Computed:
        """The next replay, of whatever shape, writes over what a recording gave."""
        return Computed(
            self.loss.clone(), {n: t.clone() for n, t in self.metrics.items()}, {n: t.clone() for n, t in self.grads.items()},
            self.norms_P.clone(), None if self.expert_loads is None else self.expert_loads.clone(),
        )  # fmt: skip


def forward(model: Transformer, tensors: dict[str, Tensor]) -> Output:
    """Run the model on a batch; `ahead_weight` in it asks for the prediction layer too, `routes` for the choice of experts it holds."""
    if "routes" in tensors:
        plain = {name: tensor for name, tensor in tensors.items() if name != "routes"}
        with replaying(model, tensors["routes"]) as agreed:
            output = forward(model, plain)
        return replace(output, routes_agree=torch.stack(agreed))
    if "seats" in tensors:
        where = seats.Seats(tensors["seats"], tensors["places"])
        tokens_1N = tensors["tokens"].flatten()[where.place_N].unsqueeze(0)
        return model(  # type: ignore[no-any-return]
            tokens_1N, mask=tensors["copies"].unsqueeze(0), seats=where, picks_M=tensors["picks"], head_later=head_later(model, tensors),
        )  # fmt: skip
    return model(  # type: ignore[no-any-return]
        tensors["tokens"], mask=tensors["real"], documents=tensors.get("documents"), ahead="ahead_weight" in tensors,
        right_padded="documents" not in tensors, head_later=head_later(model, tensors),
    )  # fmt: skip


def forward_backward(
    model: Transformer, objective: Objective, tensors: dict[str, Tensor], precision: Precision
) -> Computed:
    """Metrics hold `grad_norm` too. Nothing waits for the chip. `.grad` fields are left alone: nothing to reset, nothing to leak."""
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    with extra.listening(model, tensors) as heard, computing(precision, device):
        output = forward(model, tensors)
    loss, metrics = extra.add(*objective.loss(output, tensors), output, tensors, heard)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    grads = {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }
    norms_P = torch.stack(torch._foreach_norm(list(grads.values())))
    metrics["grad_norm"] = torch.linalg.vector_norm(norms_P)
    return Computed(loss.detach(), metrics, grads, norms_P, output.expert_loads)


Told = tuple[float, dict[str, float], list[float]]
"""Loss, metrics, norm of each gradient."""


def told(computed: Computed) -> Told:
    """What the host wants to know, in one transfer."""
    own, *figures = fetched([computed.loss, *computed.metrics.values(), *computed.norms_P.unbind()])
    told = dict(zip(computed.metrics, figures, strict=False))
    return own, told, figures[len(told) :]


_WITHIN_FP32 = (torch.float32, torch.bfloat16, torch.float16)


def fetched(scalars: Iterable[Tensor]) -> list[float]:
    """The values of `scalars` in one transfer: each by itself would make the host wait for the chip once more. In fp64 only
    where fp32 would not hold one of them (GRPO's mismatch): not every chip is quick at it, or has it."""
    given = list(scalars)
    wide = torch.float32 if all(one.dtype in _WITHIN_FP32 for one in given) else torch.float64
    values: list[float] = torch.stack([one.to(wide) for one in given]).tolist()
    return values


def by_layer(names: Iterable[str], norms: Iterable[float]) -> dict[str, float]:
    """2-norm of each layer's gradient from those of its parameters. Four digits: the ledger keeps them of every step, and a guard that
    was interrupted must read the very values that it would have remembered."""
    squares: dict[str, float] = {}
    for name, norm in zip(names, norms, strict=True):
        layer = layer_of(name)
        squares[layer] = squares.get(layer, 0.0) + norm * norm
    return {layer: float(f"{math.sqrt(square):.4g}") for layer, square in squares.items()}
