"""The rules of the house (DESIGN section 4): floors, rooms without torch, vendor words, the environment, the ground truth."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bascule"
TORCH_FREE = [
    "bascule.cli", "bascule.stages.run", "bascule.stages.train", "bascule.stages.launch", "bascule.stages.setback", "bascule.stages.place", "bascule.stages.plan", "bascule.stages.qualify",
    "bascule.stages.report", "bascule.place.placement", "bascule.fallback.policy", "bascule.qualify.judge", "bascule.guard.watchdog",
    "bascule.model.count", "bascule.report.page", "bascule.plan.options", "bascule.ledger", "bascule.config.load", "bascule.records",
]  # fmt: skip


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_these_rooms_import_no_torch() -> None:
    """One process for all of them, and the first that brings torch in is named."""
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n    if 'torch' in sys.modules: sys.exit(name)"
    done = subprocess.run([sys.executable, "-c", code, *TORCH_FREE], capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, f"imports torch: {done.stderr[-2000:]}"


def test_every_import_points_down() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_vendor_words_stand_only_in_accelerators_and_plan(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    if room in ("accelerators", "plan"):
        return
    code = _code_without_comments_and_docstrings(path)
    found = re.findall(r"torch\.cuda|torch_npu|\bnccl\b|\bhccl\b", code, flags=re.IGNORECASE)
    assert not found, f"{name_of(path)} names a vendor: {found}"


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_environment_is_read_only_in_config(path: Path) -> None:
    if path == PACKAGE / "config" / "environment.py":
        return
    assert not re.search(r"os\.environ|os\.getenv", path.read_text(encoding="utf-8")), (
        f"{name_of(path)} reads the environment"
    )


@pytest.mark.parametrize("room", ["guard", "qualify", "fallback"])
def test_the_judges_never_read_the_ground_truth(room: str) -> None:
    for path in (PACKAGE / room).rglob("*.py"):
        code = _code_without_comments_and_docstrings(path)
        assert "ground_truth" not in code and "fault_log" not in code, (
            f"{name_of(path)} reads what simulated chips really did"
        )


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_every_module_says_what_it_is(path: Path) -> None:
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), (
            f"{name_of(path)} has no docstring"
        )


def test_every_room_of_the_tour_exists_and_every_room_is_in_the_tour() -> None:
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    rooms = {
        path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()
    }
    missing = {room for room in rooms if f"{room}/" not in tour}
    assert not missing, f"docs/tour.md does not show {missing}"


def _code_without_comments_and_docstrings(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
