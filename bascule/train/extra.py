"""Loss terms beside the objective's own: the prediction layer's, and the sequence-wise balance of experts.

A batch says itself which terms it wants, by the tensors `ahead_weight` and `balance_weight` (one number a row, all equal), so
that a replay, a referee and a resumed run compute the same loss from the batch alone. B rows, T positions, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bascule.config.training import TrainConfig
from bascule.model import seats
from bascule.model.transformer import Output, Transformer
from bascule.train.objective import Batch, Objective, ask_head
from bascule.train.optimizer import SplitOptimizer
from bascule.train.state import StateDict

Heard = list[tuple[Tensor, Tensor, Tensor]]
"""Of every router that ran: its weight [E,D], its input [N,D], the experts it chose [N,K]."""


def ahead_weight(config: TrainConfig, index: int, steps: int) -> float:
    """0.3 for the first two thirds of a phase, 0.1 after (DeepSeek-V3, arXiv 2412.19437, section 4.2: 10T of 14.8T tokens)."""
    early = index < config.mtp_switch_ratio * steps
    return config.mtp_loss_weight if early else config.mtp_final_loss_weight


def ahead_loss(output: Output, tensors: dict[str, Tensor]) -> Tensor:
    """Mean nats of the token after the next, over targets that count; across no border between documents."""
    assert output.ahead_BTD is not None
    ahead = replace(output, kept_BTV=output.ahead_BTV, hidden_BTD=output.ahead_BTD)
    nats_BT = -ask_head(ahead, tensors["targets"][:, 1:])[0]
    mask_BT = tensors["mask"][:, 1:]
    documents = tensors.get("documents")
    if documents is not None:
        mask_BT = mask_BT * (documents[:, 1:] == documents[:, :-1])
    return (nats_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1.0)


def balance_loss(heard: Heard, real_BT: Tensor) -> Tensor:
    """Sum over layers of the mean over sequences of sum_e f_e P_e (DeepSeek-V3, equations 17 to 20); 1 a layer when balanced.

    f_e: how often expert e was chosen in the sequence, times E/K; P_e: its mean share of the router's scores. Counted are the
    experts really chosen, bias included; the paper's formula leaves the bias out.
    """
    return torch.stack([_balance(*one, real_BT) for one in heard]).sum()


def _balance(weight_ED: Tensor, x_ND: Tensor, chosen_NK: Tensor, real_BT: Tensor) -> Tensor:
    if x_ND.shape[0] != real_BT.numel():  # the prediction layer runs one position less
        real_BT = real_BT[:, 1:]
    rows, experts = real_BT.shape[0], weight_ED.shape[0]
    real_BT1 = real_BT.float().unsqueeze(-1)
    length_B1 = real_BT1.sum(1).clamp(min=1.0)
    scores_NE = F.linear(x_ND.float(), weight_ED.float()).sigmoid()
    share_BTE = (scores_NE / scores_NE.sum(-1, keepdim=True)).view(rows, -1, experts)
    chose_NE = torch.zeros_like(scores_NE).scatter(1, chosen_NK, 1.0)
    often_BE = (chose_NE.view(rows, -1, experts) * real_BT1).sum(1) / length_B1
    often_BE = often_BE * (experts / chosen_NK.shape[1])
    mean_BE = (share_BTE * real_BT1).sum(1) / length_B1
    return (often_BE * mean_BE).sum(-1).mean()


@contextmanager
def listening(model: Transformer, tensors: dict[str, Tensor]) -> Iterator[Heard]:
    """Collect what the routers did during the forward pass inside, if the batch asks for it. The model is left as it was."""
    heard: Heard = []
    handles = []
    if "balance_weight" in tensors:

        def hear(gate: nn.Module, given: tuple[Tensor, ...], gave: tuple[Tensor, Tensor]) -> None:
            heard.append((gate.get_parameter("weight"), given[0], gave[0]))

        handles = [moe.gate.register_forward_hook(hear) for moe in model.moe_layers()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def add(
    loss: Tensor,
    metrics: dict[str, Tensor],
    output: Output,
    tensors: dict[str, Tensor],
    heard: Heard,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective's loss with the terms that the batch asks for; each stands in the metrics by itself, unweighted."""
    terms: dict[str, Tensor] = {}
    if "ahead_weight" in tensors:
        terms["ahead"] = ahead_loss(output, tensors)
    if heard:
        terms["balance"] = balance_loss(heard, tensors["real"])
    if not terms:
        return loss, metrics
    metrics = {**metrics, "own_loss": loss.detach()}
    for name, term in terms.items():
        loss = loss + tensors[f"{name}_weight"][0] * term
        metrics[f"{name}_loss"] = term.detach()
    return loss, metrics


def load_metrics(expert_loads: Tensor | None) -> dict[str, float]:
    """`expert_max_ratio`: the busiest expert's load over its layer's mean, worst layer (1 + MaxVio of arXiv 2408.15664);
    `experts_idle`: experts of all layers that no token chose."""
    if expert_loads is None or not expert_loads.numel():
        return {}
    loads = expert_loads.double().cpu()
    mean = loads.mean(1).clamp(min=1e-9)
    return {
        "expert_max_ratio": float((loads.amax(1) / mean).amax()),
        "experts_idle": float((loads == 0).sum()),
    }


class Extended:
    """An objective whose batches ask for extra terms; everything else is the objective's own."""

    def __init__(
        self, inner: Objective, config: TrainConfig, predicts_ahead: bool, has_experts: bool
    ) -> None:
        self.inner, self.config = inner, config
        self.predicts_ahead, self.has_experts = predicts_ahead, has_experts
        self.phase, self.first_step, self.steps = inner.phase, inner.first_step, inner.steps
        self.clip_grad_norm = inner.clip_grad_norm

    def new_optimizer(self, model: nn.Module) -> SplitOptimizer:
        return self.inner.new_optimizer(model)

    def learning_rate(self, step: int) -> tuple[float, float]:
        return self.inner.learning_rate(step)

    def next_batch(self, step: int) -> Batch:
        batch = self.inner.next_batch(step)
        wanted = {}
        if self.predicts_ahead:
            wanted["ahead"] = ahead_weight(self.config, step - self.first_step, self.steps)
        if self.has_experts:
            wanted["balance"] = self.config.balance_loss_weight
        rows = batch.tensors["tokens"].shape[0] if batch.tensors else 0
        extra = {
            f"{name}_weight": torch.full((rows,), weight)
            for name, weight in wanted.items()
            if rows and weight > 0
        }
        # These terms are of whole rows, so the batch is worked out padded.
        own = {n: t for n, t in batch.tensors.items() if not (extra and n in seats.NAMES)}
        return replace(batch, tensors={**own, **extra})

    def loss(self, output: Output, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inner.loss(output, tensors)

    def state_dict(self) -> StateDict:
        return self.inner.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        self.inner.load_state_dict(state)
