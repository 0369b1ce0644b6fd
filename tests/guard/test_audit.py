"""Audits: the referee recomputes one part from what the chip saw, and finds errors in any of its tensors."""

from __future__ import annotations

import pytest
import torch

from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.model import ModelConfig
from bascule.guard import audit
from bascule.model import weights
from bascule.model.transformer import Transformer

REFEREE = CpuAccelerator("cpu")


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(ModelConfig(preset="tick", vocab_size=32))
    weights.initialise(model, 0)
    return model


def step(model: Transformer, part: audit.Part | None = None):  # type: ignore[no-untyped-def]
    tokens = torch.randint(0, 32, (4, 13), generator=torch.Generator().manual_seed(1))
    capture = None
    if part is None:
        loss = torch.nn.functional.cross_entropy(
            model(tokens[:, :-1]).logits_BTV.flatten(0, 1), tokens[:, 1:].flatten()
        )
        found = torch.autograd.grad(loss, list(model.parameters()))
    else:
        with audit.capturing(part, 1) as capture:
            loss = torch.nn.functional.cross_entropy(
                model(tokens[:, :-1]).logits_BTV.flatten(0, 1), tokens[:, 1:].flatten()
            )
            found = torch.autograd.grad(loss, list(model.parameters()))
    return dict(zip([name for name, _ in model.named_parameters()], found, strict=True)), capture


def test_parts_cover_the_model_and_take_turns(model: Transformer) -> None:
    parts = audit.parts(model)
    assert [part.name for part in parts] == [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.norm",
        "lm_head",
    ]
    assert [part.chained for part in parts] == [False, True, True, False, False]
    for round_ in range(3):
        assert {audit.turn(parts, 5 * round_ + i).name for i in range(5)} == {
            part.name for part in parts
        }


def test_capturing_changes_no_bit_and_a_right_part_agrees(model: Transformer) -> None:
    plain, _ = step(model)
    for part in audit.parts(model):
        grads, capture = step(model, part)
        assert all(torch.equal(grads[name], plain[name]) for name in plain)
        finding = audit.judge(capture, grads, REFEREE)
        assert finding is not None and finding.worst is None and finding.bit_equal
        assert finding.tensors >= (10 if part.chained else 1)


def test_a_part_that_never_ran_is_no_finding(model: Transformer) -> None:
    grads, capture = step(model, audit.Part("elsewhere", torch.nn.Linear(2, 2), chained=False))
    assert audit.judge(capture, grads, REFEREE) is None


@pytest.mark.parametrize("where", ["outputs", "input_grads", "weight gradient"])
@pytest.mark.parametrize(
    "spoil",
    [lambda x: x.mul_(1.001), lambda x: x[..., ::4].zero_(), lambda x: x.view(-1)[3:4].neg_()],
    ids=["gain", "zeroed", "sign"],
)
def test_any_spoilt_tensor_is_found(model: Transformer, where: str, spoil: object) -> None:
    part = audit.parts(model)[2]
    grads, capture = step(model, part)
    name = "model.layers.1.self_attn.o_proj.weight"
    target = {
        "outputs": capture.outputs[0],
        "input_grads": capture.input_grads[0],
        "weight gradient": grads[name],
    }[where]
    spoil(target)  # type: ignore[operator]
    finding = audit.judge(capture, grads, REFEREE)
    assert finding is not None and finding.worst is not None
    assert finding.worst.error > finding.worst.bound or "not finite" in finding.worst.reason


def test_another_order_of_summation_is_within_the_measured_noise(model: Transformer) -> None:
    """What another kind of chip does when it is right: every result moved by a rounding or two."""
    part = audit.parts(model)[1]
    grads, capture = step(model, part)
    generator = torch.Generator().manual_seed(2)

    def rounded_otherwise(x: torch.Tensor) -> None:
        x.mul_(1.0 + 2.0**-23 * torch.randn(x.shape, generator=generator))

    for tensor in (
        *capture.outputs,
        *capture.input_grads.values(),
        *(g for n, g in grads.items() if n.startswith("model.layers.0.")),
    ):
        rounded_otherwise(tensor)
    finding = audit.judge(capture, grads, REFEREE)
    assert finding is not None and not finding.bit_equal and finding.worst is None


def test_a_head_that_keeps_no_logits_is_audited_as_one_part(model: Transformer) -> None:
    part = audit.parts(model)[-1]
    tokens = torch.randint(0, 32, (4, 12), generator=torch.Generator().manual_seed(1))
    with audit.capturing(part, 1) as capture:
        output = model(tokens, head_later=True)
        logp_M, _ = output.head(output.hidden_BTD.flatten(0, 1), tokens.flatten())
        found = torch.autograd.grad(-logp_M.mean(), list(model.parameters()))
    grads = dict(zip([name for name, _ in model.named_parameters()], found, strict=True))
    finding = audit.judge(capture, grads, REFEREE)
    assert part.name == "lm_head" and finding is not None and finding.bit_equal
    capture.outputs[0].mul_(1.001)
    spoilt = audit.judge(capture, grads, REFEREE)
    assert spoilt is not None and spoilt.worst is not None
