"""The head, and log-probabilities read from it without keeping its logits.

Logits are the largest thing a step makes: 64 samples of 4,096 tokens over 129,280 words are 135 GB in fp32, and their gradient as much
again. Asked for targets, the head works out some rows at a time, keeps one number a row (the logarithm of the sum), and works the
logits out again in the backward pass ("fused linear cross-entropy"; Hsu et al., Liger Kernel, arXiv 2410.10989, keeps gradients
instead, which needs the loss of each token beforehand: GRPO's weights are known only afterwards). The price: four products where there
were three. M rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from bascule.model import count
from bascule.model.precision import Full, full


class Head(Full, nn.Linear):
    """Hidden states to logits; with targets, to what those targets are given."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__(hidden, vocabulary, bias=False)

    def forward(
        self, input: Tensor, targets_M: Tensor | None = None, temperature: float = 1.0
    ) -> Any:
        """Logits [..., V] of `input` [..., D], in its type. With `targets_M` int64, `input` [M, D]: (log-probability of each target in nats, entropy of
        each row in nats), both [M] fp32, at `temperature`; the entropy has no gradient. The weight's own type, whatever other products are in."""
        input = input.to(self.weight.dtype)
        if targets_M is None:
            with full(input):
                return super().forward(input)
        rows = max(1, count.LOGITS_CHUNK_BYTES // (4 * self.out_features))
        return _Readout.apply(input, self.weight, targets_M, temperature, rows)  # type: ignore[no-untyped-call]


class _Readout(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, temperature: float, rows: int
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        logp, entropy, total = [], [], []
        for part, target in zip(
            torch.split(hidden_MD, rows), torch.split(targets_M, rows), strict=True
        ):
            logits = _logits(part, weight_VD, temperature)
            total.append(logits.logsumexp(-1))
            logp.append(logits.gather(-1, target[:, None])[:, 0] - total[-1])
            entropy.append(total[-1] - (logits * (logits - total[-1][:, None]).exp()).sum(-1))
        total_M = torch.cat(total)
        ctx.save_for_backward(hidden_MD, weight_VD, targets_M, total_M)
        ctx.temperature, ctx.rows = temperature, rows
        entropy_M = torch.cat(entropy)
        ctx.mark_non_differentiable(entropy_M)
        return torch.cat(logp), entropy_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogp_M: Tensor, _: Tensor) -> Any:
        hidden_MD, weight_VD, targets_M, total_M = ctx.saved_tensors
        dhidden, dweight_VD = [], torch.zeros_like(weight_VD, dtype=torch.float32)
        rows = zip(
            *(torch.split(each, ctx.rows) for each in (hidden_MD, targets_M, total_M, dlogp_M)),
            strict=True,
        )
        for part, target, total, d in rows:
            # d/dlogits of logp[target] is one there, minus the probabilities everywhere
            grad = (_logits(part, weight_VD, ctx.temperature) - total[:, None]).exp_()
            grad.mul_(-d[:, None])
            place = target[:, None]
            grad.scatter_(1, place, grad.gather(1, place) + d[:, None])
            grad = grad.div_(ctx.temperature).to(weight_VD.dtype)
            dhidden.append(grad @ weight_VD)
            dweight_VD += grad.t() @ part
        return torch.cat(dhidden), dweight_VD.to(weight_VD.dtype), None, None, None


def _logits(hidden_MD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logits = (hidden_MD @ weight_VD.t()).float()
    return logits if temperature == 1.0 else logits.div_(temperature)
