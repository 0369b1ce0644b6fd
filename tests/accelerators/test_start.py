"""What a worker's start must not pay for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, tempfile
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
import guarded
rig = guarded.rig(Path(tempfile.mkdtemp()), sys.argv[2])
rig.run(3)
print(rig.steps, torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""


def test_a_worker_trains_and_checks_deterministically_without_loading_the_compiler() -> None:
    """torch.use_deterministic_algorithms and every mode over operators import it: two seconds of each start, for code nobody
    compiles. A simulated chip, so that faults, checksums and audits are all at work."""
    given = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1]), "sim:clean@cpu"]
    found = subprocess.run(given, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == ["[1, 2, 3] True False", "[]"]
