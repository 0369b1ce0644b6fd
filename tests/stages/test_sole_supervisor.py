"""One run folder, one supervisor: the second refuses, and one whose folder was taken away writes nothing more."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bascule.errors import UsageError
from bascule.folder import RunFolder
from bascule.stages.run import _sole_supervisor

HOLD = "import sys; from pathlib import Path; from bascule.folder import RunFolder; from bascule.stages.run import _sole_supervisor\nwith _sole_supervisor(RunFolder(Path(sys.argv[1]))): print('held', flush=True); sys.stdin.read()"


def test_the_second_supervisor_refuses_and_names_the_first_and_a_killed_one_leaves_no_lock(
    tmp_path: Path,
) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout is not None and first.stdout.readline() == b"held\n"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=f"in use by process {first.pid}"), _sole_supervisor(RunFolder(tmp_path)):  # fmt: skip
        pass
    assert sorted(tmp_path.iterdir()) == before
    first.kill()
    first.wait()
    with _sole_supervisor(RunFolder(tmp_path)):
        pass


def test_a_supervisor_whose_folder_was_deleted_is_told_and_the_new_folders_is_not(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path / "r")
    with _sole_supervisor(folder) as first:
        first.check()
        shutil.rmtree(folder.root)
        with pytest.raises(UsageError, match="was deleted or replaced"):
            first.check()
        with _sole_supervisor(folder) as second:  # somebody began anew under the same name
            second.check()
            with pytest.raises(UsageError, match="was deleted or replaced"):
                first.check()
