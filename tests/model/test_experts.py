"""The ways to call a layer's experts give the same numbers and gradients; those for accelerators ask the host for nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bascule.config.model import ModelConfig
from bascule.model.experts import Experts
from tests.waits import Waits

EXPERTS, HIDDEN, SIZE = 6, 16, 8


def experts(dtype: torch.dtype = torch.float32) -> Experts:
    config = ModelConfig(
        preset="tick", hidden_size=HIDDEN, moe_intermediate_size=SIZE, n_routed_experts=EXPERTS, num_experts_per_tok=2
    )  # fmt: skip
    made = Experts(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made.to(dtype)


def rows(counts: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype)


def results(form: str, counts: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output, and the gradients of the rows and of both stacks."""
    made, x = experts(dtype), rows(counts, dtype).requires_grad_()
    out = getattr(made, form)(x, torch.tensor(counts))
    (out * torch.arange(1.0, HIDDEN + 1).to(dtype)).sum().backward()
    return [out.detach(), x.grad, made.gate_up_proj.grad, made.down_proj.grad]  # type: ignore[list-item]


@st.composite
def two_choices_a_token(draw: st.DrawFn) -> list[int]:
    """How many rows each expert gets when every token chooses two."""
    tokens = draw(st.lists(st.permutations(range(EXPERTS)).map(lambda p: p[:2]), min_size=1, max_size=9))  # fmt: skip
    return [sum(expert in chosen for chosen in tokens) for expert in range(EXPERTS)]


@pytest.mark.parametrize("form", ["chosen", "padded"])
@given(counts=two_choices_a_token())
@settings(deadline=None, max_examples=40)
def test_forms_that_do_not_wait_are_the_slices(form: str, counts: list[int]) -> None:
    for found, expected in zip(results(form, counts), results("sliced", counts), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_grouped_product_in_bf16_is_the_slices_in_bf16() -> None:
    counts = [3, 0, 5, 1, 0, 7]
    grouped, sliced = (results(form, counts, torch.bfloat16) for form in ("grouped", "sliced"))
    for found, expected in zip(grouped, sliced, strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("form", ["chosen", "padded"])
def test_they_ask_the_host_for_nothing(form: str) -> None:
    made, counts = experts(), [3, 0, 5, 1, 0, 7]
    with Waits() as waits:
        getattr(made, form)(rows(counts), torch.tensor(counts)).sum().backward()
    assert not waits.seen


@pytest.mark.parametrize("tokens,form", [(1, "chosen"), (2, "padded"), (128, "padded"), (129, "sliced")])  # fmt: skip
def test_on_a_device_the_number_of_rows_decides(
    tokens: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, called = experts().to("meta"), []
    for name in ("chosen", "padded", "grouped", "sliced"):
        monkeypatch.setattr(made, name, lambda rows, counts, name=name: called.append(name))
    made(torch.empty(2 * tokens, HIDDEN, device="meta"), torch.empty(EXPERTS, device="meta"))
    assert called == [form]


def test_a_copy_keeps_how_many_experts_a_token_has() -> None:
    assert copy.deepcopy(experts()).per_token == 2
