"""Nothing lost, exactly: a recipe with its faulty chip, and the same recipe without any fault, end in the same bits.

    python benchmarks/same_run.py runs/demo.toml --out out/same

Both pools have the base `cpu`, so one machine computes both runs. Prints both fingerprints and what the fault cost; exits 1 when
the weights differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(recipe: str, out: Path, name: str, settings: list[str]) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "bascule.cli",
        "run",
        recipe,
        "--out",
        str(out),
        "--name",
        name,
        "--json",
    ]
    for setting in ["pools.nvidia.accelerator=cpu", *settings]:
        command += ["--set", setting]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="runs/demo.toml")
    parser.add_argument("--out", type=Path, default=Path("out/same"))
    options = parser.parse_args()
    faulty = run(options.recipe, options.out, "faulty", [])
    clean = run(options.recipe, options.out, "clean", ["pools.ascend.accelerator=sim:clean@cpu"])
    for name, found in (("with the fault", faulty), ("without", clean)):
        print(
            f"{name:<15} {found['final_weights_sha256']}  {found['wall_s']:.0f} s, incidents {len(found['incidents'])}, steps recomputed {found['steps_recomputed']}, lost {found['seconds_lost']:.1f} s"
        )
    same = faulty["final_weights_sha256"] == clean["final_weights_sha256"]
    print("the same run, bit for bit" if same else "THE WEIGHTS DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
