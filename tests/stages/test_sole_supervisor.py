"""One run folder, one supervisor: the second refuses, and one whose folder was taken away writes nothing more."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bascule.errors import UsageError
from bascule.folder import RunFolder
from bascule.stages.hold import sole_supervisor

HOLD = "import sys; from pathlib import Path; from bascule.folder import RunFolder; from bascule.stages.hold import sole_supervisor\nwith sole_supervisor(RunFolder(Path(sys.argv[1]))): print('held', flush=True); sys.stdin.read()"


def test_the_second_supervisor_refuses_and_names_the_first_and_a_killed_one_leaves_no_lock(
    tmp_path: Path,
) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout is not None and first.stdout.readline() == b"held\n"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=f"in use by process {first.pid}"), sole_supervisor(RunFolder(tmp_path)):  # fmt: skip
        pass
    assert sorted(tmp_path.iterdir()) == before
    first.kill()
    first.wait()
    with sole_supervisor(RunFolder(tmp_path)):
        pass


def test_nobody_begins_anew_in_a_deleted_folder_before_its_supervisor_has_noticed(
    tmp_path: Path,
) -> None:
    """It may be writing by that name for a while: settling an incident, examining a pool, writing its last words."""
    folder = RunFolder(tmp_path / "r")
    with sole_supervisor(folder) as first:
        first.check()
        shutil.rmtree(folder.root)
        with pytest.raises(UsageError, match="was deleted or replaced"):
            first.check()
        with pytest.raises(UsageError, match="in use by process"), sole_supervisor(folder):
            pass
        assert not folder.root.exists(), "the one who is refused leaves nothing"
        folder.root.mkdir()
        with pytest.raises(UsageError, match="in use by process"), sole_supervisor(folder):
            pass
    with sole_supervisor(folder) as second:
        second.check()
    assert [path.name for path in tmp_path.iterdir()] == ["r"], "no lock is left beside the folder"


def test_a_supervisor_that_was_killed_in_a_deleted_folder_keeps_nobody_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "r")
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert first.stdout is not None and first.stdout.readline() == b"held\n"
    shutil.rmtree(folder.root)
    with pytest.raises(UsageError, match=f"in use by process {first.pid}"), sole_supervisor(folder):
        pass
    first.kill()
    first.wait()
    with sole_supervisor(folder):
        pass


def test_another_path_to_the_same_folder_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with (
        sole_supervisor(RunFolder(tmp_path / "elsewhere")),
        pytest.raises(UsageError, match="in use by process"),
        sole_supervisor(RunFolder(tmp_path / "link")),
    ):
        pass


def test_many_that_come_and_go_never_hold_one_folder_together(tmp_path: Path) -> None:
    """Each takes the name beside the folder away as it leaves; one that had opened it by then must not take that for a lock."""
    code = (
        "import sys, time; from pathlib import Path; from bascule.errors import UsageError; from bascule.folder import RunFolder\n"
        "from bascule.stages.hold import sole_supervisor\n"
        "root, held, until = Path(sys.argv[1]), 0, time.monotonic() + 60\n"
        "while held < 20 and time.monotonic() < until:\n"
        "    try:\n"
        "        with sole_supervisor(RunFolder(root / 'r')):\n"
        "            (root / 'inside').mkdir(); (root / 'inside').rmdir(); held += 1\n"
        "    except UsageError: pass\n"
        "print(held)"
    )
    all_of_them = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    told = [one.communicate()[0] for one in all_of_them]
    assert [one.returncode for one in all_of_them] == [0, 0, 0], "two were inside at once"
    assert any(int(held) > 0 for held in told)
