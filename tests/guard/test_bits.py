"""Bits and lengths of weights in one pass: every flip is seen, and both roads, compiled and PyTorch's, agree."""

from __future__ import annotations

import pytest
import torch

from bascule.guard import bits
from bascule.guard.bits import Survey, changed, lengths

SIZES = [(1,), (7,), (8,), (33,), (4096,), (4097,), (3, 5), (64, 96), (2, 3, 1001)]


def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size) for size in SIZES]


@pytest.fixture(params=["compiled", "PyTorch"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "PyTorch":
        monkeypatch.setattr(bits, "compiled", lambda: None)
    return str(request.param)


def test_lengths_are_the_2_norms(road: str) -> None:
    given = tensors()
    _, found = Survey(given).look()
    assert torch.allclose(found.double(), torch.stack([x.double().norm() for x in given]), rtol=1e-5)  # fmt: skip
    assert torch.allclose(found.double(), lengths(given).double(), rtol=1e-5)


def test_every_flip_of_any_bit_anywhere_is_seen_and_named_and_gone_when_it_is_flipped_back(
    road: str,
) -> None:
    given = tensors()
    names = [str(size) for size in SIZES]
    survey = Survey(given)
    before, _ = survey.look()
    assert changed(before, survey.look()[0], names) is None
    for which, tensor in enumerate(given):
        flat = tensor.view(-1).view(torch.int32)
        for place in {0, flat.numel() // 2, flat.numel() - 1}:
            for bit in (0, 13, 23, 31):
                flat[place] ^= -(2**31) if bit == 31 else 1 << bit
                assert changed(before, survey.look()[0], names) == names[which]
                flat[place] ^= -(2**31) if bit == 31 else 1 << bit
    assert changed(before, survey.look()[0], names) is None


def test_the_number_of_threads_changes_nothing() -> None:
    survey, threads = Survey([torch.randn(100_003), *tensors()]), torch.get_num_threads()
    first = survey.look()
    try:
        torch.set_num_threads(1)
        assert all(map(torch.equal, survey.look(), first))
    finally:
        torch.set_num_threads(threads)


def test_other_types_and_tensors_that_do_not_lie_dense_are_looked_at_too() -> None:
    given = [torch.randn(6, 4).T, torch.randn(5).double(), torch.randn(9).bfloat16()]
    survey = Survey(given)
    before, found = survey.look()
    assert found.shape == (3,)
    given[0][1, 1] += 1.0
    assert changed(before, survey.look()[0], ["turned", "wide", "half"]) == "turned"


def test_what_is_not_finite_has_no_finite_length(road: str) -> None:
    given = [torch.ones(20), torch.ones(20)]
    given[1][3] = torch.nan
    assert torch.isfinite(Survey(given).look()[1]).tolist() == [True, False]


def test_tensors_that_moved_are_not_those_of_the_first_look() -> None:
    given = tensors()
    survey = Survey(given)
    assert survey.still_of(given)
    assert not survey.still_of([x.clone() for x in given])
    assert not survey.still_of(given[1:])
