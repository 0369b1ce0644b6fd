"""The page of a qualification: it stands alone and says what was found."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bascule.qualify import page, plots
from bascule.qualify.battery import BatteryResult
from bascule.qualify.judge import Examined, verdicts
from bascule.records import Evidence


def finding(folder: Path) -> Evidence:
    return Evidence(
        check="numerics.forward", family="numerics", roles=("train",), outcome="fail",
        measured={"gain": 0.002}, bound="as measured", detail="aten::mm: <wrong> & biased", seconds=1.5,
        reproduce=f"bascule qualify x --check numerics.forward  |  python {folder}/evidence/a/reproduce.py",
    )  # fmt: skip


def result(folder: Path) -> BatteryResult:
    figures = folder / "figures"
    figures.mkdir()
    rows = [{"operator": "aten::mm", "calls": 3, "wrong": 2, "ratio": 900.0}]
    (figures / "numerics.forward-train.json").write_text(json.dumps({"operators": rows}))
    evidence = (finding(folder),)
    examined = Examined("sim:gain", "Chip 1", "driver 2", simulated=True, model_sha256="ab" * 32)
    judged = tuple(v.model_copy(update={"pool": "p"}) for v in verdicts(evidence, examined))
    return BatteryResult(examined, evidence, judged, 2.0, folder)


def test_the_page_stands_alone_and_shows_verdict_finding_script_and_error_plot(
    tmp_path: Path,
) -> None:
    page.write(tmp_path / "report.html", [result(tmp_path)])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(https?:)?//', text) and "<script" not in text
    assert "unfit" in text and "simulated" in text and "prefers-color-scheme: dark" in text
    assert "aten::mm: &lt;wrong&gt; &amp; biased" in text
    assert 'href="evidence/a/reproduce.py"' in text
    assert "900, 2 wrong" in text and "allowed 8" in text


def test_bars_grow_with_their_values_and_stay_on_the_drawing() -> None:
    drawn = plots.bars(
        "t", [plots.Bar("a", 10.0, "10"), plots.Bar("b", 1.0, "1")], log=True, limit=8
    )
    long, short = (float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', drawn))
    assert plots.WIDTH - plots.LEFT >= long > short > 0
    assert plots.bars("t", []) == ""
