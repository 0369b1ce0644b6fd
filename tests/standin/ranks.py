"""Two ranks on the stand-in, unchanged PyTorch above it: DDP over `hccl`.

`python ranks.py BUILD RANK FOLDER` is one rank; it prints `ok` when a step over halves of a batch gave the gradients of the whole batch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
import hccl
from install import install


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 4))


def step(model: nn.Module, x: Tensor) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss)


def main(build: Path, rank: int, folder: Path) -> None:
    install(build)
    hccl.register()
    dist.init_process_group(
        "hccl", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    x = torch.cos(torch.arange(8.0 * 16)).view(8, 16)
    whole = made()
    step(whole, x)
    mine = x[4 * rank : 4 * rank + 4].to("npu")
    ddp = DistributedDataParallel(made().to("npu"))
    step(ddp, mine)
    hold(whole, {name: value.cpu() for name, value in ddp.module.state_dict().items()})
    dist.destroy_process_group()
    print("ok")


def hold(whole: nn.Module, found: dict[str, Tensor]) -> None:
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
