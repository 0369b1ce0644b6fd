"""In which type a forward pass computes its matrix products: fp32, or bf16 beside fp32 weights (mixed precision).

With bf16 the products read copies of fp32 weights and of activations, rounded to bf16 (PyTorch's autocast makes them); what lies between
(the residual stream, norms, softmax, router, head, loss) stays fp32, and so do the weights, their gradients and the optimizer. The
backward pass computes each product in the type of its forward.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from bascule.config.training import Precision

DTYPE: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def computing(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The block of a forward pass on `device`. For fp32 nothing is entered, so that no bit of such a run can depend on it."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPE[precision])


def present(device: torch.device) -> Precision:
    """What products on `device` are computed in here."""
    return "bf16" if _narrowing(device.type) else "fp32"


def full(x: Tensor) -> AbstractContextManager[object]:
    """The block in which products on the device of `x` are fp32 whatever lies around it: router and head."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if _narrowing(kind) else nullcontext()


def product_dtype(x: Tensor) -> torch.dtype:
    """The type in which a product of `x` is computed here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if _narrowing(kind) else x.dtype


class Full:
    """Mixed into a module whose own product is fp32 whatever lies around it (`full`)."""


def rounded(module: nn.Module) -> set[str]:
    """Names of the parameters that products read through a copy in the run's narrower type: matrices, but for tables and `Full` ones."""
    return {
        f"{owner}.{name}" if owner else name
        for owner, part in module.named_modules()
        if not isinstance(part, (nn.Embedding, Full))
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.dim() >= 2
    }


def narrow(x: Tensor) -> Tensor:
    """`x` as the products here read it, made once: each of them would round, and keep for its backward pass, a copy of its own."""
    return x.to(product_dtype(x))


def _narrowing(kind: str) -> bool:
    """Not every kind of device knows autocast (`meta`), and PyTorch raises when it is asked there."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
