"""The head asked for targets, without keeping its logits: held to logits that are kept, in fp64 and by its memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.model import count
from bascule.model.head import Head


def asked(rows: int, vocabulary: int = 37, hidden: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Head, torch.Tensor, torch.Tensor]:  # fmt: skip
    torch.manual_seed(0)
    one = Head(hidden, vocabulary).to(dtype)
    given_MD = torch.randn(rows, hidden, dtype=dtype, requires_grad=True)
    return one, given_MD, torch.randint(vocabulary, (rows,))


@settings(deadline=None)  # the first call starts thread pools
@given(rows=st.integers(1, 23), chunk=st.integers(1, 9), temperature=st.sampled_from([1.0, 0.7]))
def test_in_chunks_of_any_size_values_and_gradients_are_those_of_kept_logits(
    rows: int, chunk: int, temperature: float
) -> None:
    one, hidden_MD, targets_M = asked(rows)
    weights_M = torch.randn(rows, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(count, "LOGITS_CHUNK_BYTES", chunk * 4 * one.out_features)
        logp_M, entropy_M = one(hidden_MD, targets_M, temperature)
    plain_MV = torch.log_softmax(one(hidden_MD) / temperature, -1)
    plain_M = plain_MV.gather(-1, targets_M[:, None])[:, 0]
    # the logits are rounded to fp32 in both
    torch.testing.assert_close(logp_M.double(), plain_M, rtol=0, atol=2e-6)
    entropies = -(plain_MV.exp() * plain_MV).sum(-1)
    torch.testing.assert_close(entropy_M.double(), entropies, rtol=0, atol=4e-6)
    ours = torch.autograd.grad((logp_M * weights_M).sum(), [hidden_MD, one.weight])
    theirs = torch.autograd.grad((plain_M * weights_M).sum(), [hidden_MD, one.weight])
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_half_precision_weights_get_gradients_of_their_type_summed_in_fp32() -> None:
    one, hidden_MD, targets_M = asked(300, dtype=torch.bfloat16)
    logp_M, _ = one(hidden_MD, targets_M)
    assert logp_M.dtype == torch.float32
    dhidden, dweight = torch.autograd.grad(logp_M.sum(), [hidden_MD, one.weight])
    assert dhidden.dtype == dweight.dtype == torch.bfloat16
    wide = Head(8, 37).double()
    wide.weight.data.copy_(one.weight.detach())
    exact_M, _ = wide(hidden_MD.detach().double(), targets_M)
    (exact,) = torch.autograd.grad(exact_M.sum(), [wide.weight])
    error = (dweight.double() - exact).norm() / exact.norm()
    assert float(error) < 0.01


def test_entropy_of_a_uniform_policy_is_the_logarithm_of_its_size() -> None:
    one = Head(4, 8)
    torch.nn.init.zeros_(one.weight)
    _, entropy_M = one(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64))
    assert entropy_M.tolist() == pytest.approx([math.log(8)] * 3)
    assert not entropy_M.requires_grad


def test_no_block_of_logits_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the chunks are for: the largest tensor that forward and backward make."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for each in torch.utils._pytree.tree_leaves(out):
                if isinstance(each, torch.Tensor):
                    largest = max(largest, each.numel())
            return out

    one, hidden_MD, targets_M = asked(4096, vocabulary=64, dtype=torch.float32)
    monkeypatch.setattr(count, "LOGITS_CHUNK_BYTES", 4 * 64 * 128)
    with Sizes():
        logp_M, _ = one(hidden_MD, targets_M)
        torch.autograd.grad(logp_M.sum(), [hidden_MD, one.weight])
    assert largest == max(128 * 64, 4096 * 8)
