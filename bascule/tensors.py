"""Tensors into a safetensors file, with a full disk reported as the OSError it is.

safetensors raises its own SafetensorError when the system refuses a write, which no handler of OSError catches. Every room that
writes tensors writes them here.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_OS_ERROR = re.compile(r"os error (\d+)")


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to `path`; they must be contiguous and may share no memory. Raises OSError, with its number and `path`."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        raise _as_os_error(error, path) from None


def _as_os_error(error: SafetensorError, path: Path) -> OSError:
    """safetensors keeps the system's number only in its text, and not always: then EIO stands for it."""
    told = _OS_ERROR.search(str(error))
    number = int(told.group(1)) if told else errno.EIO
    text = os.strerror(number) if told else f"Could not write the tensors ({error})"
    return OSError(number, text, str(path))
