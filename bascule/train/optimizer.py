"""Muon for matrices, AdamW for everything else, behind one object whose state is saved by parameter name.

Muon (Jordan 2024, "Muon: an optimizer for hidden layers"; scaled up in arXiv 2502.16982) replaces a matrix's momentum by its
nearest orthogonal matrix. `torch.optim.Muon` walks over 2-D matrices one by one and refuses expert stacks; here all matrices of
one shape, experts included, go through the Newton-Schulz iteration as one batch. Shapes: N matrices, R rows <= C columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bascule.errors import SnapshotError
from bascule.model import kernels
from bascule.train import fused_adamw
from bascule.train.state import StateDict

# Quintic with the steepest slope at zero that keeps singular values within about [0.7, 1.2] (Jordan 2024).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
SPECTRAL_REACH = 1.25
"""No singular value comes out larger: on [0, 1] the five quintics stay below 1.21."""

# Lookups, the head, the router and every norm see sparse or per-feature gradients: orthogonalising them hurts.
_NOT_A_MATRIX = re.compile(r"embed|lm_head|norm|\bgate\.weight|router|bias")


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Does Muon take this parameter? 2-D weights and 3-D stacks of expert weights (experts, out, in)."""
    return parameter.ndim in (2, 3) and _NOT_A_MATRIX.search(name) is None


def orthogonalise(x_NRC: Tensor) -> Tensor:
    """Push every singular value of each matrix towards 1, keeping its singular vectors; fp32, R <= C."""
    a, b, c = _NEWTON_SCHULZ
    x_NRC = x_NRC / (x_NRC.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram_NRR = torch.bmm(x_NRC, x_NRC.mT)
        poly_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, poly_NRR, x_NRC, beta=a)
    return x_NRC


def adamw_reach(betas: tuple[float, float], steps_taken: int) -> float:
    """The largest |first / sqrt(second)|, both without bias, that any gradients can lead to in `steps_taken` steps.

    first and second are sums over past gradients with weights (1 - b1) b1^k and (1 - b2) b2^k; by Cauchy and Schwarz
    first^2 <= second * (1 - b1)^2 / (1 - b2) * sum (b1^2 / b2)^k. For (0.9, 0.95) it lies between 1 and 1.2.
    """
    b1, b2 = betas
    q = b1 * b1 / b2
    terms = steps_taken if q == 1.0 else (1.0 - q**steps_taken) / (1.0 - q)
    raw = (1.0 - b1) * math.sqrt(terms / (1.0 - b2))
    return raw * math.sqrt(1.0 - b2**steps_taken) / (1.0 - b1**steps_taken)


@dataclass
class _Stack:
    """Matrices of one shape (up to transposition) that go through Newton-Schulz together; `counts` matrices per parameter."""

    names: list[str]
    counts: list[int]
    momentum_NRC: Tensor


def _as_wide(x: Tensor) -> Tensor:
    """(R,C) or (E,R,C), lying or standing, to (N,R,C) with R <= C."""
    x = x if x.ndim == 3 else x[None]
    return x.mT if x.shape[-2] > x.shape[-1] else x


def _as_was(x_NRC: Tensor, like: Tensor) -> Tensor:
    x_NRC = x_NRC.mT if like.shape[-2] > like.shape[-1] else x_NRC
    return x_NRC if like.ndim == 3 else x_NRC[0]


