"""What a killed supervisor left unsettled is settled before training goes on, and an error means what it means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bascule.config.load import recipe_from
from bascule.config.recipe import Recipe
from bascule.errors import (
    BasculeError,
    DeviceFault,
    NoPoolLeft,
    OperatorMissing,
    OutOfMemory,
    UsageError,
)
from bascule.folder import RunFolder
from bascule.ledger import Ledger, of_kind
from bascule.records import Incident, Migration, PoolCondemned, SnapshotEvent, StepStats, Verdict
from bascule.stages.setback import Setbacks
from bascule.stages.trainer import understood
from bascule.train import checkpoint


def recipe(**changes: object) -> Recipe:
    pools = {"a": {"accelerator": "cpu"}, "b": {"accelerator": "cpu"}}
    return recipe_from({"name": "r", "pools": pools, **changes}, source="test")


def unsettled(root: Path, **incident: object) -> tuple[RunFolder, Ledger]:
    """A run killed right after an incident at step 10: a certified snapshot of step 4, a doubtful one of step 8."""
    folder = RunFolder(root / "r").create()
    ledger = Ledger(folder.ledger, attempt=1)
    for pool in ("a", "b"):
        ledger.append(
            Verdict(
                pool=pool,
                role="train",
                verdict="fit",
                reasons=(),
                accelerator="cpu",
                chip="c",
                driver="d",
                simulated=False,
            )
        )
        ledger.append(
            Verdict(
                pool=pool,
                role="infer",
                verdict="fit",
                reasons=(),
                accelerator="cpu",
                chip="c",
                driver="d",
                simulated=False,
            )
        )
    for step, state in ((4, "certified"), (8, "verified")):
        path = checkpoint.save_snapshot(folder.snapshots, step, {"w": torch.ones(2)}, {}, {}, {})
        checkpoint.set_trust(path, state)  # type: ignore[arg-type]
    ledger.append(
        *(
            StepStats(
                step=step,
                phase="sft",
                loss=1.0,
                grad_norm=1.0,
                learning_rate=1.0,
                tokens=1,
                seconds=0.1,
                pool="a",
            )
            for step in range(1, 10)
        )
    )
    values = {"attribution": "transient chip fault", "rollback": True, **incident}
    ledger.append(
        Incident(
            pool="a",
            incident_id="0001-step-10",
            step=10,
            sentinel="checksum",
            action="x",
            evidence="proof",
            **values,
        )
    )  # type: ignore[arg-type]
    return folder, ledger


def settle(folder: RunFolder, ledger: Ledger, made: Recipe | None = None) -> list[Migration]:
    Setbacks(made or recipe(), folder, ledger, lambda: True).settle_unfinished()
    return of_kind(ledger.read(), Migration)


def test_a_rollback_that_was_not_made_is_made(tmp_path: Path) -> None:
    folder, ledger = unsettled(tmp_path)
    (move,) = settle(folder, ledger)
    assert (move.to_pool, move.resumed_from_step, move.steps_recomputed) == ("a", 4, 5)
    assert checkpoint.trust(checkpoint.path_of(folder.snapshots, 8)).state == "rejected"
    assert [
        event.step for event in of_kind(ledger.read(), SnapshotEvent) if event.state == "rejected"
    ] == [8]
    assert len(settle(folder, ledger)) == 1, "settling again does nothing"


def test_a_condemnation_that_was_not_carried_out_is_carried_out(tmp_path: Path) -> None:
    folder, ledger = unsettled(tmp_path, attribution="persistent chip fault")
    (move,) = settle(folder, ledger)
    assert move.to_pool == "b"
    assert [(one.pool, one.role) for one in of_kind(ledger.read(), PoolCondemned)] == [
        ("a", "train")
    ]


def test_an_incident_that_asks_for_nothing_is_left_alone(tmp_path: Path) -> None:
    folder, ledger = unsettled(tmp_path, attribution="data", rollback=False)
    assert settle(folder, ledger) == []


def test_without_a_guard_a_verified_snapshot_is_gone_back_to(tmp_path: Path) -> None:
    folder, ledger = unsettled(tmp_path)
    (move,) = settle(folder, ledger, recipe(guard={"enabled": False}))
    assert move.resumed_from_step == 8


def test_with_nowhere_to_go_the_run_ends_with_the_story(tmp_path: Path) -> None:
    folder, ledger = unsettled(tmp_path, attribution="persistent chip fault")
    ledger.append(PoolCondemned(pool="b", role="train", incident_id=None, reason="earlier"))
    with pytest.raises(NoPoolLeft, match="What happened"):
        settle(folder, ledger)


@pytest.mark.parametrize(
    ("error", "on_chip", "meaning"),
    [
        (MemoryError("x"), False, OutOfMemory),
        (torch.OutOfMemoryError("x"), True, OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), False, OutOfMemory),
        (
            NotImplementedError("Could not run 'aten::x' with arguments from the 'npu' backend"),
            True,
            OperatorMissing,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), True, DeviceFault),
        (OSError(28, "No space left on device", "/x"), False, UsageError),
    ],
)
def test_an_error_of_the_chip_the_memory_or_the_disk_is_understood(
    error: Exception, on_chip: bool, meaning: type[BasculeError]
) -> None:
    assert type(understood(error, on_chip=on_chip)) is meaning


def test_an_error_of_our_own_stays_one() -> None:
    assert understood(RuntimeError("shapes do not match"), on_chip=False) is None
