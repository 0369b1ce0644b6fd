"""What the campaigns share: cells that are done once, one JSON line each, so that a cut campaign goes on; and bounds for rates."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import in_process  # noqa: F401  (re-exported: the tests' whole run in one process)

Z = 1.96
BY_BUDGET = {"checksum_every_steps": None, "audit_every_steps": None, "rule_out_rate": 0.001}
"""The guard's defaults, over the frequent checks that in_process.recipe sets for tests."""


def carry_out(
    cells: Iterable[dict[str, Any]], out: Path, work: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[dict[str, Any]]:
    """`work(cell)` for every cell that `out` does not hold yet; all results, in the cells' order. A cell is named by its JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict[str, Any]] = {}
    if out.exists():
        for line in out.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            done[json.dumps(entry["cell"])] = entry
    wanted = list(cells)
    for number, cell in enumerate(wanted, start=1):
        name = json.dumps(cell)
        if name not in done:
            done[name] = {"cell": cell, **work(cell)}
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[name]) + "\n")
        print(f"{number}/{len(wanted)} {name}", file=sys.stderr, flush=True)
    return [done[json.dumps(cell)] for cell in wanted]


def quietly(work: Callable[[], Any]) -> Any:
    """Without the supervisor's own lines: a campaign prints its table."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return work()


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927); with no misses its lower end is close to 1 - 3.84 / (n + 3.84)."""
    if n == 0:
        return 0.0, 1.0
    share, spread = hits / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * (share * (1 - share) / n + spread / (4 * n)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def said(hits: int, n: int) -> str:
    low, high = wilson(hits, n)
    return f"{hits}/{n} ({hits / max(n, 1):.1%}; 95 %: {low:.1%} to {high:.1%})"
