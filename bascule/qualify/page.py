"""report.html of a qualification: one self-contained page for the people who decide, and for the vendor's engineers. No torch.

Everything on it comes from a battery's result and from the figures its checks left in `figures/` beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from bascule.qualify import plots
from bascule.qualify.battery import BatteryResult
from bascule.qualify.check import CHECKS
from bascule.records import Evidence

BAD = ("fail", "error")
OPERATORS_SHOWN = 24
MARGIN = 8.0  # numerics.TOLERANCES of fp32: RMS errors above this many noise floors fail; 2 for the half types
HALF_MARGIN = 2.0
_QUESTION = {check.name: check.question for check in CHECKS}


def write(path: Path, results: Sequence[BatteryResult]) -> None:
    """Write the page of these batteries to `path`; links to reproducers are relative to it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters["figure"] = _figure
    source = files("bascule.qualify").joinpath("page.html.jinja").read_text(encoding="utf-8")
    style = files("bascule.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = environment.from_string(source).render(
        pools=[_pool(result, path.parent) for result in results],
        style=Markup(style.partition("<style>")[2].partition("</style>")[0]),
        when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("bascule"),
    )
    path.write_text(text, encoding="utf-8")


def _pool(result: BatteryResult, beside: Path) -> dict[str, Any]:
    findings = [item for item in result.evidence if item.outcome in BAD]
    return {
        "name": result.verdicts[0].pool or result.examined.accelerator,
        "result": result,
        "libraries": result.verdicts[0].libraries,
        "findings": [_finding(item, result.folder, beside) for item in findings],
        "open": [item for item in result.evidence if item.outcome in ("skipped", "not again")],
        "evidence": result.evidence,
        "questions": _QUESTION,
        "charts": [Markup(chart) for chart in _charts(result) if chart],
    }


def _finding(item: Evidence, folder: Path, beside: Path) -> dict[str, Any]:
    command, _, script = item.reproduce.partition("  |  python ")
    return {
        "item": item,
        "command": command,
        "script": os.path.relpath(script.strip("'"), beside) if script else None,
    }


def _charts(result: BatteryResult) -> list[str]:
    drawn = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((result.folder / "figures").glob("*.json"))
    }
    asked = {f"{item.check}-{role}" for item in result.evidence for role in item.roles}
    drawn = {name: what for name, what in drawn.items() if name in asked}
    charts = [
        _errors(name, what["operators"]) for name, what in drawn.items() if "operators" in what
    ]
    for name, what in drawn.items():
        if "products" in what:
            title = f"Roofline, {name.rpartition('-')[2]}: products of this chip"
            charts.append(
                plots.roofline(title, what["products"], what["copy_gb_per_s"], what["datasheet"])
            )
        if "here" in what:
            charts.append(
                plots.losses(
                    "Short trainings, chip over reference: loss (nats/token, logarithmic)",
                    what["here"],
                    what["there"],
                )
            )
    return [_speeds(result.evidence), *charts, _times(result.evidence)]


def _speeds(evidence: Sequence[Evidence]) -> str:
    """GFLOP/s as measured, beside the datasheet and what the plan counts on."""
    seen = next((one.measured for one in evidence if one.check == "speed.step" and "train" in one.roles), {})  # fmt: skip
    sheet = seen.get("datasheet_bf16_tflops")
    asked = [
        ("datasheet, bf16", 1000 * float(sheet) if sheet else None, "a"),
        ("products", seen.get("gemm_gflops"), "good"),
        ("products, sustained", seen.get("sustained_gflops"), "good"),
        ("attention", seen.get("attention_gflops"), "good"),
        ("the model's training step", seen.get("step_gflops"), "good"),
        ("the plan counts on, in its step", seen.get("plan_gflops"), "a"),
    ]
    rows = [
        plots.Bar(name, float(value), f"{float(value):.3g}", css)
        for name, value, css in asked
        if isinstance(value, (int, float)) and value > 0
    ]
    return plots.bars("Speed for training, in GFLOP/s (logarithmic)", rows, log=True)


def _errors(name: str, operators: list[dict[str, Any]]) -> str:
    check, _, role = name.rpartition("-")
    worst = sorted(operators, key=lambda row: (-row["wrong"], -row["ratio"]))[:OPERATORS_SHOWN]
    rows = [
        plots.Bar(
            row["operator"].removeprefix("aten::"),
            row["ratio"],
            f"{row['ratio']:.3g}" + (f", {row['wrong']} wrong" if row["wrong"] else ""),
            "bad" if row["wrong"] else "good",
        )
        for row in worst
    ]
    limit = HALF_MARGIN if check == "numerics.half" else MARGIN
    title = f"{check} for {role}: largest RMS error of each operator, in noise floors"
    return plots.bars(title, rows, log=True, limit=limit)


def _times(evidence: Sequence[Evidence]) -> str:
    spent: dict[str, float] = {}
    for item in evidence:
        spent[item.check] = spent.get(item.check, 0.0) + item.seconds
    rows = [
        plots.Bar(check, seconds, f"{seconds:.2g} s")
        for check, seconds in sorted(spent.items(), key=lambda pair: -pair[1])
        if seconds > 0
    ]
    return plots.bars(f"Time per check: {sum(spent.values()):.0f} s in all", rows)


def _figure(value: float | int | str | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
