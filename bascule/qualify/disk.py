"""A disk that takes no more says nothing about a chip: the battery ends there, without a verdict, and the same command asks again.

The child cannot say so in its answers, which lie on that disk: its exit code tells. No torch.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from bascule.errors import UsageError

EXIT_UNWRITABLE = 74  # EX_IOERR of sysexits.h

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def is_unwritable(error: OSError) -> bool:
    """Full, over a quota or a size limit, or mounted for reading only."""
    return error.errno in _UNWRITABLE


def refusal(pool: str, folder: Path) -> UsageError:
    free = shutil.disk_usage(folder).free / 2**20
    writable = "" if os.access(folder, os.W_OK) else ", which is mounted for reading only"
    return UsageError(
        f"The examination of '{pool}' could not write into '{folder}'{writable} (free there: {free:.1f} MiB; a small model's examination takes "
        "some 10). That says nothing about the chip, and no verdict is given. Make room, or lift the limit on file sizes (ulimit -f), and "
        "run the same command again."
    )
