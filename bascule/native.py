"""A C++ file of ours, compiled for this CPU when it is first asked for and kept for the next process.

A compiler is not promised: without one, or with one that does not know the source, there is no library but the reason why, and the
caller does without. The OpenMP library is the one that torch has loaded (import torch first). Compiled files lie in the user's cache folder
under the hash of source, headers, flags, compiler and CPU, so that a home directory shared between machines holds one for each.
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

FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")  # fmt: skip


@dataclass(frozen=True)
class Built:
    """`library` is None where there is none to be had; `why` then says so in words, else it is empty."""

    library: ctypes.CDLL | None
    why: str = ""


@cache
def build(source: Path) -> Built:
    """Compile `source`, which may include the headers that lie beside it, or take what an earlier process compiled."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return Built(None, "neither g++ nor clang++ was found")
    try:
        return Built(_library(compiler, source))
    except subprocess.CalledProcessError as error:
        told = error.stderr.decode(errors="replace")[-300:].strip()
        return Built(None, f"{compiler} refused {source.name}: {told}")
    except OSError as error:
        return Built(None, f"what {compiler} made of {source.name} cannot be loaded: {error}")


def _library(compiler: str, source: Path) -> ctypes.CDLL:
    try:
        kept = _cache_folder() / f"{source.stem}-{_key(compiler, source)}.so"
        _claim(kept.parent)
        if not kept.exists():
            _compile(compiler, source, kept)
        return ctypes.CDLL(str(kept))
    except OSError:
        # No folder of our own can be written, or what lies there cannot be loaded (mounted without the right to execute, torn).
        with tempfile.TemporaryDirectory() as folder:
            _compile(compiler, source, Path(folder) / "whole.so")
            return ctypes.CDLL(str(Path(folder) / "whole.so"))


def _compile(compiler: str, source: Path, to: Path) -> None:
    with tempfile.TemporaryDirectory(dir=to.parent) as folder:
        part, whole = Path(folder) / "part.o", Path(folder) / "whole.so"
        compiling = [compiler, *FLAGS, "-c", str(source), "-o", str(part)]
        subprocess.run(compiling, check=True, capture_output=True)
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


def _claim(folder: Path) -> None:
    """It holds code that we run: raises OSError where another user could write to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise PermissionError(f"'{folder}' can be written by other users")


def _key(compiler: str, source: Path) -> str:
    texts = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    told = subprocess.run([compiler, "--version"], check=False, capture_output=True).stdout
    about = [*texts, told, " ".join(FLAGS).encode(), platform.machine().encode(), _cpu()]
    return hashlib.sha256(b"\0".join(about)).hexdigest()[:16]


def _cpu() -> bytes:
    """What -march=native looks at; the first core speaks for all."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor().encode()
    first = info.read_text().partition("\n\n")[0].splitlines()
    told = ("vendor_id", "cpu family", "model\t", "stepping", "flags", "CPU part", "Features")
    return "\n".join(line for line in first if line.startswith(told)).encode()
