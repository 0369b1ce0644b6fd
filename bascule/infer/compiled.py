"""The C++ of this room: products of any number of rows with a matrix laid out for them, and the decoding step made of them (cpp/).

Compiled for this CPU when it is first asked for (some seconds) and kept for later processes in a folder of this user's alone; without a C++
compiler nothing is lost but speed and int8. Its threads are torch's: the OpenMP library is the one that torch has loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

SOURCE = Path(__file__).parent / "cpp" / "decode.cpp"
COMPILING = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-c"]  # fmt: skip


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

    def product(self, x: Tensor) -> Tensor:
        """x @ weight^T * scale + bias for an fp32 x on the CPU, rows of x in any shape. A row's bits do not depend on the others."""
        library = compiled()
        assert library is not None
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.record.n)
        library.multiply(ctypes.byref(self.record), x.data_ptr(), y.data_ptr(), x.numel() // x.shape[-1])  # fmt: skip
        return y


def laid(weight_NK: Tensor) -> Tensor:
    """[N / width, K, width], with zeros behind the last row."""
    library = compiled()
    if library is None:
        raise RuntimeError("Panels were asked for without a C++ compiler.")
    width = library.panel_width(weight_NK.element_size())
    padded = F.pad(weight_NK.detach(), (0, 0, 0, -weight_NK.shape[0] % width))
    return torch.unflatten(padded, 0, (-1, width)).transpose(1, 2).contiguous()


@cache
def compiled() -> ctypes.CDLL | None:
    """None where there is no compiler, or one that does not know this source; `why_not` says so."""
    return _outcome()[0]


def why_not() -> str:
    """Why there is nothing compiled, "" where there is."""
    return _outcome()[1]


@cache
def _outcome() -> tuple[ctypes.CDLL | None, str]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None, "neither g++ nor clang++ was found"
    kept = _kept(compiler)
    try:
        if kept is None or not kept.exists():
            with tempfile.TemporaryDirectory(dir=None if kept is None else kept.parent) as folder:
                library = _load(_compile(compiler, Path(folder), kept))
        else:
            library = _load(kept)
    except subprocess.CalledProcessError as error:
        return None, f"{compiler} refused the kernel: {error.stderr.decode(errors='replace')[-300:].strip()}"  # fmt: skip
    except OSError as error:
        return None, f"what {compiler} made of the kernel cannot be loaded: {error}"
    return library, ""


def _compile(compiler: str, folder: Path, kept: Path | None) -> Path:
    """The library, under the name `kept` where there is one. Whoever compiles at the same time does not meet half a file."""
    part, whole = folder / "decode.o", folder / "decode.so"
    subprocess.run([compiler, *COMPILING, str(SOURCE), "-o", str(part)], check=True, capture_output=True)  # fmt: skip
    # linked without -fopenmp: a second OpenMP library in the process would bring threads of its own
    subprocess.run([compiler, "-shared", str(part), "-o", str(whole)], check=True, capture_output=True)  # fmt: skip
    return whole if kept is None else whole.replace(kept)


def _kept(compiler: str) -> Path | None:
    """Where the library for this source, compiler and CPU is kept; None where the folder could be another user's: it holds code."""
    folder = Path(tempfile.gettempdir()) / f"bascule-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
    except OSError:
        return None
    if folder.is_symlink() or about.st_uid != os.getuid() or about.st_mode & 0o077:
        return None
    digest = hashlib.sha256("\0".join([compiler, *COMPILING, _processor()]).encode())
    for file in sorted(SOURCE.parent.iterdir()):
        digest.update(file.read_bytes())
    return folder / f"decode-{digest.hexdigest()[:32]}.so"


def _processor() -> str:
    """What -march=native sees, near enough."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    return "".join(line for line in lines[:40] if line.startswith(("model name", "flags", "Features"))) or platform.processor()  # fmt: skip


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.multiply.argtypes, library.multiply.restype = [pointer] * 3 + [number], None
    library.decode.argtypes, library.decode.restype = [pointer] * 5 + [number] * 3 + [pointer], None
    library.panel_width.argtypes, library.panel_width.restype = [number], number
    return library
