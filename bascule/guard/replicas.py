"""Do the ranks of one data-parallel run still agree, and who does not? One small all-gather a step; every rank gets the same answer.

    step and data cursor   equal on all ranks, else somebody skipped or repeated data
    weights' bits          equal after every update (guard/bits): replicas that drift apart are seen at once
    local gradients        each rank's own statistics, in all and layer by layer, taken *before* the all-reduce; afterwards all ranks
                           hold the same wrong sum and a vote is blind
    the all-reduce         sum after = mean of the sums before: a collective that drops, repeats or alters data breaks it

A rank is named only where a strict majority speaks against it; two ranks that differ accuse nobody. As all ranks see the same
figures, all commit or none. Chips of one kind that err alike are for another kind of chip to judge (guard/audit).

    replicas = Replicas(device)
    model.register_comm_hook(replicas, all_reduce)      # DistributedDataParallel, any backend
    ... forward, backward ...
    if splits := replicas.splits(step, cursor, model): do not step
"""

# No `from __future__ import annotations` here: DistributedDataParallel refuses hooks whose annotations are strings.
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bascule import numerics
from bascule.guard.bits import bit_sums
from bascule.guard.sentinels import median
from bascule.model.names import layer_of
from bascule.records import Attribution

OUTLIER = 20.0
"""A rank whose gradient norm is so many times the other ranks' median computed something else. Batches alone stay below 5."""

LEAST_SHARE = 0.01
"""Of a rank's whole gradient norm: what a layer must have before it is looked at alone. Where there is next to nothing the ranks differ by
any factor."""

MARGIN = 4.0
"""On the rounding of a sum over ranks, for the order in which a backend adds."""


@dataclass(frozen=True)
class Split:
    """One thing on which the ranks do not agree. `guilty` is empty where no majority can tell."""

    what: str
    guilty: tuple[int, ...]
    detail: str

    @property
    def attribution(self) -> Attribution:
        """What the ranks alone can say: the loop's own book-keeping, the link, or `unknown` (data or chip: a replay tells)."""
        return ATTRIBUTIONS.get(self.what, "unknown")

    def __str__(self) -> str:
        who = f"rank {', '.join(map(str, self.guilty))}" if self.guilty else "no rank can be named"
        return f"{self.what}: {self.detail} ({who}; {self.attribution})"


ATTRIBUTIONS: dict[str, Attribution] = {"step and cursor": "software", "all-reduce": "link"}


@dataclass
class Replicas:
    """State of the communication hook `all_reduce`, and the judge of what it saw. One per process group."""

    device: torch.device | str = "cpu"
    group: dist.ProcessGroup | None = None
    _before: dict[int, Tensor] = field(default_factory=dict)
    _after: dict[int, Tensor] = field(default_factory=dict)
    _layers: dict[int, Tensor] = field(default_factory=dict)
    _unit: float = 0.0

    def splits(self, step: int, cursor: int, model: nn.Module) -> list[Split]:
        """What the ranks do not agree on in the step just computed; call it on every rank, before the optimizer's step.

        `cursor`: how much data was consumed; any number that must be equal everywhere."""
        bits = bit_sums(model.parameters()).cpu()
        weights = int((bits * torch.arange(1, len(bits) + 1)).sum())
        buckets = sorted(self._before)
        before = [self._before[i] for i in buckets]
        after = [self._after[i] for i in buckets]
        names, layers = self._layer_norms(model)
        sums = torch.cat([*before, *after, *layers]).cpu() if buckets else torch.zeros(0, dtype=torch.float64)  # fmt: skip
        self._before.clear()
        self._after.clear()
        self._layers.clear()
        whole = self._gather(
            torch.cat([torch.tensor([step, cursor, weights]), sums.view(torch.int64)])
        )
        counts = [tuple(int(value) for value in row[:3]) for row in whole]
        stats = [row[3:].view(torch.float64) for row in whole]
        found = [
            _minority("step and cursor", [row[:2] for row in counts]),
            _minority("weights", [row[2] for row in counts]),
        ]
        if buckets:
            local = torch.stack([one[: 3 * len(buckets)].view(-1, 3) for one in stats])
            reduced = torch.stack([one[3 * len(buckets) : 4 * len(buckets)] for one in stats])
            by_layer = [one[4 * len(buckets) :].sqrt().tolist() for one in stats]
            norms = local[:, :, 2].sum(1).sqrt().tolist()
            found += [_outlier(norms) or _outlying_layer(names, by_layer, norms)]
            found += [_not_conserved(local, reduced, self._unit)]
        return [split for split in found if split is not None]

    def _layer_norms(self, model: nn.Module) -> tuple[list[str], list[Tensor]]:
        """Names of the layers and, of each, this rank's own gradient's sum of squares, in the order of the model."""
        of_layer: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if id(parameter) in self._layers:
                of_layer.setdefault(layer_of(name), []).append(self._layers[id(parameter)])
        return list(of_layer), [torch.stack(one).sum().reshape(1) for one in of_layer.values()]

    def _gather(self, mine: Tensor) -> list[Tensor]:
        mine = mine.to(self.device)
        theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(theirs, mine, group=self.group)
        return [one.cpu() for one in theirs]


