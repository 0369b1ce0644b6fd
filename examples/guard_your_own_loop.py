"""Guard a training loop that bascule does not own: every matrix product of a step is checked, a wrong one is named.

python examples/guard_your_own_loop.py
"""

from __future__ import annotations

import torch
from torch import nn

from bascule.accelerators.base import Work
from bascule.accelerators.registry import open_accelerator
from bascule.guard.checksum import Checksums, parameter_names


def main() -> None:
    chip = open_accelerator(
        "sim:zeroed@cpu", seed=1
    )  # simulated: zeroes some outputs of its matrix products
    torch.manual_seed(0)
    model = chip.move(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(1, 51):
        inputs, targets = torch.randn(16, 32), torch.randn(16, 1)
        with chip.session(Work("train", step)), Checksums(names=parameter_names(model)) as guard:
            loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
        wrong = guard.violations()
        if wrong:
            print(
                f"step {step}: not committed, loss {loss.item():.4f} looks harmless, but {wrong[0]}"
            )
            return
        optimizer.step()
    print("50 steps, no violation")


if __name__ == "__main__":
    main()
