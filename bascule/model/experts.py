"""The routed experts of a layer, and four ways to call them. Rows come sorted by the expert that each goes to.

How many rows an expert has is known to the chip that chose. `sliced` must know it on the host, which then waits for the chip; a CPU has nobody
to wait for, and slices beat `grouped_mm` there two to one (training.md 3.1). On every other device the host goes on:

    chosen   few rows: each with a copy of its own expert's matrices
    padded   few tokens: one batched product in which every expert has a place for every token. Empty places cost arithmetic that is hidden
             behind the reading of the matrices
    grouped  many tokens in bf16: `torch.nn.functional.grouped_mm`, which reads the sizes on the chip
    sliced   what is left, many tokens in fp32 or where there is no such kernel: one wait a layer

Letters: M rows (a token times the experts it chose), D hidden, E experts, F expert size, N places of an expert.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bascule.config.model import ModelConfig
from bascule.model import fused, kernels
from bascule.model.precision import product_dtype

COPIED = 3
"""Copying a matrix to multiply one row with it reads, writes and reads it again."""

PADDED_TOKENS = 128
"""By its datasheet an H100 reads a bf16 matrix in the time in which it multiplies it with 295 rows, so up to here empty places are free. In fp32 it is
40 rows: there they cost time, and waiting would cost a recording of the step (infer/recorded.py)."""

ALIGNED = 8
"""bf16 numbers in the 16 bytes that `grouped_mm` wants every row to be a multiple of."""


class Experts(nn.Module):
    """All routed experts of a layer, stacked: `gate_up_proj` [E, 2F, D] (gate rows first), `down_proj` [E, D, F]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, size = (
            config.n_routed_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        )
        self.per_token = config.num_experts_per_tok
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * size, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))

    def forward(self, sorted_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Expert e applied to the rows that are its own, `counts_E[e]` of them, [M, D]. No expert has a row of one token twice."""
        rows, experts = sorted_MD.shape[0], counts_E.shape[0]
        if sorted_MD.device.type == "cpu" or not rows:
            return self.sliced(sorted_MD, counts_E)
        if COPIED * rows <= experts:
            return self.chosen(sorted_MD, counts_E)
        if rows <= PADDED_TOKENS * self.per_token:
            return self.padded(sorted_MD, counts_E)
        half = product_dtype(sorted_MD) == torch.bfloat16
        if half and self._aligned() and _groups(sorted_MD.device.type):
            return self.grouped(sorted_MD.bfloat16(), counts_E)
        return self.sliced(sorted_MD, counts_E)

    def sliced(self, sorted_MD: Tensor, counts_E: Tensor) -> Tensor:
        """`unbind` once instead of indexing in the loop: autograd then builds one stacked gradient, not one per expert."""
        gate_up, down = self.gate_up_proj.unbind(), self.down_proj.unbind()
        counts, parts = counts_E.tolist(), []
        for expert, rows in enumerate(torch.split(sorted_MD, counts)):
            if counts[expert]:
                parts.append(F.linear(gated_halves(F.linear(rows, gate_up[expert])), down[expert]))
        return torch.cat(parts) if parts else sorted_MD

    def chosen(self, sorted_MD: Tensor, counts_E: Tensor) -> Tensor:
        expert_M = _expert_of(sorted_MD.shape[0], counts_E)
        gate_up, down = (
            weights.index_select(0, expert_M).transpose(1, 2)
            for weights in (self.gate_up_proj, self.down_proj)
        )
        return torch.bmm(gated_halves(torch.bmm(sorted_MD.unsqueeze(1), gate_up)), down).squeeze(1)

    def padded(self, sorted_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Places that stay empty hold zeros, and zero is what every expert makes of them."""
        rows, experts = sorted_MD.shape[0], counts_E.shape[0]
        places = -(-rows // self.per_token)
        expert_M = _expert_of(rows, counts_E)
        first_E = counts_E.cumsum(0) - counts_E
        inside_M = torch.arange(rows, device=sorted_MD.device) - first_E.index_select(0, expert_M)
        at_M = expert_M * places + inside_M
        placed = sorted_MD.new_zeros(experts * places, sorted_MD.shape[1]).index_copy(0, at_M, sorted_MD)  # fmt: skip
        inner = torch.bmm(placed.view(experts, places, -1), self.gate_up_proj.transpose(1, 2))
        done = torch.bmm(gated_halves(inner), self.down_proj.transpose(1, 2))
        return done.flatten(0, 1).index_select(0, at_M)

    def grouped(self, sorted_MD: Tensor, counts_E: Tensor) -> Tensor:
        ends_E = counts_E.cumsum(0).int()
        gate_up, down = (
            weights.to(sorted_MD.dtype).transpose(1, 2)
            for weights in (self.gate_up_proj, self.down_proj)
        )
        inner = F.grouped_mm(sorted_MD, gate_up, offs=ends_E)
        return F.grouped_mm(gated_halves(inner), down, offs=ends_E)

    def _aligned(self) -> bool:
        return not any(size % ALIGNED for size in self.down_proj.shape[1:])


def gated_halves(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of rows that hold the gate first, then up."""
    if kernels.usable(gate_up):
        return fused.swiglu_halves(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _expert_of(rows: int, counts_E: Tensor) -> Tensor:
    """Whose each sorted row is, [M]. Searched for: `repeat_interleave` would wait for the counts."""
    numbers = torch.arange(rows, device=counts_E.device)
    return torch.searchsorted(counts_E.cumsum(0), numbers, right=True)


@functools.cache
def _groups(device: str) -> bool:
    """Has this kind of device a kernel of its own? PyTorch's general one asks for the sizes on the host, expert by expert."""
    if not hasattr(F, "grouped_mm"):
        return False
    key = torch._C._dispatch_key_for_device(device)
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_grouped_mm", key)
