"""Two ranks on the stand-in under unchanged PyTorch: DDP, FSDP2 and its sharded checkpoint over `hccl`.

`python ranks.py RANK FOLDER` is one rank. It prints one line of JSON: what each way of training ended with, as the largest difference
from the same two half batches, averaged by hand on the CPU. Zero means equal to the bit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

STEPS = 3
Weights = dict[str, Tensor]


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 4))


def learn(model: nn.Module, *halves: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for half in halves:
            (model(half).square().mean() / len(halves)).backward()
        optimizer.step()


def ddp(mine: Tensor, folder: Path) -> Weights:
    model = DistributedDataParallel(made().to("npu"))
    learn(model, mine)
    return model.module.state_dict()


def sharded() -> nn.Module:
    model = made().to("npu")
    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def fsdp2(mine: Tensor, folder: Path) -> Weights:
    model = sharded()
    learn(model, mine)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "dcp")
    return whole(model)


def checkpoint(mine: Tensor, folder: Path) -> Weights:
    """What fsdp2 saved, in shards, into a model that has other weights."""
    model = sharded()
    learn(model, -mine)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder / "dcp")
    model.load_state_dict(state["model"])
    return whole(model)


def whole(model: nn.Module) -> Weights:
    return {name: shard.full_tensor() for name, shard in model.state_dict().items()}


def main(rank: int, folder: Path) -> None:
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)  # fmt: skip
    halves = torch.cos(torch.arange(8.0 * 16)).view(2, 4, 16).unbind()
    plain = made()
    learn(plain, *halves)
    apart = {}
    for way in (ddp, fsdp2, checkpoint):
        ended = way(halves[rank].to("npu"), folder)
        apart[way.__name__] = max(
            float((ended[name].cpu() - value).abs().max())
            for name, value in plain.state_dict().items()
        )
        assert {value.device.type for value in ended.values()} == {"npu"}
    dist.destroy_process_group()
    print(json.dumps(apart))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
