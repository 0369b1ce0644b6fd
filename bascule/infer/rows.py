"""The product of a few rows with a large matrix, which is what a decoding step is made of: bound by memory, not by arithmetic.

BLAS libraries reach half of what one core can read there (docs/serve.md has the figures). rows.cpp reaches it, and reads int8
weights as fast. It is compiled for this CPU when it is first asked for (a second); without a C++ compiler nothing is lost but speed.
Its threads are torch's: the OpenMP library is the one that torch has loaded.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

MOST_ROWS = {torch.float32: 3, torch.int8: 512}
"""Above it a product is bound by arithmetic, and oneDNN's blocked one is faster; for int8 with the price of making fp32 of it each time."""
LANES = 16


def product(x: Tensor, weight_NK: Tensor, scale_N: Tensor | None) -> Tensor:
    """x @ weight^T * scale for contiguous CPU tensors, x fp32 and weight fp32 or int8, K a multiple of LANES; rows of x in any shape."""
    library = compiled()
    assert library is not None
    rows, (n, k) = x.numel() // x.shape[-1], weight_NK.shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    run = library.products_i8 if weight_NK.dtype == torch.int8 else library.products_f32
    scale = None if scale_N is None else scale_N.data_ptr()
    run(weight_NK.data_ptr(), scale, x.data_ptr(), y.data_ptr(), rows, n, k)
    return y


@cache
def compiled() -> ctypes.CDLL | None:
    """None where there is no compiler, or one that does not know this source."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    source = resources.files("bascule.infer").joinpath("rows.cpp").read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        part, whole = Path(folder) / "rows.o", Path(folder) / "rows.so"
        compiling = [compiler, "-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-x", "c++", "-c", "-", "-o", str(part)]  # fmt: skip
        try:
            subprocess.run(compiling, input=source, check=True, capture_output=True)
            # linked without -fopenmp: a second OpenMP library in the process would bring threads of its own
            subprocess.run([compiler, "-shared", str(part), "-o", str(whole)], check=True, capture_output=True)  # fmt: skip
            library = ctypes.CDLL(str(whole))
        except (subprocess.CalledProcessError, OSError):
            return None
    for run in (library.products_f32, library.products_i8):
        run.argtypes, run.restype = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3, None
    return library
