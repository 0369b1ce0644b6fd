"""Ask one question of one chip, in your own process: what is it fit for, for this model?

python examples/qualify_one_chip.py cpu
python examples/qualify_one_chip.py sim:backward-wrong     # a simulated chip: right forward, wrong backward
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from bascule.config.model import ModelConfig
from bascule.qualify.battery import run_battery


def main(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        result = run_battery("mine", name, ModelConfig(preset="tick"), Path(folder))
    for item in result.evidence:
        if item.outcome != "pass":
            print(f"{item.outcome:>7}  {item.check}: {item.detail}")
    for verdict in result.verdicts:
        print(f"{name} is {verdict.verdict} to {verdict.role}: {verdict.reasons[0]}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
