"""PyTorch's fused AdamW: one kernel for many parameters, where a chip's PyTorch has one. On the CPU our own is used (model/kernels.py).

Held to the formula on the CPU (tests/train/test_fused_adamw.py) and on the stand-in device; on a GPU it has not been run yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOST_ELEMENTS = 1 << 26
"""Parameters of one call: clipped gradients are copies, and copies of all at once would be as large as the model."""


@cache
def why_not(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """Why `device` has no such kernel, "" where it has. Tried once, on four numbers: a back end may lack it, or get it wrong."""
    start, grad, zeros = [1.0, -2.0, 3.0, 0.5], [0.5, -1.0, 0.0, 2.0], [0.0] * 4
    try:
        p, given, first, second = (torch.tensor(x, device=device, dtype=dtype) for x in (start, grad, zeros, zeros))  # fmt: skip
        update([p], [given], [first], [second], step=1, rate=0.1, betas=(0.9, 0.95), eps=1e-8, decay=0.0)  # fmt: skip
        found = p.tolist()
    except (RuntimeError, NotImplementedError) as error:
        return f"torch's fused AdamW refuses this device: {str(error).splitlines()[0]}"
    # The first step goes 0.1 against the sign of the gradient, whatever its size.
    right = [at - 0.1 * ((slope > 0) - (slope < 0)) for at, slope in zip(start, grad, strict=True)]
    off = max(abs(one - other) for one, other in zip(found, right, strict=True))
    allowed = 16 * torch.finfo(dtype).eps
    if off <= allowed:
        return ""
    return f"torch's fused AdamW is wrong on this device: off by {off:.1e} in a first step of 0.1, allowed {allowed:.1e}"


def bundles(parameters: Mapping[str, Tensor], names: Sequence[str]) -> list[list[str]]:
    """`names` in their order, cut where a call would have more than MOST_ELEMENTS."""
    cut: list[list[str]] = []
    filled = MOST_ELEMENTS
    for name in names:
        size = parameters[name].numel()
        if filled + size > MOST_ELEMENTS:
            cut.append([])
            filled = 0
        cut[-1].append(name)
        filled += size
    return cut


def update(
    parameters: list[Tensor],
    grads: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    *,
    step: int,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    grad_scale: float = 1.0,
) -> None:
    """AdamW's update number `step` (from 1) in place; the gradients are left as they are. No wait for the chip.

    The kernel's own grad_scale divides, and writes the quotient back into the gradients, which the guard may want again.
    """
    given = [grad.contiguous() for grad in grads]  # the CPU's kernel trusts that they are
    if grad_scale != 1.0:
        given = list(torch._foreach_mul(given, grad_scale))
    taken = torch.full((len(parameters),), float(step - 1), device=parameters[0].device)
    adamw(
        parameters, given, first, second, [], list(taken.unbind()), fused=True, amsgrad=False, beta1=betas[0], beta2=betas[1],
        lr=rate, weight_decay=decay, eps=eps, maximize=False,
    )  # fmt: skip
