"""Guard a training loop that bascule does not own: plain PyTorch under DistributedDataParallel, three ranks over gloo.

Every matrix product is checked on its rank, and the ranks vote on gradients, weights, cursor and the all-reduce. Rank 2's chip is
simulated and zeroes some outputs from step 20 on; its loss looks harmless. All ranks stop before the step commits.

    torchrun --nproc-per-node 3 examples/guard_your_own_loop.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bascule.accelerators.base import Work
from bascule.accelerators.registry import open_accelerator
from bascule.guard.checksum import Checksums, parameter_names
from bascule.guard.replicas import Replicas, all_reduce


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    chip = open_accelerator("sim:zeroed?onset_step=20@cpu" if rank == 2 else "cpu", seed=1)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))
    model = DistributedDataParallel(chip.move(plain))
    replicas = Replicas(chip.device)
    model.register_comm_hook(replicas, all_reduce)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(rank)
    for step in range(1, 51):
        inputs, targets = torch.randn(16, 32), torch.randn(16, 1)
        with chip.session(Work("train", step)), Checksums(names=parameter_names(plain)) as products:
            loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
        wrong = products.violations()
        alarm = torch.tensor(float(bool(wrong)))
        dist.all_reduce(alarm)  # all commit or none
        splits = replicas.splits(step, step * 16, model)
        if wrong:
            print(f"rank {rank}, step {step}: loss {loss.item():.3f} looks fine, but {wrong[0]}")
        for split in splits if rank == 0 else ():
            print(f"step {step}: {split}")
        if alarm or splits:
            break
        optimizer.step()
    if rank == 0:
        print(
            f"stopped before the update of step {step}" if alarm or splits else "50 steps, no alarm"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
