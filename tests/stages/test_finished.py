"""A finished run answers in the compiled steps its rollouts had, and in operators wherever those would hide a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from bascule.infer.compiled import compiled
from bascule.infer.sampling import Sampling
from bascule.ledger import Ledger
from bascule.place import rollout
from bascule.stages.finished import open_finished
from tests.serve.conftest import make_run

FAULTY = "sim:gain-0.2-percent@cpu"


@pytest.mark.parametrize(
    ("pools", "on", "sections", "native"),
    [
        ({"main": "cpu"}, None, {}, True),
        ({"main": "cpu"}, "cpu", {"train": {"rollout_decoder": "operators"}}, False),
        ({"main": FAULTY}, None, {}, False),
        ({"main": "cpu"}, FAULTY, {}, False),
    ],
)
def test_it_decodes_as_the_runs_rollouts_do_unless_the_chip_needs_operators(
    pools: dict[str, str], on: str | None, sections: dict[str, dict[str, str]], native: bool, tmp_path: Path
) -> None:  # fmt: skip
    folder, _ = make_run(tmp_path / "run", pools, **sections)
    run = open_finished(str(folder.root), on)
    assert run.engine.native is native
    (said,) = run.engine.generate([[1, 2, 3]], Sampling(max_tokens=4))
    assert said.tokens


@pytest.mark.skipif(compiled() is None, reason="no C++ compiler: nothing to compare")
def test_both_ways_say_the_same_tokens(tmp_path: Path) -> None:
    said = []
    for how in ("auto", "operators"):
        folder, _ = make_run(
            tmp_path / how, {"main": "cpu"}, train={"phases": ["sft"], "rollout_decoder": how}
        )
        run = open_finished(str(folder.root), None)
        said.append([one.tokens for one in run.engine.generate([[1, 2, 3], [4, 5]], Sampling(max_tokens=24, seed=1), group_size=4)])  # fmt: skip
    assert said[0] == said[1]


def test_a_machine_without_a_compiler_is_told_why_it_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "compiled", lambda: None)
    monkeypatch.setattr(rollout, "why_not", lambda: "no compiler")
    folder, _ = make_run(tmp_path / "run", {"main": "cpu"})
    open_finished(str(folder.root), None)
    told = [one for one in Ledger(folder.ledger).read() if one.kind == "warning"]
    assert ["no compiler" in one.model_dump_json() for one in told] == [True]
