"""Questions whose right answer is a whole number, the same in every order of summation: tolerance zero.

Entries are small integers, so every partial sum is exact in fp32 (below 2^24) and, for the bf16 cases, below 2^8. Any deviation is
a fault of the chip, whatever its rounding. Operands are also scaled by powers of two over sixty octaves: the answer stays exact,
and a unit that fails only for operands of some size is met. Letters: M, K, N rows, inner and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bascule import draws
from bascule.qualify import reproduce
from bascule.qualify.context import CheckContext, Measured
from bascule.qualify.hold import same_bits
from bascule.records import Evidence

# Odd sizes, sizes beside powers of two, more rows than on-chip buffers like to hold (1,024 and 2,048), long K (4,096, and
# 32,768, past which a public kernel read on behind its operand).
SHAPES_MKN = ((64, 96, 64), (127, 65, 33), (129, 128, 127), (1025, 48, 40), (2049, 17, 24), (31, 4097, 9), (3, 32769, 5), (256, 256, 256))  # fmt: skip
SCALES = (-30, -24, -18, -12, -6, 6, 12, 18, 24, 30)
REPEATS = 12
SHRINK_TRIES = 80
Shape = tuple[int, int, int]

_MATMUL_BODY = """
for name in sorted(key for key in stored if key.startswith("a")):
    a, b = stored[name], stored["b" + name[1:]]
    for _ in range(12):
        show(f"{tuple(a.shape)} @ {tuple(b.shape)}", a.to(device) @ b.to(device), (a.double() @ b.double()).float())
"""
_REDUCTION_BODY = """
for n in (255, 1000, 4097, 65537):
    x = torch.randint(-8, 9, (n,)).float()
    show(f"sum of {n}", x.to(device).sum(), x.double().sum().float())
    show(f"cumsum of {n}", x.to(device).cumsum(0), x.double().cumsum(0).float())
    show(f"sort of {n}", x.to(device).sort().values, x.sort().values)
    show(f"top 8 of {n}", torch.randperm(n).float().to(device).topk(8).values, torch.arange(n - 1, n - 9, -1).float())
