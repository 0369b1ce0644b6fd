"""What stands behind a stream: how wide the terminal is, what it can show, whether it is still there."""

from __future__ import annotations

import io
import os
import re
import stat
import textwrap
from typing import TextIO

from bascule.config.environment import environment

NARROW = 40
"""Columns below which a break between words helps nobody."""

_COMMAND = re.compile(r"\bbascule [a-z]")
_LABEL = re.compile(r" *(\S+(?: \S+)* {2,})?")
"""The spaces a line begins with, and the first column of a table."""


def take_any_letter(stream: TextIO) -> None:
    """A locale without a letter (`…` in ASCII) shows `?` for it; an answer that was worked out is not lost over it."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="replace")


def width_of(stream: TextIO) -> int | None:
    """Columns of the terminal behind `stream`; None for a file or a pipe, whose lines stay whole."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):  # no terminal; no file behind it at all
        return None


def draws(stream: TextIO) -> bool:
    """Does a terminal stand behind `stream` that can move its cursor?"""
    return stream.isatty() and environment("TERM", "dumb") != "dumb"


def colours(stream: TextIO) -> bool:
    """As `draws`, where the owner did not ask for none (no-color.org)."""
    return draws(stream) and not environment("NO_COLOR")


def laid_out(text: str, width: int | None, *, indent: int | None = None) -> str:
    """Lines longer than `width` broken between words and continued below the words they belong to. Lines with a command stay whole:
    a terminal's own break leaves them fit for copying."""
    if width is None or width < NARROW:
        return text
    return "\n".join(_broken(line, width, indent) for line in text.split("\n"))


def _broken(line: str, width: int, indent: int | None) -> str:
    if len(line) <= width or _COMMAND.search(line):
        return line
    label = _LABEL.match(line)
    below = indent if indent is not None else len(label.group()) if label else 0
    return textwrap.fill(
        line,
        width,
        subsequent_indent=" " * (below if below < width // 2 else 2),
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    )


def let_go_of_dead_terminal() -> bool:
    """After SIGHUP: has the terminal been closed? Then what would be said there is dropped, since a write would raise. False where
    it still stands, or there never was one."""
    dead = [number for number in (1, 2) if _is_dead(number)]
    if dead:
        nothing = os.open(os.devnull, os.O_WRONLY)
        for number in dead:
            os.dup2(nothing, number)
        os.close(nothing)
    return bool(dead)


def _is_dead(number: int) -> bool:
    try:
        device = os.fstat(number)
    except OSError:
        return False  # closed from the start
    is_nothing = stat.S_ISCHR(device.st_mode) and device.st_rdev == os.stat(os.devnull).st_rdev
    return stat.S_ISCHR(device.st_mode) and not is_nothing and not os.isatty(number)
