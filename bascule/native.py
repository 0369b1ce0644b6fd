"""A small C++ file, compiled for this CPU when it is first asked for and kept for the next process.

A compiler is not promised: without one, or with one that does not know the source, `library` is None and its caller does without.
The OpenMP library is the one that torch has loaded (import torch first). Compiled files lie in the user's cache folder under the hash
of source, flags, compiler and CPU, so that a home directory shared between machines holds one for each.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from importlib import resources
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")


@cache
def library(package: str, source: str) -> ctypes.CDLL | None:
    """The shared library of `source` (a file of `package`); None where it cannot be had."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    text = resources.files(package).joinpath(source).read_bytes()
    try:
        kept = _cache_folder() / f"{Path(source).stem}-{_key(compiler, text)}.so"
        if not kept.exists():
            _compile(compiler, text, kept)
        return ctypes.CDLL(str(kept))
    except (subprocess.CalledProcessError, OSError):
        return _uncached(compiler, text)


def _uncached(compiler: str, text: bytes) -> ctypes.CDLL | None:
    """Where no cache folder can be written."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _compile(compiler, text, Path(folder) / "whole.so")
            return ctypes.CDLL(str(Path(folder) / "whole.so"))
        except (subprocess.CalledProcessError, OSError):
            return None


def _compile(compiler: str, text: bytes, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        part, whole = Path(folder) / "part.o", Path(folder) / "whole.so"
        compiling = [compiler, *FLAGS, "-x", "c++", "-c", "-", "-o", str(part)]
        subprocess.run(compiling, input=text, check=True, capture_output=True)
        # linked without -fopenmp: a second OpenMP library in the process would bring threads of its own
        subprocess.run(
            [compiler, "-shared", str(part), "-o", str(whole)], check=True, capture_output=True
        )
        whole.replace(to)  # two processes at once: both write the same file, the last one stays


def _cache_folder() -> Path:
    try:
        return Path.home() / ".cache" / "bascule"
    except RuntimeError as error:  # a user without a home
        raise OSError("there is no home folder to keep compiled files in") from error


def _key(compiler: str, text: bytes) -> str:
    told = subprocess.run([compiler, "--version"], check=False, capture_output=True).stdout
    about = [text, told, " ".join(FLAGS).encode(), platform.machine().encode(), _cpu()]
    return hashlib.sha256(b"\0".join(about)).hexdigest()[:16]


def _cpu() -> bytes:
    """What -march=native looks at; the first core speaks for all."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor().encode()
    first = info.read_text().partition("\n\n")[0].splitlines()
    told = ("vendor_id", "cpu family", "model\t", "stepping", "flags", "CPU part", "Features")
    return "\n".join(line for line in first if line.startswith(told)).encode()
