"""A pool that failed to train is asked again before it infers, and trains again only on its owner's word and a new verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bascule.cli import main
from bascule.config.load import recipe_from
from bascule.fallback import policy
from bascule.folder import RunFolder, write_json_atomic
from bascule.ledger import Ledger, of_kind
from bascule.qualify.battery import run_battery
from bascule.records import AnyRecord, Migration, PoolCondemned, PoolReadmitted, RunStarted, Verdict
from bascule.stages import reexamine
from bascule.stages.reexamine import owed


def verdict(role: str, word: str = "fit") -> Verdict:
    return Verdict(pool="a", role=role, verdict=word, reasons=(), accelerator="cpu", chip="c", driver="d", simulated=False)  # type: ignore[arg-type]  # fmt: skip


def condemned(role: str = "train") -> PoolCondemned:
    return PoolCondemned(pool="a", role=role, incident_id=None, reason="x")  # type: ignore[arg-type]


def moved() -> Migration:
    return Migration(
        from_pool="a", to_pool="b", failed_at_step=3, resumed_from_step=0, steps_recomputed=2, seconds_lost=1.0, snapshot="s"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("records", "pools"),
    [
        ([verdict("infer")], []),
        ([verdict("infer"), condemned()], ["a"]),
        ([condemned()], ["a"]),
        ([verdict("infer"), condemned(), verdict("train")], ["a"]),
        ([verdict("infer"), condemned(), verdict("infer", "unfit")], []),
        ([condemned(), condemned("infer")], []),
    ],
)
def test_a_verdict_for_inference_does_not_outlive_a_condemnation_for_training(
    records: list[AnyRecord], pools: list[str]
) -> None:
    assert owed(records) == pools


def test_a_readmitted_pool_is_not_condemned_and_starts_with_a_clean_record() -> None:
    back = PoolReadmitted(pool="a", role="train", reason="mended")
    assert policy.condemned([condemned(), back]) == frozenset()
    assert policy.condemned([condemned(), back, condemned()]) == {("a", "train")}
    assert policy.bad_launches([moved(), moved(), back, moved()]) == ["a"]


def run_with_a_condemned_pool(root: Path, limit_s: float) -> RunFolder:
    folder = RunFolder(root / "r").create()
    made = recipe_from(
        {"name": "r", "pools": {"a": {"accelerator": "cpu"}}, "model": {"preset": "tick"}, "qualify": {"time_limit_s": limit_s}},
        source="test",
    )  # fmt: skip
    write_json_atomic(folder.recipe, json.loads(made.model_dump_json()))
    ledger = Ledger(folder.ledger, attempt=1)
    ledger.append(RunStarted(name="r", version="", machine=""), condemned("infer"))
    return folder


def test_an_examination_that_proves_nothing_readmits_nobody(tmp_path: Path) -> None:
    folder = run_with_a_condemned_pool(tmp_path, 0.1)
    assert main(["qualify", "a", "--readmit", str(folder.root)]) == 3
    records = Ledger(folder.ledger).read()
    assert of_kind(records, PoolReadmitted) == []
    assert policy.condemned(records) == {("a", "infer")}


def test_the_owner_may_give_the_examination_more_time_than_the_recipe_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[float] = []

    def battery(*words: Any, time_limit_s: float, **more: Any) -> Any:
        asked.append(time_limit_s)
        return run_battery(*words, time_limit_s=0.1, **more)

    monkeypatch.setattr(reexamine, "run_battery", battery)
    folder = run_with_a_condemned_pool(tmp_path, 0.2)
    assert main(["qualify", "a", "--readmit", str(folder.root), "--time-limit", "900"]) == 3
    assert main(["qualify", "a", "--readmit", str(folder.root)]) == 3
    assert asked == [900.0, 0.2]
    assert "--time-limit S" in capsys.readouterr().out


@pytest.mark.slow
def test_a_pool_that_is_fit_again_is_readmitted(tmp_path: Path) -> None:
    folder = run_with_a_condemned_pool(tmp_path, 180.0)
    assert main(["qualify", "a", "--readmit", str(folder.root)]) == 0
    records = Ledger(folder.ledger).read()
    assert [(one.pool, one.role) for one in of_kind(records, PoolReadmitted)] == [("a", "infer")]
    assert policy.condemned(records) == frozenset()


def test_only_a_condemned_pool_of_a_run_can_be_readmitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_with_a_condemned_pool(tmp_path, 0.1)
    Ledger(folder.ledger).append(PoolReadmitted(pool="a", role="infer", reason="x"))
    for words, told in (
        (["a", "--readmit", str(folder.root)], "not condemned"),
        (["b", "--readmit", str(folder.root)], "no pool 'b'"),
        (["a", "--readmit", str(tmp_path)], "no run folder"),
    ):
        assert main(["qualify", *words]) == 2
        assert told in capsys.readouterr().err
