from __future__ import annotations

from pathlib import Path

from bascule.faults.catalogue import profiles
from bascule.qualify.check import CHECKS
from bascule.qualify.handbook import OUT_OF_REACH, markdown

DOCS = Path(__file__).parents[2] / "docs" / "checks.md"


def test_docs_are_what_the_checks_say() -> None:
    assert DOCS.read_text(encoding="utf-8") == markdown(), (
        "run: python -m bascule.qualify.handbook > docs/checks.md"
    )


def test_only_faults_that_exist_are_promised() -> None:
    named = {name for check in CHECKS for name in check.catches} | set(OUT_OF_REACH)
    assert named <= set(profiles())
