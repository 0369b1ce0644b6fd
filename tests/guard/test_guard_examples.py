"""The two loops that bascule does not own, run as a user would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _output(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_ddp_loop_stops_on_all_ranks_before_the_wrong_step_commits() -> None:
    script = str(EXAMPLES / "guard_your_own_loop.py")
    told = _output("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", script)
    assert "stopped before the update of step 20" in told
    assert "rank 2, step 20" in told and "times its bound" in told


@pytest.mark.slow
def test_a_hugging_face_trainer_stops_before_the_wrong_step_commits() -> None:
    pytest.importorskip("accelerate")
    told = _output(str(EXAMPLES / "guard_hf_trainer.py"))
    assert "cpu: 20 steps, no alarm" in told
    assert "step 12 was not committed" in told
