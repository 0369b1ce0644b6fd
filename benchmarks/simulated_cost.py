"""What a simulated chip costs: a training step (forward and backward) on `sim:` chips beside the same step on their base.

    python benchmarks/simulated_cost.py

Paired: base and simulated steps alternate in one process, CPU time, medians. Gradients of `sim:clean` and of `ascend-r2` before its
onset are first held against the base's, bit for bit.
"""

from __future__ import annotations

import statistics
import time

import torch

from bascule.accelerators.base import Accelerator, Work
from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.model import weights
from bascule.model.transformer import Transformer

SIMULATED = ("sim:clean", "sim:ascend-r2", "sim:ascend-r2?onset_step=0")
REPEATS = 15


def step(chip: Accelerator, model: Transformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    with chip.session(Work("train", 1)):
        loss = model(tokens).logits_BTV.square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def main() -> None:
    torch.set_num_threads(1)
    model = Transformer(ModelConfig(preset="nano", vocab_size=105))
    weights.initialise(model, 0)
    tokens = torch.randint(0, 105, (64, 52), generator=torch.Generator().manual_seed(0))
    base = open_accelerator("cpu")
    chips = [open_accelerator(name) for name in SIMULATED]
    right = step(base, model, tokens)
    for chip in chips[:2]:
        same = all(
            a is b or torch.equal(a, b)
            for a, b in zip(right, step(chip, model, tokens), strict=True)
        )
        assert same, f"{chip.name} changed a bit although no fault can act"
    spent: dict[str, list[float]] = {chip.name: [] for chip in [base, *chips]}
    for _ in range(REPEATS):
        for chip in [base, *chips]:
            start = time.process_time()
            step(chip, model, tokens)
            spent[chip.name].append(time.process_time() - start)
    floor = statistics.median(spent["cpu"])
    for name, seconds in spent.items():
        print(
            f"{name:<30} {statistics.median(seconds) * 1000:7.1f} ms  {statistics.median(seconds) / floor:.2f}x"
        )


if __name__ == "__main__":
    main()
