"""The constants that are shipped are the ones that the script finds in the shipped data: refitted here, so in CI too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bascule.plan import fit


@pytest.mark.timeout(1800)  # 20 s of a processor: many minutes where twenty share it
def test_every_fitted_constant_is_reproduced_from_the_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert fit.main(["--check"]) == 0
    assert "serving.json: the same" in capsys.readouterr().out


def test_a_changed_constant_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = json.loads((fit.DATA / "constants.json").read_text())
    (tmp_path / "constants.json").write_text(json.dumps(shipped))
    monkeypatch.setattr(fit, "DATA", tmp_path)
    assert fit._compare("constants.json", shipped) == 0
    for key, place in (("sizes", 3), ("memory", "slack"), ("constants", "gemm")):
        changed = json.loads(json.dumps(shipped))
        changed[key][place] += 0.05
        assert fit._compare("constants.json", changed) == 3
    assert fit._compare("constants.json", {**shipped, "anchors": shipped["anchors"][1:]}) == 3
