"""The C++ of this room: products of any number of rows with a matrix laid out for them, and the decoding step made of them (cpp/).

Compiled for this CPU when it is first asked for (bascule/native.py); without a C++ compiler nothing is lost but speed and int8. Its threads are
torch's: the OpenMP library is the one that torch has loaded.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bascule import native
from bascule.infer import large_pages

SOURCE = Path(__file__).parent / "cpp" / "decode.cpp"


class Matrix(ctypes.Structure):
    """cpp/products.h: panels of weights, the scale of each row where they are int8, bias; N rows and K columns."""

    _fields_ = [("w", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("n", ctypes.c_long), ("k", ctypes.c_long)]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Panels:
    """A matrix (N, K) as the kernel reads it: its tensors, and the record that points at them."""

    record: Matrix
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, weight_NK: Tensor, scale_N: Tensor | None = None, bias_N: Tensor | None = None) -> Panels:  # fmt: skip
        """fp32, or int8 with the scale of each row. Raises RuntimeError without a compiler: ask `compiled` first."""
        n, k = weight_NK.shape
        panels = laid(weight_NK)
        scale, bias = (None if one is None else one.detach().contiguous().flatten() for one in (scale_N, bias_N))  # fmt: skip
        record = Matrix(
            panels.data_ptr(),
            None if scale is None else scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            n,
            k,
        )
        return cls(record, tuple(one for one in (panels, scale, bias) if one is not None))

    def product(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x @ weight^T * scale + bias for an fp32 x on the CPU, rows of x in any shape, into `out` where it is given. A row's bits do not
        depend on the others."""
        library = compiled()
        assert library is not None
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.record.n) if out is None else out
        library.multiply(ctypes.byref(self.record), x.data_ptr(), y.data_ptr(), x.numel() // x.shape[-1])  # fmt: skip
        return y


def laid(weight_NK: Tensor) -> Tensor:
    """[N / width, K, width], with zeros behind the last row. Several matrices of one shape, (H, N, K), come to lie one after the other."""
    library = compiled()
    if library is None:
        raise RuntimeError("Panels were asked for without a C++ compiler.")
    width = library.panel_width(weight_NK.element_size())
    padded = F.pad(weight_NK.detach(), (0, 0, 0, -weight_NK.shape[-2] % width))
    panels = torch.unflatten(padded, -2, (-1, width)).transpose(-2, -1)
    return large_pages.take(panels.shape, panels.dtype).copy_(panels)


def compiled() -> ctypes.CDLL | None:
    """None where there is no compiler, or one that does not know this source; `why_not` says so."""
    return _outcome().library


def why_not() -> str:
    """Why there is nothing compiled, "" where there is."""
    return _outcome().why


@cache
def _outcome() -> native.Built:
    built = native.build(SOURCE)
    if (library := built.library) is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_long
        library.multiply.argtypes, library.multiply.restype = [pointer] * 3 + [number], None
        library.decode.argtypes, library.decode.restype = [pointer] * 5 + [number] * 3 + [pointer], None  # fmt: skip
        library.panel_width.argtypes, library.panel_width.restype = [number], number
        torch.get_num_threads()  # loads the OpenMP library, should nothing have done so yet
    return built
