"""What this machine can run, in words."""

from __future__ import annotations

from argparse import Namespace

import pytest

from bascule import native
from bascule.stages import doctor


def cpu_line() -> str:
    text = doctor.main(Namespace()).text
    return next(line for line in text.splitlines() if line.startswith("cpu  "))


def test_a_missing_compiler_and_its_price_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    native.build.cache_clear()
    try:
        assert "compiler: none" in cpu_line() and "slower: neither g++" in cpu_line()
    finally:
        native.build.cache_clear()
