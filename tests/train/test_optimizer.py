"""Muon is orthogonal and batched, AdamW is AdamW, and the state travels by name."""

from __future__ import annotations

import pytest
import torch

from bascule.config.model import ModelConfig
from bascule.errors import SnapshotError
from bascule.model import weights
from bascule.model.transformer import Transformer
from bascule.train.optimizer import SplitOptimizer, is_matrix, orthogonalise


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_orthogonalise_brings_singular_values_near_one_and_keeps_the_vectors():
    x = draw(3, 16, 40)
    y = orthogonalise(x)
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.6 and values.max() < 1.3
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ y @ vh.mT
    off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-4


def test_a_stack_of_experts_is_updated_as_its_matrices_one_by_one():
    experts, grads = draw(4, 24, 16), draw(4, 24, 16, seed=1)
    together = {"experts": experts.clone()}
    SplitOptimizer(together, learning_rate=1e-3, muon_learning_rate=0.1).step(
        {"experts": grads}, factor=1.0
    )
    for expert in range(4):
        alone = {"w": experts[expert].clone()}
        SplitOptimizer(alone, learning_rate=1e-3, muon_learning_rate=0.1).step(
            {"w": grads[expert]}, factor=1.0
        )
        torch.testing.assert_close(together["experts"][expert], alone["w"], rtol=1e-5, atol=1e-6)


def test_lying_and_standing_matrices_share_a_stack_and_get_transposed_updates_up_to_the_scale():
    w, g = draw(8, 32), draw(8, 32, seed=1)
    parameters = {"lying": w.clone(), "standing": w.mT.clone()}
    optimizer = SplitOptimizer(parameters, learning_rate=1e-3, muon_learning_rate=0.1)
    optimizer.step({"lying": g, "standing": g.mT}, factor=1.0)
    assert len(optimizer._stacks) == 1
    moved_lying, moved_standing = parameters["lying"] - w, parameters["standing"] - w.mT
    torch.testing.assert_close(
        moved_standing.mT, moved_lying * 2.0, rtol=1e-4, atol=1e-6
    )  # sqrt(32 / 8)


def test_muon_moves_every_direction_alike_however_small_the_gradient():
    for size in (1.0, 1e-5):
        p = {"w": torch.zeros(16, 16)}
        SplitOptimizer(p, learning_rate=1e-3, muon_learning_rate=0.1).step(
            {"w": draw(16, 16) * size}, factor=1.0
        )
        values = torch.linalg.svdvals(p["w"])
        assert values.min() > 0.05 and values.max() < 0.13


def test_adamw_is_torchs_adamw():
    ours, theirs = {"norm.weight": draw(50)}, torch.nn.Parameter(draw(50))
    optimizer = SplitOptimizer(ours, learning_rate=0.01)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(20):
        grad = draw(50, seed=step + 1)
        optimizer.step({"norm.weight": grad}, factor=0.5)
        reference.param_groups[0]["lr"] = 0.005
        theirs.grad = grad
        reference.step()
    torch.testing.assert_close(ours["norm.weight"], theirs.detach(), rtol=1e-5, atol=1e-7)


def test_weight_decay_shrinks_matrices_only():
    p = {"w": torch.ones(4, 4), "norm.weight": torch.ones(4)}
    optimizer = SplitOptimizer(p, learning_rate=0.1, weight_decay=0.5)
    optimizer.step({"w": torch.zeros(4, 4), "norm.weight": torch.zeros(4)}, factor=1.0)
    assert torch.equal(p["w"], torch.full((4, 4), 0.95)) and torch.equal(
        p["norm.weight"], torch.ones(4)
    )


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_muon_takes_the_matrices_of_a_real_model_and_nothing_else(attention):
    model = Transformer(ModelConfig(preset="tick", attention=attention, tie_word_embeddings=False))
    parameters = dict(model.named_parameters())
    taken = {name for name, p in parameters.items() if is_matrix(name, p)}
    assert {name for name in taken if "experts.gate_up_proj" in name and parameters[name].ndim == 3}
    assert not [
        name
        for name in taken
        if "embed" in name
        or "lm_head" in name
        or "norm" in name
        or name.endswith("mlp.gate.weight")
    ]
    left = {name for name, p in parameters.items() if p.ndim >= 2} - taken
    assert left == {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight"}


def test_state_goes_out_and_in_without_changing_what_follows():
    model = Transformer(ModelConfig(preset="tick"))
    weights.initialise(model, 0)
    names = dict(model.named_parameters())
    grads = [{n: draw(*p.shape, seed=s) for n, p in names.items()} for s in range(3)]
    one = {n: p.detach().clone() for n, p in names.items()}
    optimizer = SplitOptimizer(one, learning_rate=1e-3, muon_learning_rate=0.02)
    optimizer.step(grads[0], factor=1.0)
    two = {n: p.clone() for n, p in one.items()}
    other = SplitOptimizer(two, learning_rate=1e-3, muon_learning_rate=0.02)
    other.load_state_dict(optimizer.state_dict())
    for each in grads[1:]:
        optimizer.step(each, factor=0.7, grad_scale=0.5)
        other.step(each, factor=0.7, grad_scale=0.5)
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_state_of_another_phase_is_refused():
    muon = SplitOptimizer({"w": draw(4, 4)}, learning_rate=1e-3, muon_learning_rate=0.02)
    adamw = SplitOptimizer({"w": draw(4, 4)}, learning_rate=1e-3)
    with pytest.raises(SnapshotError, match="names differ"):
        adamw.load_state_dict(muon.state_dict())
