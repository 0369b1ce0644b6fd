"""The pages' charts: inside their tracks, readable on a phone, words as they were given."""

from __future__ import annotations

import datetime
import itertools
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

from bascule.plan.answer import Estimate, Swing, answer
from bascule.plan.charts import Finish, calendar, interval_bars, roofline, stacks, tornado
from bascule.plan.page import render_page

DAY = datetime.date(2026, 1, 1)
PLACE = re.compile(r"left:([\d.-]+)%(?:;width:([\d.-]+)%)?")


def finish(name: str, *days: float) -> Finish:
    middle, low, high = (DAY + datetime.timedelta(days=d) for d in days)
    return Finish(name, (days[0], days[1], days[2]), (middle, low, high))


CHARTS = {
    "bars": interval_bars([("a", Estimate(3e6, 1e6, 9e6, "USD", "x")), ("b", Estimate(0, 0, 0, "USD", ""))]),
    "nothing to draw": interval_bars([("a", Estimate(0, 0, 0, "USD", ""))]),
    "stacks": stacks([("one", {"w": 5.0, "g": 1.0}), ("two", {"w": 0.5, "o": 0.0})], "GiB", 1.0, 4.0),
    "calendar": calendar([finish("a", 40, 30, 60), finish("b", 5, 4, 7)], DAY, 1e4),
    "short calendar": calendar([finish("a", 0.4, 0.2, 0.7)], DAY, 1e4),
    "calendar cut off": calendar([finish("a", 9e4, 8e4, 2e5)], DAY, 1e4),
    "tornado": tornado([Swing("price", 0.2, 3.0), Swing("power", 0.5, 0.6)], 5.0),
    "roofline": roofline({"a": 0.2, "b": 700.0, "c": 9e5}, 1e15, 3e12, "989 TFLOPS"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHARTS)
def test_nothing_is_drawn_outside_its_track(name: str) -> None:
    places = [(float(a), float(b or 0)) for a, b in PLACE.findall(CHARTS[name])]
    assert places
    assert all(left >= 0 and width >= 0 and left + width <= 100.05 for left, width in places)


@pytest.mark.parametrize("days", [(0.5, 0.4, 0.6), (9, 8, 11), (63, 50, 81), (900, 800, 1234)])
def test_a_calendars_dates_do_not_run_into_each_other_on_a_phone(
    days: tuple[float, float, float],
) -> None:
    drawn = calendar([finish("a", *days)], DAY, 1e4)
    places = [float(x) for x in re.findall(r"class='tick' style='left:([\d.]+)%'", drawn)]
    assert places[0] == 0 and all(b - a > 28 for a, b in itertools.pairwise(places))
    assert len(places) > 2 or days[2] < 4


def test_parts_and_their_legend_have_the_same_color_and_the_limit_is_named() -> None:
    drawn = CHARTS["stacks"]
    (weights,) = re.findall(r"background:(#\w+)'></i>w<", drawn)
    assert drawn.count(f"background:{weights}") == 3  # two bars and the legend
    assert "chip&#x27;s 4.00 GiB" in drawn and drawn.count("class='limit' style=") == 2


def test_the_lines_of_a_tornado_lie_where_their_values_do() -> None:
    drawn = tornado([Swing("price", 0.5, 2.0)], 1.0)
    (left, width), = PLACE.findall(drawn[: drawn.index("class='even'")])  # fmt: skip
    even = float(re.findall(r"class='even' style='left:([\d.]+)%'", drawn)[0])
    assert float(left) + float(width) / 2 == pytest.approx(even, abs=0.02)


def test_operators_lie_on_the_roof() -> None:
    drawn = roofline({"memory": 10.0, "matrix": 5e3}, 1e15, 1e12, "peak")
    ridge = float(re.findall(r"L([\d.]+) 10H100", drawn)[0])
    (_, low), (_, high) = re.findall(r"left:([\d.]+)%;top:([\d.]+)%", drawn)
    assert float(high) == pytest.approx(10) and 10 < float(low) < 94 and 0 < ridge < 100


def test_names_from_outside_are_escaped() -> None:
    drawn = interval_bars([("<script>", Estimate(1, 1, 1, "<b>", "'><i>"))])
    assert "<script>" not in drawn and "<b>" not in drawn and "'><i>" not in drawn


def test_the_frame_sets_no_width_that_a_phone_has_not() -> None:
    frame = resources.files("bascule.plan").joinpath("page.html").read_text(encoding="utf-8")
    assert all(int(width) <= 300 for width in re.findall(r"min-width:\s*(\d+)px", frame))


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.timeout(600)
def test_no_chart_scrolls_sideways_on_a_phone(tmp_path: Path) -> None:
    found = answer(
        "deepseek-v3",
        train=["2048 x H800, 14.8T tokens, 2 USD/h"],
        versus=["6144 x Ascend 910C"],
        serve=["H20, 4k in, 1k out, 50 ms"],
    )
    seen = """<script>addEventListener('load', () => { parent.document.title = 'width ' + innerWidth + ': ' + [...document.querySelectorAll('.wide')]
        .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.parentElement.querySelector('h2').textContent).join('; ') + '.' })</script></body>"""
    (tmp_path / "page.html").write_text(render_page(found, start=DAY).replace("</body>", seen))
    (tmp_path / "phone.html").write_text('<iframe src="page.html" style="width:390px;height:7000px;border:0"></iframe>')  # fmt: skip
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "phone.html").as_uri()],
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    if "<title>width" not in done.stdout:
        pytest.skip(f"chromium shows no page here: {done.stderr[-200:]}")
    assert "<title>width 390: .</title>" in done.stdout
