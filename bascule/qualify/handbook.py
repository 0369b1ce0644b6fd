"""docs/checks.md, made from the checks themselves: `python -m bascule.qualify.handbook > docs/checks.md`. A test keeps it current."""

from __future__ import annotations

import sys

from bascule.qualify.check import CHECKS, Check

# Planted faults that the quick battery leaves alone, and why: said here, in the docs and in the truth table.
OUT_OF_REACH = {
    "ascend-r2": "begins at training step 300, long after a quick qualification; the guard's to catch",
    "ageing": "begins at training step 100; the guard's to catch",
    "slowing": "slows down over 100 steps; speed is reported and decides nothing, because slow is a price and not a fault",
}

_INTRO = """# What a chip is asked

Written by `python -m bascule.qualify.handbook`; a test keeps it current.

Each check is one question, asked once for each role it decides for, inside a session of that role and in a child process: a crash
or a hang is an answer too. The verdict of a role is

- **unfit** when a check that decides for it failed, or the chip crashed, hung or raised while it was asked;
- **unproven** when nothing failed, but a check that must answer did not (skipped, cut off by the time limit, too few runs to know);
- **fit** when every check that decides for it was asked and passed.

How answers are judged: the reference is fp64 on the CPU. The noise floor of an operator is the largest of three measured errors: the
ideal chip's (accumulate in fp32, round once), this CPU's at the same type, and the CPU's when every input moves by one unit in the
last place. Bias (signed gain) is judged before noise (RMS) and before single elements (tail); each relative to the tensor's own
size, so a gradient of 1e-5 is judged as strictly as a logit. The bars stand in `bascule/numerics.py`, with their reasons.

The last column names the planted faults (docs/faults.md) that the check must catch; `tests/qualify/test_truth_table.py` holds it to that.
"""


def markdown() -> str:
    lines = [_INTRO.rstrip()]
    for family in dict.fromkeys(check.family for check in CHECKS):
        lines += [
            "",
            f"## {family}",
            "",
            "| check | decides for | question | bound | must catch |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(check) for check in CHECKS if check.family == family]
    lines += [
        "",
        "## Planted faults that the quick battery does not see",
        "",
        "| fault | why |",
        "|---|---|",
    ]
    lines += [f"| `{name}` | {why} |" for name, why in OUT_OF_REACH.items()]
    return "\n".join(lines) + "\n"


def _row(check: Check) -> str:
    roles = " and ".join(check.roles) if check.decides else "nothing (reported)"
    full = {"quick": "", "full": " (`--full`)", "wide": " (`--wide`)"}[check.depth]
    caught = ", ".join(f"`{name}`" for name in check.catches)
    return f"| `{check.name}`{full} | {roles} | {check.question} | {check.bound} | {caught} |"


if __name__ == "__main__":
    sys.stdout.write(markdown())
