"""The expert layer against a token-by-token reading of DeepSeek-V3's equations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bascule.config.model import ModelConfig
from bascule.model import weights
from bascule.model.moe import MoE, Router
from bascule.model.transformer import Transformer

GROUPED = ModelConfig(
    preset="tick",
    hidden_size=16,
    n_routed_experts=12,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=3,
    routed_scaling_factor=2.5,
)


def _layer(config: ModelConfig, seed: int = 0) -> MoE:
    layer = MoE(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        layer.gate.e_score_correction_bias.copy_(
            torch.randn(config.n_routed_experts, generator=generator) * 0.3
        )
    return layer


def _chosen_by_hand(scores: Tensor, bias: Tensor, config: ModelConfig) -> list[int]:
    biased = (scores + bias).tolist()
    size = config.n_routed_experts // config.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]
    strength = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(config.n_group), key=lambda g: -strength[g])[: config.topk_group]
    allowed = [expert for g in kept for expert in groups[g]]
    return sorted(allowed, key=lambda e: -biased[e])[: config.num_experts_per_tok]


def _by_hand(layer: MoE, x_D: Tensor, config: ModelConfig) -> tuple[Tensor, list[int]]:
    scores = (layer.gate.weight @ x_D).sigmoid()
    chosen = _chosen_by_hand(scores, layer.gate.e_score_correction_bias, config)
    total = sum(scores[e] for e in chosen)
    out = layer.shared_experts(x_D)
    for e in chosen:
        gate, up = (layer.experts.gate_up_proj[e] @ x_D).chunk(2)
        out = out + scores[e] / total * config.routed_scaling_factor * (
            layer.experts.down_proj[e] @ (F.silu(gate) * up)
        )
    return out, chosen


def test_the_layer_is_the_equations_token_by_token() -> None:
    layer = _layer(GROUPED)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    out, loads = layer(x)
    expected = torch.zeros(12, dtype=torch.int64)
    for row, token in ((r, t) for r in range(2) for t in range(7)):
        by_hand, chosen = _by_hand(layer, x[row, token], GROUPED)
        expected[chosen] += 1
        torch.testing.assert_close(out[row, token], by_hand, rtol=1e-5, atol=1e-5)
    assert loads.tolist() == expected.tolist()


def test_gradients_are_the_equations_gradients() -> None:
    layer = _layer(GROUPED)
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(1))
    layer(x)[0].square().sum().backward()
    found = {
        name: parameter.grad.clone()
        for name, parameter in layer.named_parameters()
        if parameter.grad is not None
    }
    layer.zero_grad()
    torch.stack([_by_hand(layer, x[0, t], GROUPED)[0] for t in range(5)]).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_the_bias_chooses_but_does_not_weigh() -> None:
    config = ModelConfig(preset="nano", hidden_size=16, n_routed_experts=4, num_experts_per_tok=2)
    router: Router = _layer(config).gate
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(3))
    router.e_score_correction_bias.copy_(torch.tensor([100.0, 0.0, 50.0, 0.0]))
    chosen, weights_NK = router(x)
    assert set(chosen.flatten().tolist()) == {0, 2}
    scores = (x @ router.weight.T).sigmoid().gather(1, chosen)
    torch.testing.assert_close(weights_NK, scores / scores.sum(1, keepdim=True))


def test_padding_carries_no_load() -> None:
    layer = _layer(GROUPED)
    x = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    _, loads = layer(x, mask)
    apart = sum(layer(x[row : row + 1, : int(mask[row].sum())])[1] for row in range(3))
    assert loads.tolist() == torch.as_tensor(apart).tolist()
    assert loads.sum() == 12 * GROUPED.num_experts_per_tok


def test_the_bias_moves_against_the_load_by_exactly_its_speed() -> None:
    router = Router(GROUPED)
    loads = torch.tensor([5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 9, 1])
    router.update_bias(loads, 0.001)
    step = torch.tensor(0.001)
    assert router.e_score_correction_bias.tolist() == [0.0] * 10 + [-step.item(), step.item()]


def test_balancing_evens_the_loads() -> None:
    """Frozen weights, skewed input: the bias alone must spread the tokens."""
    config = ModelConfig(preset="tick", n_group=1, topk_group=1, num_hidden_layers=2)
    model = Transformer(config).requires_grad_(False)
    weights.initialise(model, seed=1)
    router = model.moe_layers()[0].gate
    router.weight.mul_(20)
    tokens = torch.randint(0, 20, (16, 32), generator=torch.Generator().manual_seed(1))

    def skew() -> float:
        loads = model(tokens).expert_loads[0].float()
        return float(loads.max() / loads.mean())

    before = skew()
    for _ in range(300):
        model.update_router_bias(model(tokens).expert_loads, 0.002)
    assert before > 1.5 and skew() < 1.25


def test_the_bias_stays_fp32_when_the_model_becomes_bf16() -> None:
    layer = _layer(GROUPED)
    before = layer.gate.e_score_correction_bias.clone()
    layer = layer.to(torch.bfloat16)
    assert layer.gate.weight.dtype == torch.bfloat16
    assert torch.equal(layer.gate.e_score_correction_bias, before)
    out, _ = layer(torch.randn(1, 4, 16, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 2])
def test_few_tokens_leave_experts_idle(rows: int) -> None:
    layer = _layer(GROUPED)
    out, loads = layer(torch.randn(rows, 1, 16, generator=torch.Generator().manual_seed(1)))
    assert out.isfinite().all() and loads.sum() == 3 * rows
