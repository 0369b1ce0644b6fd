"""Memory for weights: nobody gets what another has, and what nobody has any more goes back."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from bascule.infer import large_pages

SHAPES = [(3, 5), (1,), (7, 11, 13), (0, 4), (large_pages.CHUNK // 4 + 9,), (2, 2)]


@pytest.fixture(params=["asked for", "not known here", "refused"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The three systems there are. None may change what a caller gets."""
    monkeypatch.setattr(large_pages, "_chunk", torch.empty(0, dtype=torch.uint8))
    if request.param == "not known here":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    if request.param == "refused":
        monkeypatch.setattr(
            mmap, "MADV_HUGEPAGE", 9999, raising=False
        )  # a word that the kernel does not know
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_tensors_begin_at_a_line_and_overlap_nowhere(kind: str, dtype: torch.dtype) -> None:
    taken = [large_pages.take(shape, dtype) for shape in SHAPES]
    assert [tuple(one.shape) for one in taken] == SHAPES
    assert all(one.dtype == dtype and one.is_contiguous() for one in taken)
    assert not any(one.data_ptr() % large_pages.LINE for one in taken if one.numel())
    for number, one in enumerate(taken):
        one.fill_(number)
    assert all(bool((one == number).all()) for number, one in enumerate(taken))


def test_a_chunk_goes_back_with_its_last_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    live: list[int] = []

    class Counted(mmap.mmap):
        def __new__(cls, *args: object, **words: object) -> Counted:
            live.append(1)
            return super().__new__(cls, *args, **words)  # type: ignore[arg-type]

        def __del__(self) -> None:
            live.pop()

    monkeypatch.setattr(large_pages, "_chunk", torch.empty(0, dtype=torch.uint8))
    monkeypatch.setattr(mmap, "mmap", Counted)
    first, second = (large_pages.take((large_pages.CHUNK // 2,), torch.int8) for _ in range(2))
    third = large_pages.take((5,), torch.float32)  # begins a chunk of its own
    gc.collect()
    assert len(live) == 2
    del first
    gc.collect()
    assert len(live) == 2
    second.fill_(3)
    del second
    gc.collect()
    assert len(live) == 1
    third.fill_(1)