class SplitOptimizer:
    """Takes gradients as an argument instead of from `.grad`, so that a step can be proposed without touching anything.

    `muon_learning_rate=0` gives AdamW to all. Rates are peaks; `step` takes the schedule's factor. Weight decay (decoupled)
    acts on matrices only.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        learning_rate: float,
        muon_learning_rate: float = 0.0,
        muon_momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool | None = None,
    ) -> None:
        """`fused`: AdamW through torch's fused kernel; None: where there is one and the device is not the CPU."""
        self.parameters = dict(parameters)
        self.learning_rate = learning_rate
        self.muon_learning_rate = muon_learning_rate
        self.muon_momentum = muon_momentum
        self.weight_decay = weight_decay
        self.betas = betas
        self.eps = eps
        self.steps_taken = 0
        matrices = [
            name
            for name, p in self.parameters.items()
            if muon_learning_rate > 0 and is_matrix(name, p)
        ]
        self._stacks = self._make_stacks(matrices)
        rest = [name for name in self.parameters if name not in set(matrices)]
        self._first = {name: torch.zeros_like(self.parameters[name]) for name in rest}
        self._second = {name: torch.zeros_like(self.parameters[name]) for name in rest}
        self._bundles = self._bundle([name for name in rest if self._fits_fused(name, fused)])
        bundled = {name for names, _ in self._bundles for name in names}
        self._single = [name for name in rest if name not in bundled]

    def _fits_fused(self, name: str, asked: bool | None) -> bool:
        p = self.parameters[name]
        if not p.is_contiguous() or asked is False:
            return False
        return bool(asked) or (
            p.device.type != "cpu" and not fused_adamw.why_not(p.device, p.dtype)
        )

    def _bundle(self, names: list[str]) -> list[tuple[list[str], bool]]:
        """(names of one call, does weight decay act on them)."""
        found = []
        for decays in (True, False):
            alike = [n for n in names if is_matrix(n, self.parameters[n]) == decays]
            found += [(cut, decays) for cut in fused_adamw.bundles(self.parameters, alike)]
        return found

    def _make_stacks(self, names: Iterable[str]) -> list[_Stack]:
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name in names:
            by_shape.setdefault(tuple(_as_wide(self.parameters[name]).shape[1:]), []).append(name)
        stacks = []
        for members in by_shape.values():
            wide = [_as_wide(self.parameters[name]) for name in members]
            stacks.append(
                _Stack(members, [len(w) for w in wide], torch.zeros_like(torch.cat(list(wide))))
            )
        return stacks

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], *, factor: float, grad_scale: float = 1.0) -> None:
        """Apply one update. `factor` scales the peak rates, `grad_scale` the gradients (clipping)."""
        self.steps_taken += 1
        for stack in self._stacks:
            self._muon(stack, grads, factor * self.muon_learning_rate, grad_scale)
        rate = factor * self.learning_rate
        for name in self._single:
            self._adamw(name, grads[name], rate, grad_scale)
        for names, decays in self._bundles:
            tensors = (self.parameters, grads, self._first, self._second)
            fused_adamw.update(
                *([of[name] for name in names] for of in tensors), step=self.steps_taken, rate=rate, betas=self.betas, eps=self.eps,
                decay=self.weight_decay if decays else 0.0, grad_scale=grad_scale,
            )  # fmt: skip

    def _muon(
        self, stack: _Stack, grads: Mapping[str, Tensor], rate: float, grad_scale: float
    ) -> None:
        grad_NRC = torch.cat([_as_wide(grads[name]) for name in stack.names]).mul_(grad_scale)
        stack.momentum_NRC.lerp_(grad_NRC, 1.0 - self.muon_momentum)
        nesterov_NRC = grad_NRC.lerp_(stack.momentum_NRC, self.muon_momentum)
        updates = torch.split(orthogonalise(nesterov_NRC), stack.counts)
        for name, update_NRC in zip(stack.names, updates, strict=True):
            p = self.parameters[name]
            rows, columns = p.shape[-2:]
            p.mul_(1.0 - rate * self.weight_decay)
            p.add_(_as_was(update_NRC, p), alpha=-rate * math.sqrt(max(1.0, rows / columns)))

    def _adamw(self, name: str, grad: Tensor, rate: float, grad_scale: float) -> None:
        beta1, beta2 = self.betas
        p, first, second = self.parameters[name], self._first[name], self._second[name]
        keep = 1.0 - rate * self.weight_decay if is_matrix(name, p) else 1.0
        if p.is_contiguous() and kernels.usable(p, grad):
            rate /= 1.0 - beta1**self.steps_taken
            correction = 1.0 / (1.0 - beta2**self.steps_taken)
            torch.ops.bascule.adamw_(
                p, first, second, grad, grad_scale, beta1, beta2, keep, rate, correction, self.eps
            )
            return
        grad = grad * grad_scale
        first.lerp_(grad, 1.0 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        if keep != 1.0:
            p.mul_(keep)
        spread = (second / (1.0 - beta2**self.steps_taken)).sqrt_().add_(self.eps)
        p.addcdiv_(first, spread, value=-rate / (1.0 - beta1**self.steps_taken))

    def reach(self, factor: float) -> dict[str, tuple[float, float]]:
        """By name, how far the next `step` can move a parameter whatever the gradients are: (2-norm, share of its own length)."""
        found: dict[str, tuple[float, float]] = {}
        rate = factor * self.muon_learning_rate
        for name in (name for stack in self._stacks for name in stack.names):
            p = self.parameters[name]
            rows, columns = p.shape[-2:]
            directions = p.numel() / max(rows, columns)
            scale = math.sqrt(max(1.0, rows / columns) * directions)
            found[name] = (rate * SPECTRAL_REACH * scale, rate * self.weight_decay)
        rate = factor * self.learning_rate
        most = adamw_reach(self.betas, self.steps_taken + 1)
        for name in self._first:
            p = self.parameters[name]
            decay = self.weight_decay if is_matrix(name, p) else 0.0
            found[name] = (rate * most * math.sqrt(p.numel()), rate * decay)
        return found

    def moments(self) -> dict[str, Tensor]:
        """The live tensors that only `step` writes to; matrices of one shape go together, under the first one's name."""
        found = {f"momentum/{stack.names[0]}": stack.momentum_NRC for stack in self._stacks}
        for name in self._first:
            found[f"first/{name}"] = self._first[name]
            found[f"second/{name}"] = self._second[name]
        return found

    def state_dict(self) -> StateDict:
        """`steps_taken`, and by parameter name `momentum/…` (Muon) or `first/…` and `second/…` (AdamW); tensors are copies."""
        state: StateDict = {"steps_taken": self.steps_taken}
        for stack in self._stacks:
            for name, part_NRC in zip(
                stack.names, torch.split(stack.momentum_NRC, stack.counts), strict=True
            ):
                like = self.parameters[name]
                state[f"momentum/{name}"] = _as_was(part_NRC, like).clone(
                    memory_format=torch.contiguous_format
                )
        for name in self._first:
            state[f"first/{name}"] = self._first[name].clone()
            state[f"second/{name}"] = self._second[name].clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: StateDict) -> None:
        """Raises SnapshotError when the names are not this optimizer's."""
        expected = set(self.state_dict())
        if set(state) != expected:
            odd = sorted(set(state) ^ expected)
            raise SnapshotError(
                f"The snapshot's optimizer state does not belong to this recipe: {len(odd)} names differ, first '{odd[0]}'. "
                "Resume with the recipe that saved it, or start the phase anew in another run folder."
            )
        self.steps_taken = int(state["steps_taken"])
        for stack in self._stacks:
            for name, part_NRC in zip(
                stack.names, torch.split(stack.momentum_NRC, stack.counts), strict=True
            ):
                part_NRC.copy_(_as_wide(state[f"momentum/{name}"]))
        for name in self._first:
            self._first[name].copy_(state[f"first/{name}"])
            self._second[name].copy_(state[f"second/{name}"])
