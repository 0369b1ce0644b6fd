"""torch's fused AdamW is AdamW, leaves the gradients alone, is probed before it is trusted. That the guard sees its mistakes: tests/guard/test_guard.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bascule.config.model import ModelConfig
from bascule.model import kernels, weights
from bascule.model.transformer import Transformer
from bascule.train import fused_adamw
from bascule.train.optimizer import SplitOptimizer

CPU = torch.device("cpu")


def model_and_grads(count: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    model = Transformer(ModelConfig(preset="tick", vocab_size=32))
    weights.initialise(model, 0)
    named = {name: p.detach() for name, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(1)
    return named, [
        {name: torch.randn(p.shape, generator=draw) for name, p in named.items()}
        for _ in range(count)
    ]


def copies(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.clone() for name, p in named.items()}


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_it_is_the_formula_and_the_gradients_stay_as_they_were(
    muon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_adamw, "MOST_ELEMENTS", 1_000)
    start, grads = model_and_grads(6)
    ours, fused = copies(start), copies(start)
    rates = {"learning_rate": 1e-2, "muon_learning_rate": muon, "weight_decay": 0.1}
    plain, whole = SplitOptimizer(ours, fused=False, **rates), SplitOptimizer(fused, fused=True, **rates)  # fmt: skip
    assert len(whole._bundles) > 1 and not whole._single and not plain._bundles
    for step, grad in enumerate(grads):
        kept = copies(grad)
        scale = 1.0 if step % 2 else 0.25
        with kernels.plain():
            plain.step(grad, factor=0.5, grad_scale=scale)
        whole.step(grad, factor=0.5, grad_scale=scale)
        assert all(torch.equal(grad[name], kept[name]) for name in grad)
    for name, p in ours.items():
        torch.testing.assert_close(fused[name], p, rtol=1e-5, atol=1e-6, msg=name)


def test_its_state_goes_out_and_in_without_changing_what_follows() -> None:
    start, grads = model_and_grads(3)
    one = copies(start)
    optimizer = SplitOptimizer(one, learning_rate=1e-3, fused=True)
    optimizer.step(grads[0], factor=1.0)
    two = copies(one)
    other = SplitOptimizer(two, learning_rate=1e-3, fused=True)
    other.load_state_dict(optimizer.state_dict())
    for grad in grads[1:]:
        optimizer.step(grad, factor=0.7, grad_scale=0.5)
        other.step(grad, factor=0.7, grad_scale=0.5)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_transposed_gradient_is_read_by_its_places_and_a_transposed_weight_is_left_to_the_pieces() -> (
    None
):
    grad, weight = torch.arange(6.0).reshape(3, 2), torch.ones(2, 3)
    straight, turned = {"w": weight.clone()}, {"w": weight.clone()}
    SplitOptimizer(straight, learning_rate=0.1, fused=True).step({"w": grad.mT.contiguous()}, factor=1.0)  # fmt: skip
    SplitOptimizer(turned, learning_rate=0.1, fused=True).step({"w": grad.mT}, factor=1.0)
    assert torch.equal(straight["w"], turned["w"])
    odd = SplitOptimizer({"w": torch.ones(3, 2).mT}, learning_rate=0.1, fused=True)
    assert odd._single == ["w"] and not odd._bundles


def test_the_cpu_uses_our_own_unless_it_is_asked() -> None:
    p = {"w": torch.ones(2, 2)}
    assert SplitOptimizer(p, learning_rate=0.1)._single == ["w"]
    assert fused_adamw.why_not(CPU) == ""


def test_a_kernel_that_is_missing_or_wrong_is_not_used_and_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe = fused_adamw.why_not.__wrapped__
    assert "refuses this device" in probe(torch.device("meta"))
    right = fused_adamw.adamw

    def shy(params: list[Tensor], *rest: object, lr: float, **words: object) -> None:
        right(params, *rest, lr=0.999 * lr, **words)

    monkeypatch.setattr(fused_adamw, "adamw", shy)
    assert "off by 1.0e-04 in a first step of 0.1" in probe(CPU)


@pytest.mark.gpu
def test_on_a_gpu_it_is_taken_unasked_is_the_formula_and_never_waits_for_the_chip() -> None:
    start, grads = model_and_grads(4)
    ours, theirs = copies(start), {name: p.cuda() for name, p in start.items()}
    plain = SplitOptimizer(ours, learning_rate=1e-2, weight_decay=0.1)
    fused = SplitOptimizer(theirs, learning_rate=1e-2, weight_decay=0.1)
    assert fused._bundles and not fused._single, fused_adamw.why_not(torch.device("cuda", 0))
    placed = [{name: g.cuda() for name, g in grad.items()} for grad in grads]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for grad in placed:
            fused.step(grad, factor=0.5, grad_scale=0.25)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for grad in grads:
        plain.step(grad, factor=0.5, grad_scale=0.25)
    for name, p in ours.items():
        torch.testing.assert_close(theirs[name].cpu(), p, rtol=1e-5, atol=1e-6, msg=name)
