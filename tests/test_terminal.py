"""Lines that fit their terminal, and a terminal that goes away."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from bascule.stages.progress import ProgressBar
from bascule.terminal import colours, draws, laid_out, width_of


def test_a_long_line_breaks_between_words_and_goes_on_below_its_column() -> None:
    told = laid_out("  cost     " + "word " * 20 + "\nshort", 40)
    lines = told.split("\n")
    assert lines[-1] == "short" and len(lines) > 3
    assert all(len(line) <= 40 for line in lines)
    assert all(line.startswith(" " * 11 + "word") for line in lines[1:-1])
    assert told.replace("\n", " ").split() == ["cost", *["word"] * 20, "short"]


def test_commands_and_what_goes_to_a_file_stay_whole(tmp_path: Path) -> None:
    command = "Talk to the model: bascule chat " + "x/" * 60
    assert laid_out(command, 60) == command
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        assert width_of(log) is None and not draws(log)
    assert laid_out("word " * 100, None) == "word " * 100
    assert laid_out("x" * 200, 80) == "x" * 200  # a path: broken in two it is none


def terminal(columns: int) -> tuple[int, int]:
    """(the user's end, the program's end)"""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return ours, theirs


def test_the_bar_fits_its_terminal_and_a_dumb_one_gets_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = terminal(50)
    with open(theirs, "w", encoding="utf-8", closefd=False) as stream:
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        assert width_of(stream) == 50 and colours(stream)
        ProgressBar().show("numerics.backward.of.a.long.name[train]", 3, 31)
        assert len(os.read(ours, 1000).decode().removeprefix("\r\x1b[K")) == 49
        monkeypatch.setenv("NO_COLOR", "1")
        assert draws(stream) and not colours(stream)
        monkeypatch.setenv("TERM", "dumb")
        assert not draws(stream)
        ProgressBar().show("nothing", 3, 31)
        stream.write("end")
        stream.flush()
        assert os.read(ours, 1000) == b"end"
    os.close(ours)
    os.close(theirs)


def test_a_locale_without_a_letter_shows_something_else_for_it() -> None:
    """The help has none of them, a report has: `…` in the digests."""
    told = "import sys; from bascule import cli, terminal; terminal.take_any_letter(sys.stdout); cli._print('a…b')"
    done = subprocess.run(
        [sys.executable, "-c", told], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True
    )  # fmt: skip
    assert done.stdout == b"a?b\n"


HANGS_UP = """
import fcntl, signal, sys, termios
from pathlib import Path
from bascule.terminal import let_go_of_dead_terminal
fcntl.ioctl(2, termios.TIOCSCTTY, 0)
def on_hangup(number, frame):
    gone = let_go_of_dead_terminal()
    print("nobody reads this", file=sys.stderr, flush=True)  # an OSError while the dead terminal stands there
    Path(sys.argv[1]).write_text(str(gone))
    sys.exit(75)
signal.signal(signal.SIGHUP, on_hangup)
print("ready", file=sys.stderr, flush=True)
while True: signal.pause()
"""


@pytest.mark.parametrize("closed", [True, False])
def test_a_closed_terminal_is_let_go_of_and_a_living_one_kept(tmp_path: Path, closed: bool) -> None:
    ours, theirs = terminal(80)
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS_UP, str(tmp_path / "gone")],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    said = b""
    while b"ready" not in said:
        said += os.read(ours, 1000)
    if closed:
        os.close(ours)  # the kernel sends SIGHUP
    else:
        process.send_signal(1)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "gone").read_text() == str(closed)
    if not closed:
        assert b"nobody reads this" in os.read(ours, 1000)
        os.close(ours)