def all_reduce(replicas: Replicas, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]  # fmt: skip
    """DistributedDataParallel's communication hook: the mean over ranks, with what went in and what came out written down."""
    local = bucket.buffer()
    replicas._before[bucket.index()] = _statistics(local)
    squares = torch.stack(torch._foreach_norm(bucket.gradients())).double().square()
    replicas._layers.update(zip(map(id, bucket.parameters()), squares, strict=True))
    replicas._unit = numerics.tolerance(local.dtype).unit
    local.div_(dist.get_world_size(replicas.group))
    work = dist.all_reduce(local, group=replicas.group, async_op=True)

    def after(future: torch.futures.Future[Any]) -> Tensor:
        reduced: Tensor = future.value()[0]
        replicas._after[bucket_index] = reduced.sum(dtype=torch.float64).reshape(1)
        return reduced

    bucket_index = bucket.index()
    return work.get_future().then(after)  # type: ignore[no-any-return]


def _statistics(local: Tensor) -> Tensor:
    """(sum, sum of sizes, sum of squares) in fp64: 24 bytes a bucket, on the chip, no wait."""
    wide = local.double()
    return torch.stack([wide.sum(), wide.abs().sum(), wide.square().sum()])


def _minority(what: str, values: Sequence[Any]) -> Split | None:
    """Who holds another value than the strict majority."""
    (common, votes), *others = Counter(values).most_common()
    if not others:
        return None
    guilty = tuple(rank for rank, value in enumerate(values) if value != common)
    if votes * 2 <= len(values):
        guilty = ()
    return Split(what, guilty, f"{len(others) + 1} different values on {len(values)} ranks")


def _outlier(norms: Sequence[float]) -> Split | None:
    """Local gradient norms: one that is not a number, or far above all others."""
    bad = tuple(rank for rank, norm in enumerate(norms) if not math.isfinite(norm))
    if bad:
        named = bad if len(bad) * 2 < len(norms) else ()
        return Split("local gradients", named, f"not finite on {len(bad)} of {len(norms)} ranks")
    for rank, norm in enumerate(norms):
        usual = median([other for at, other in enumerate(norms) if at != rank] or [norm])
        if norm > OUTLIER * usual:
            named = (rank,) if len(norms) > 2 else ()
            return Split(
                "local gradients", named, f"norm {norm:.3g}, the others' median {usual:.3g}"
            )
    return None


def _outlying_layer(
    names: Sequence[str], by_layer: Sequence[Sequence[float]], norms: Sequence[float]
) -> Split | None:
    """One rank's gradient of one layer far above all other ranks', though the whole hides it. By layer and not by parameter: an
    expert gets many tokens on one rank and none on the next."""
    for at, name in enumerate(names):
        of_ranks = [one[at] for one in by_layer]
        for rank, norm in enumerate(of_ranks):
            largest = max((o for other, o in enumerate(of_ranks) if other != rank), default=norm)
            if norm > OUTLIER * largest > 0 and norm > LEAST_SHARE * norms[rank]:
                named = (rank,) if len(of_ranks) > 2 else ()
                told = f"of {name}: norm {norm:.3g}, the other ranks' largest {largest:.3g}"
                return Split("local gradients", named, told)
    return None


def _not_conserved(local_RB3: Tensor, after_RB: Tensor, unit: float) -> Split | None:
    """R ranks, B buckets: the sum that came out must be the mean of the sums that went in, on every rank."""
    ranks = len(local_RB3)
    expected_B = local_RB3[:, :, 0].mean(0)
    bound_B = MARGIN * unit * ranks * local_RB3[:, :, 1].mean(0) + numerics.CHECKSUM_FLOOR
    wrong_RB = (after_RB - expected_B).abs() > bound_B
    if not bool(torch.isfinite(expected_B).all()) or not bool(wrong_RB.any()):
        return None
    guilty = tuple(rank for rank in range(ranks) if bool(wrong_RB[rank].any()))
    named = guilty if len(guilty) * 2 < ranks else ()
    bucket = int(wrong_RB.any(0).nonzero()[0])
    worst = float(((after_RB - expected_B).abs() / bound_B).max())
    return Split(
        "all-reduce",
        named,
        f"bucket {bucket} came out {worst:.3g} times its bound away on {len(guilty)} ranks",
    )