"""


class _Tally:
    """Counts wrong values; keeps the first sentence."""

    def __init__(self) -> None:
        self.values = 0
        self.wrong = 0
        self.first = ""

    def hold(self, what: str, got: Tensor, want: Tensor) -> None:
        self.values += want.numel()
        got = got.cpu()
        if got.shape != want.shape:
            self.wrong += want.numel()
            self.first = (
                self.first or f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
            )
            return
        different = int((got != want).sum())  # NaN differs from everything
        self.wrong += different
        if different and not self.first:
            at = int((got != want).flatten().nonzero()[0])
            self.first = f"{what}: {different} of {want.numel()} values wrong, first at {at}: {float(got.flatten()[at]):g}, expected {float(want.flatten()[at]):g}"

    def evidence(
        self, context: CheckContext, name: str, body: str, inputs: dict[str, Tensor] | None = None
    ) -> list[Evidence]:
        measured: Measured = {"values": self.values, "wrong": self.wrong}
        if not self.wrong:
            return [context.passed(f"{self.values} values exactly right", measured)]
        script = reproduce.plain_script(context, f"{name}-{context.role}", self.first, body, inputs)
        return [context.failed(self.first, measured, script=script)]


def integers(seed: int, what: str, shape: tuple[int, ...], low: int = -8, high: int = 8) -> Tensor:
    """Whole numbers in [low, high] as fp32 on the CPU."""
    count = int(torch.Size(shape).numel())
    values = (
        draws.integers(draws.key(seed, f"qualify.exact/{what}", *shape), high - low + 1, count)
        + low
    )
    return torch.from_numpy(values).reshape(shape).float()


def matmul(context: CheckContext) -> list[Evidence]:
    """Products at awkward shapes, at sixty octaves, in bf16, batched, and (for training) through autograd."""
    tally = _Tally()
    failing, steady = _shapes(context, tally)
    _scales(context, tally)
    _full_range(context, tally)
    _bf16(context, tally)
    if context.role == "train":
        _gradients(context, tally)
    shapes: tuple[Shape, ...] = SHAPES_MKN
    if failing:
        smallest = _shrunk(context, failing)
        shapes = (smallest, *shapes)
        tally.first += f"; smallest shape that fails: {'x'.join(map(str, smallest))} (MxKxN)"
    if tally.wrong and not steady:
        tally.first += "; equal products differ from one repetition to the next"
    inputs = {}
    for place, (m, k, n) in enumerate(shapes):
        inputs[f"a{place}"] = integers(context.seed, "a", (m, k))
        inputs[f"b{place}"] = integers(context.seed, "b", (k, n))
    return tally.evidence(context, "exact.matmul", _MATMUL_BODY, inputs)


def _shapes(context: CheckContext, tally: _Tally) -> tuple[Shape | None, bool]:
    """Returns the first shape with a wrong value, and whether every repetition gave the same bits."""
    device, seed = context.accelerator.device, context.seed
    cases = [(integers(seed, "a", (m, k)), integers(seed, "b", (k, n))) for m, k, n in SHAPES_MKN]
    want = [(a.double() @ b.double()).float() for a, b in cases]
    on_chip = [(a.to(device), b.to(device), b.t().contiguous().to(device).t()) for a, b in cases]
    with context.chip():
        # The second operand once as it lies and once transposed in memory; repeated, because a bad unit may act now and then.
        got = [
            [(a @ b).cpu(), (a @ turned).cpu()] for _ in range(REPEATS) for a, b, turned in on_chip
        ]
        batched = torch.bmm(on_chip[0][0].expand(5, -1, -1), on_chip[0][1].expand(5, -1, -1)).cpu()
    failing: Shape | None = None
    for place, answers in enumerate(got):
        m, k, n = SHAPES_MKN[place % len(SHAPES_MKN)]
        before = tally.wrong
        for answer in answers:
            tally.hold(f"{m}x{k} @ {k}x{n}", answer, want[place % len(SHAPES_MKN)])
        if tally.wrong > before and failing is None:
            failing = (m, k, n)
    tally.hold("batch of 5 products", batched, want[0].expand(5, -1, -1))
    cases_asked = len(SHAPES_MKN)
    steady = all(
        same_bits(now, before)
        for place, answers in enumerate(got[cases_asked:])
        for now, before in zip(answers, got[place % cases_asked], strict=True)
    )
    return failing, steady


def _shrunk(context: CheckContext, shape: Shape) -> Shape:
    """Make the sizes smaller, one at a time, by halves and then by ones, as long as the product stays wrong."""
    left = SHRINK_TRIES
    smaller = True
    while smaller and left:
        smaller = False
        for place in range(3):
            for size in (shape[place] // 2, shape[place] - 1):
                tried: Shape = (*shape[:place], size, *shape[place + 1 :])  # type: ignore[assignment]
                left -= left > 0
                if left and size >= 1 and _fails(context, tried):
                    shape, smaller = tried, True
                    break
    return shape


def _fails(context: CheckContext, shape: Shape) -> bool:
    m, k, n = shape
    a, b = integers(context.seed, "a", (m, k)), integers(context.seed, "b", (k, n))
    want = (a.double() @ b.double()).float()
    left, right = a.to(context.accelerator.device), b.to(context.accelerator.device)
    with context.chip():
        got = [(left @ right).cpu() for _ in range(REPEATS)]
    return any(not torch.equal(answer, want) for answer in got)


def _scales(context: CheckContext, tally: _Tally) -> None:
    """A power of two on one operand and half of it on the other: exact, and mean|A| * mean|B| sweeps the range."""
    device, seed = context.accelerator.device, context.seed
    a, b = integers(seed, "scaled a", (48, 64)), integers(seed, "scaled b", (64, 40))
    want = (a.double() @ b.double()).float()
    operands = [
        ((a * 2.0 ** (octave // 2)).to(device), (b * 2.0 ** (octave - octave // 2)).to(device))
        for octave in SCALES
    ]
    with context.chip():
        got = [(left @ right).cpu() for left, right in operands]
    for octave, answer in zip(SCALES, got, strict=True):
        tally.hold(f"product scaled by 2^{octave}", answer, want * 2.0**octave)


def _full_range(context: CheckContext, tally: _Tally) -> None:
    """Few terms of large whole numbers: sums use all 24 bits, so an accumulator or a product that keeps fewer shows."""
    device, seed = context.accelerator.device, context.seed
    a = integers(seed, "wide a", (96, 4), -2048, 2048)
    b = integers(seed, "wide b", (4, 72), -2048, 2048)
    left, right = a.to(device), b.to(device)
    with context.chip():
        got = [(left @ right).cpu() for _ in range(REPEATS)]
    for answer in got:
        tally.hold(
            "product over the whole range of fp32", answer, (a.double() @ b.double()).float()
        )


def _bf16(context: CheckContext, tally: _Tally) -> None:
    device, seed = context.accelerator.device, context.seed
    a, b = integers(seed, "bf16 a", (96, 250), -1, 1), integers(seed, "bf16 b", (250, 72), -1, 1)
    left, right = a.bfloat16().to(device), b.bfloat16().to(device)
    with context.chip():
        got = (left @ right).cpu()
    tally.hold("bf16 product", got.float(), (a.double() @ b.double()).float())


def _gradients(context: CheckContext, tally: _Tally) -> None:
    """d(sum g*(x@w)) / dx = g@w^T and /dw = x^T@g, all whole numbers."""
    device, seed = context.accelerator.device, context.seed
    x, w, g = (
        integers(seed, "x", (257, 48)),
        integers(seed, "w", (48, 65)),
        integers(seed, "g", (257, 65)),
    )
    dx, dw = (g.double() @ w.double().t()).float(), (x.double().t() @ g.double()).float()
    x_chip, w_chip, g_chip = (value.to(device) for value in (x, w, g))
    found = []
    with context.chip():
        for _ in range(REPEATS):
            left, right = x_chip.detach().requires_grad_(True), w_chip.detach().requires_grad_(True)
            found.append(
                [part.cpu() for part in torch.autograd.grad(left @ right, (left, right), g_chip)]
            )
        left, right = (
            part.expand(3, -1, -1).clone().requires_grad_(True) for part in (x_chip, w_chip)
        )
        batched = torch.autograd.grad(
            torch.bmm(left, right), (left, right), g_chip.expand(3, -1, -1)
        )
        found.append([part[-1].cpu() for part in batched])
    for got_x, got_w in found:
        tally.hold("gradient of a product by its left operand", got_x, dx)
        tally.hold("gradient of a product by its right operand", got_w, dw)


def reduction(context: CheckContext) -> list[Evidence]:
    """Sums, cumulative sums, maxima, sorts, top-k, gathers and scatters of whole numbers."""
    device, seed = context.accelerator.device, context.seed
    tally = _Tally()
    for size in (255, 1000, 4097, 65537):
        x = integers(seed, "sum", (size,))
        distinct = torch.from_numpy(
            draws.permutation(draws.key(seed, "qualify.exact/top", size), size)
        ).float()
        index = torch.from_numpy(
            draws.permutation(draws.key(seed, "qualify.exact/index", size), size)
        )
        # As integers: for floats CUDA has no cumulative sum that it would call deterministic, and refuses.
        whole = x.long()
        x_chip, distinct_chip, index_chip = x.to(device), distinct.to(device), index.to(device)
        whole_chip = whole.to(device)
        with context.chip():
            got = {
                "sum": x_chip.sum(),
                "cumulative sum": whole_chip.cumsum(0),
                "max": x_chip.max(),
                "sort": distinct_chip.sort().values,
                "top 8": distinct_chip.topk(8).values,
                "gather": x_chip.gather(0, index_chip),
                "index select": x_chip.index_select(0, index_chip),
                "scatter": torch.zeros_like(x_chip).scatter(0, index_chip, x_chip),
            }
            got = {what: value.cpu() for what, value in got.items()}
        want = {
            "sum": x.double().sum().float(),
            "cumulative sum": whole.cumsum(0),
            "max": x.max(),
            "sort": torch.arange(size).float(),
            "top 8": torch.arange(size - 1, size - 9, -1).float(),
            "gather": x[index],
            "index select": x[index],
            "scatter": torch.zeros(size).scatter(0, index, x),
        }
        for what, value in got.items():
            tally.hold(f"{what} of {size}", value, want[what])
    _row_top(context, tally)
    return tally.evidence(context, "exact.reduction", _REDUCTION_BODY)


def _row_top(context: CheckContext, tally: _Tally) -> None:
    """Top-k along rows, as a router asks it."""
    rows = torch.stack(
        [
            torch.from_numpy(
                draws.permutation(draws.key(context.seed, "qualify.exact/row", row), 64)
            )
            for row in range(65)
        ]
    ).float()
    rows_chip = rows.to(context.accelerator.device)
    with context.chip():
        values, places = (part.cpu() for part in rows_chip.topk(8, dim=-1))
    tally.hold("top 8 of each row", values, torch.arange(63, 55, -1).float().expand(65, -1))
    tally.hold(
        "places of the top 8 of each row",
        rows.gather(1, places),
        torch.arange(63, 55, -1).float().expand(65, -1),
    )
