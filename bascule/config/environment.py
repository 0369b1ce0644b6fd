"""The process environment: the only file that reads it."""

from __future__ import annotations

import os


def environment(name: str, default: str | None = None) -> str | None:
    """Read one environment variable. Every read in the package passes here, so that a grep finds them all."""
    return os.environ.get(name, default)


def set_environment_default(name: str, value: str) -> None:
    """Set a variable that a library reads, unless the owner has set it."""
    os.environ.setdefault(name, value)


def whole_environment() -> dict[str, str]:
    """A copy of the environment, to hand on to a child process."""
    return dict(os.environ)
