"""DeepSeek-V3's mixture of experts: sigmoid router, group-limited choice, balancing by a bias, a shared expert.

The bias steers which experts are chosen and never enters the weight they get (DeepSeek-V3 section 2.1.2). Router arithmetic
is fp32 whatever the model's dtype. Tokens are sorted by the expert that each goes to; experts.py applies the experts to them.

Letters: N tokens, D hidden, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bascule.config.model import ModelConfig
from bascule.model import fused, kernels
from bascule.model.experts import Experts
from bascule.model.layers import SwiGLU, _same_dtype
from bascule.model.precision import Full, full


class Router(Full, nn.Module):
    """Chooses experts. `weight` [E, D] learns by gradient, `e_score_correction_bias` [E] by `update_bias` only."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.per_token, self.groups, self.kept_groups = (
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
        )
        self.normalise, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32)
        )

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Router:
        """The bias stays fp32: its steps of 1e-3 vanish in bf16 next to a bias of 1."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.e_score_correction_bias = _same_dtype(self.e_score_correction_bias, before)
        return self

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(chosen experts [N, K] int64, their weights [N, K] fp32)."""
        scores_NE = self.scores(x_ND)
        chosen_NK = self._choose(scores_NE.detach() + self.e_score_correction_bias)
        return chosen_NK, self.weigh(scores_NE, chosen_NK)

    def scores(self, x_ND: Tensor) -> Tensor:
        """What each expert is to each token, [N, E] fp32, in (0, 1)."""
        with full(x_ND):
            return F.linear(x_ND.float(), self.weight.float()).sigmoid()

    def weigh(self, scores_NE: Tensor, chosen_NK: Tensor) -> Tensor:
        """The weights [N, K] that the chosen experts get."""
        weights_NK = scores_NE.gather(1, chosen_NK)
        if self.normalise:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return weights_NK * self.scaling

    def _choose(self, biased_NE: Tensor) -> Tensor:
        """Keep the groups whose best two experts sum highest, then the best experts within them."""
        if self.groups > 1:
            grouped = torch.unflatten(biased_NE, 1, (self.groups, -1))
            strength = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
            kept = strength.topk(self.kept_groups, -1, sorted=False).indices
            dropped = torch.ones_like(strength, dtype=torch.bool).scatter(1, kept, False)
            biased_NE = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
        return biased_NE.topk(self.per_token, -1, sorted=False).indices

    @torch.no_grad()
    def update_bias(self, loads_E: Tensor, speed: float) -> None:
        """Raise the bias of experts below the mean load, lower it above, by `speed` exactly; equal loads change nothing."""
        loads = loads_E.to(self.e_score_correction_bias.device, torch.float64)
        self.e_score_correction_bias += speed * torch.sign(loads.mean() - loads).float()


class MoE(nn.Module):
    """Routed experts plus the shared expert every token passes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(
            config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        )

    def forward(self, x_BTD: Tensor, mask_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(output [B, T, D], load of every expert [E] int64: how many tokens chose it; padding is not counted)."""
        x_ND = x_BTD.flatten(0, 1)
        chosen_NK, weights_NK = self.gate(x_ND)
        per_token, experts = chosen_NK.shape[1], self.gate.weight.shape[0]
        if kernels.usable(x_ND, weights_NK):
            order, place, counts_E = torch.ops.bascule.expert_order(chosen_NK, experts)
            sorted_MD = fused.gather_rows(x_ND, order, place, per_token)
            done_MD = self.experts(sorted_MD, counts_E)
            shared_BTD = self.shared_experts(x_BTD)
            out_BTD = fused.combine(shared_BTD, done_MD, place, weights_NK)
            return out_BTD, counts_E if mask_BT is None else _count(
                chosen_NK, mask_BT.flatten(), experts
            )
        by_expert, order = chosen_NK.flatten().sort(stable=True)
        # Counting by searching the sorted list: bincount synchronises by itself, scatter_add is not deterministic everywhere.
        edges = torch.searchsorted(by_expert, torch.arange(experts + 1, device=by_expert.device))
        counts_E = edges.diff()
        token_of = order if per_token == 1 else order.div(per_token, rounding_mode="floor")
        done_MD = self.experts(x_ND.index_select(0, token_of), counts_E)
        done_NKD = done_MD.index_select(0, _inverse(order)).unflatten(0, (-1, per_token))
        routed_ND = (done_NKD * weights_NK.unsqueeze(-1).to(done_NKD.dtype)).sum(1)
        loads_E = counts_E if mask_BT is None else _count(chosen_NK, mask_BT.flatten(), experts)
        return self.shared_experts(x_BTD) + routed_ND.view_as(x_BTD), loads_E


def _inverse(order: Tensor) -> Tensor:
    """The permutation that undoes `order`."""
    return torch.empty_like(order).scatter_(
        0, order, torch.arange(order.numel(), device=order.device)
    )


def _count(chosen_NK: Tensor, real_N: Tensor, experts: int) -> Tensor:
    """How many real tokens chose each expert, [E] int64; `real_N` may hold how many samples a token stands for."""
    chose_NE = (chosen_NK.unsqueeze(-1) == torch.arange(experts, device=chosen_NK.device)).any(1)
    return (chose_NE * real_N.long().unsqueeze(-1)).sum(0)
