"""The checksum of a grouped product, in which the chip alone knows which rows belong to which matrix (model/experts.py).

    rows of experts      C[m] = A[m] B[e(m)]                C[m] r = A[m] (B[e(m)] r)
    weights' gradients   C[e] = sum over m of e: A[:,m] B[m]    C[e] r = sum over m of e: A[:,m] (B[m] r)

Letters: M rows, K terms, N columns, E experts; r the checksum's vector, `ends` where each expert's rows end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bascule import numerics


@torch.no_grad()
def grouped_ratio(
    left: Tensor, right: Tensor, ends_E: Tensor, output: Tensor, probe_N: Tensor
) -> Tensor:
    """Largest error over its bound, a scalar on the chip, as checksum.product_ratio: of left (M, K), right (E, K, N), output (M, N), or
    of left (K, M), right (M, N), output (E, K, N). Nothing waits for `ends_E`."""
    a, b, c = (x.to(probe_N.dtype) for x in (left, right, output))
    rows = b.shape[0] if b.dim() == 2 else a.shape[0]
    expert_M = torch.searchsorted(ends_E, torch.arange(rows, device=a.device), right=True)
    check = _sums if b.dim() == 2 else _rows
    expected, sizes, terms = check(a, b, expert_M, ends_E.shape[0], lambda x: x @ probe_N)
    half = output.dtype in (torch.float16, torch.bfloat16)
    norms = torch.linalg.vector_norm(c, dim=-1) if half else None
    bound = numerics.checksum_bound(
        sizes, sizes.new_ones(()), terms, c.shape[-1], norms, output.dtype
    )
    ratio = (c @ probe_N - expected).abs_().div_(bound)
    worst: Tensor = torch.where((expected + sizes).isfinite(), ratio, 0.0).amax()
    return worst


Projected = Callable[[Tensor], Tensor]


def _rows(
    a_MK: Tensor, b_EKN: Tensor, expert_M: Tensor, experts: int, project: Projected
) -> tuple[Tensor, Tensor, int]:
    """(expected checksum of each output row, size of what was added up for it, terms)."""
    seen_MK = project(b_EKN).index_select(0, expert_M)
    norms_E = torch.linalg.vector_norm(b_EKN, dim=(1, 2))
    sizes_M = torch.linalg.vector_norm(a_MK, dim=1) * norms_E.index_select(0, expert_M)
    return (a_MK * seen_MK).sum(1), sizes_M, a_MK.shape[1]


def _sums(
    a_KM: Tensor, b_MN: Tensor, expert_M: Tensor, experts: int, project: Projected
) -> tuple[Tensor, Tensor, int]:
    """The same for each expert's sum; the bound counts all rows as its terms, which is more than it has."""

    def added(values_MK: Tensor) -> Tensor:
        zeros_EK = values_MK.new_zeros(experts, values_MK.shape[1])
        return zeros_EK.index_add(0, expert_M, values_MK)

    expected_EK = added(a_KM.T * project(b_MN).unsqueeze(1))
    norms_E1 = added(b_MN.square().sum(1, keepdim=True)).sqrt()
    return expected_EK, added(a_KM.T.square()).sqrt() * norms_E1, b_MN.shape[0]
