"""Four real processes over gloo: clean ranks agree; each kind of disagreement is seen, and the right rank is named."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bascule.guard import replicas
from bascule.guard.replicas import Replicas
from bascule.model.names import layer_of

RANKS = 4


def _rank(rank: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    model = DistributedDataParallel(plain)
    judge = Replicas()
    model.register_comm_hook(judge, replicas.all_reduce)
    told = {}
    for step, fault in enumerate(
        ["clean", "clean", "cursor", "gradient", "layer", "nan", "collective", "weights"]
    ):
        torch.manual_seed(100 * step + rank)
        x = torch.randn(8, 16)
        if fault == "nan" and rank == 1:
            x[0, 0] = float("nan")
        if fault == "weights" and rank == 3:
            with torch.no_grad():
                plain[2].bias[1] += 1e-6
        model.zero_grad()
        factor = 1e3 if fault == "gradient" and rank == 2 else 1.0
        hooks = []
        if (
            fault == "layer" and rank == 3
        ):  # some 22 times the others', and the whole norm is 13 times theirs
            hooks = [one.register_hook(lambda grad: 25 * grad) for one in plain[0].parameters()]
        (factor * model(x).square().mean()).backward()
        for hook in hooks:
            hook.remove()
        if fault == "collective" and rank == 0:
            judge._after[0] = judge._after[0] + 1e-3
        splits = judge.splits(step, step * 8 + (rank == 1 and fault == "cursor"), model)
        told.setdefault(fault, []).append([(s.what, s.guilty) for s in splits])
        if fault == "layer":
            assert "of module.0" in splits[0].detail, splits[0].detail
    Path(out, f"{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def test_each_disagreement_is_seen_by_all_ranks_and_the_right_one_is_named(tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    done = subprocess.run([sys.executable, __file__, str(port), str(tmp_path)], check=False)
    assert done.returncode == 0
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    assert all(one == told[0] for one in told)
    assert told[0] == {
        "clean": [[], []],
        "cursor": [[["step and cursor", [1]]]],
        "gradient": [[["local gradients", [2]]]],
        "layer": [[["local gradients", [3]]]],
        "nan": [[["local gradients", [1]]]],
        "collective": [[["all-reduce", [0]]]],
        "weights": [[["weights", [3]]]],
    }


def test_two_ranks_that_differ_accuse_nobody() -> None:
    split = replicas._minority("weights", [7, 8])
    assert split is not None and split.guilty == ()
    assert replicas._outlier([1.0, 100.0]) is not None
    assert replicas._outlier([1.0, 100.0]).guilty == ()  # type: ignore[union-attr]
    assert replicas._outlier([1.0, 4.0]) is None


def test_a_layer_is_looked_at_alone_and_one_with_next_to_nothing_is_not() -> None:
    names = ["embed", "layers.0"]
    calm = [[1.0, 3.0], [1.1, 2.0], [0.9, 2.5]]
    norms = [3.0, 2.3, 2.7]
    assert replicas._outlying_layer(names, calm, norms) is None
    found = replicas._outlying_layer(names, [calm[0], [30.0, 2.0], calm[2]], [3.0, 30.1, 2.7])
    assert found is not None and found.guilty == (1,) and "of embed" in found.detail
    tiny = [[1e-9, 3.0], [1e-6, 2.0], [1e-9, 2.5]]
    assert replicas._outlying_layer(names, tiny, norms) is None
    unused = [[0.0, 3.0], [1.0, 2.0], [0.0, 2.5]]  # what only one rank's data reaches
    assert replicas._outlying_layer(names, unused, norms) is None


def test_layers_are_named_by_their_place_in_the_stack() -> None:
    assert [layer_of(name) for name in ("module.layers.3.attn.q.weight", "lm_head.weight", "scale")] == [
        "module.layers.3", "lm_head", "scale",
    ]  # fmt: skip


def test_what_the_ranks_say_alone_is_called_by_its_name() -> None:
    assert replicas.Split("all-reduce", (0,), "x").attribution == "link"
    assert replicas.Split("step and cursor", (), "x").attribution == "software"
    assert str(replicas.Split("weights", (1,), "x")) == "weights: x (rank 1; unknown)"


def _ranks(port: int, out: str) -> int:
    """All ranks as forks of one process: torch is imported once, not four times. How many of them failed."""
    children = []
    for rank in range(RANKS):
        children.append(os.fork())
        if children[-1] == 0:
            failed = 1
            try:
                _rank(rank, port, out)
                failed = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(failed)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


if __name__ == "__main__":
    sys.exit(_ranks(int(sys.argv[1]), sys.argv[2]))
