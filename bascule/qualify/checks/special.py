"""The ends of the number range, and the sizes at which kernels change their mind.

`ranges`: special functions against fp64 on inputs that reports name (exp far below zero, rsqrt of tiny values, sine of large angles,
softmax of far-apart logits), and what must not be hidden: overflow stays Inf, 0/0 and NaN stay NaN. A chip that saturates instead
trains on wrong numbers that no sentinel for NaN will ever see.
`shapes`: products, softmax and norms beside powers of two, over many rows, long sums, odd tails, no rows at all, turned layouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bascule import numerics
from bascule.qualify import reproduce
from bascule.qualify.checks.exact import integers
from bascule.qualify.checks.numerics import examine
from bascule.qualify.context import CheckContext, Measured
from bascule.qualify.question import play
from bascule.qualify.trace import Call, signature_of
from bascule.records import Evidence

UNITS_ALLOWED = 8.0  # of roundoff; vendors' own maths libraries promise 1 to 4
POINTS = 1024


def ranges(context: CheckContext) -> list[Evidence]:
    inputs = {name: make() for name, (make, _) in _FUNCTIONS.items()}
    hidden = _overflowing()
    device = context.accelerator.device
    inputs_chip = {name: x.to(device) for name, x in inputs.items()}
    hidden_chip = {name: x.to(device) for name, x in hidden.items()}
    with context.chip(), torch.no_grad():
        got = {name: _FUNCTIONS[name][1](x).cpu() for name, x in inputs_chip.items()}
        shown = {name: _OVERFLOWS[name](x).cpu() for name, x in hidden_chip.items()}
    worst: dict[str, float] = {
        name: _units(got[name], _FUNCTIONS[name][1](inputs[name].double())) for name in got
    }
    hides = [
        name
        for name in shown
        if not torch.equal(_kind(shown[name]), _kind(_OVERFLOWS[name](hidden[name])))
    ]
    findings = []
    for name, units in worst.items():
        if units > UNITS_ALLOWED:
            measured: Measured = {"function": name, "units": units}
            findings.append(
                context.failed(
                    f"{name}: off by {units:.3g} units of roundoff, allowed {UNITS_ALLOWED:g}",
                    measured,
                    script=_units_script(context, name, inputs[name]),
                )
            )
    if hides:
        script = reproduce.plain_script(
            context,
            f"numerics.special-{context.role}",
            f"hidden overflow in {', '.join(hides)}",
            _OVERFLOW_BODY,
        )
        findings.append(
            context.failed(
                f"overflow or NaN is hidden: {', '.join(hides)}",
                {"hidden": len(hides)},
                script=script,
            )
        )
    if findings:
        return findings
    name = max(worst, key=lambda key: worst[key])
    return [
        context.passed(
            f"{len(worst)} functions within {worst[name]:.2g} units ({name}); overflow and NaN are shown",
            {"units": worst[name]},
        )
    ]


def _units_script(context: CheckContext, name: str, x: Tensor) -> Path:
    body = _UNITS_BODY.replace("$function", _SOURCES[name])
    return reproduce.plain_script(
        context, f"numerics.special-{context.role}-{name}", f"{name} is imprecise", body, {"x": x}
    )


def _units(got: Tensor, want: Tensor) -> float:
    """Largest error in units of roundoff of the result's own size; inf when finite and non-finite disagree."""
    if numerics.nonfinite_mismatches(got, want.float()):
        return math.inf
    both = torch.isfinite(want)
    size = (
        want[both].abs().clamp_min(2.0**-126)
    )  # below, the gap between numbers no longer shrinks, or is flushed
    error = (got.double()[both] - want[both]).abs()
    return float((error / size).max()) / numerics.tolerance(got.dtype).unit


def _kind(x: Tensor) -> Tensor:
    """0 finite, 1 +Inf, 2 -Inf, 3 NaN."""
    return torch.isposinf(x).int() + 2 * torch.isneginf(x).int() + 3 * torch.isnan(x).int()


def _line(low: float, high: float) -> Callable[[], Tensor]:
    return lambda: torch.linspace(low, high, POINTS, dtype=torch.float64).float()


def _octaves(low: int, high: int) -> Callable[[], Tensor]:
    return lambda: torch.exp2(torch.linspace(low, high, POINTS, dtype=torch.float64)).float()


# name -> (inputs, function). Subnormal results are left out: chips that flush them are common and the model never meets them.
_FUNCTIONS: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]] = {
    "exp": (_line(-80.0, 80.0), torch.exp),
    "log": (_octaves(-100, 100), torch.log2),
    "rsqrt": (_octaves(-100, 100), torch.rsqrt),
    "sqrt": (_octaves(-100, 100), torch.sqrt),
    "reciprocal": (_octaves(-100, 100), torch.reciprocal),
    "sigmoid": (_line(-60.0, 20.0), torch.sigmoid),
    "silu": (_line(0.01, 60.0), F.silu),
    "cos of large angles": (
        lambda: torch.arange(POINTS).float() * 97.0,
        lambda x: 2.0 + torch.cos(x),
    ),
    "sin of large angles": (
        lambda: torch.arange(POINTS).float() * 97.0,
        lambda x: 2.0 + torch.sin(x),
    ),
}


def _overflowing() -> dict[str, Tensor]:
    big = torch.full((32, 32), 3e38)
    return {
        "a sum beyond the range": big.clone(),
        "a product beyond the range": big.clone(),
        "a matrix product beyond the range": big.clone(),
        "exp beyond the range": torch.full((32, 32), 200.0),
        "zero divided by zero": torch.zeros(32, 32),
        "a NaN passed on": torch.full((32, 32), math.nan),
        "an infinity passed on": torch.full((32, 32), -math.inf),
    }


_OVERFLOWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a sum beyond the range": lambda x: x + x,
    "a product beyond the range": lambda x: x * x,
    "a matrix product beyond the range": lambda x: x @ x,
    "exp beyond the range": torch.exp,
    "zero divided by zero": lambda x: x / x,
    "a NaN passed on": lambda x: x * 2.0,
    "an infinity passed on": lambda x: x * 2.0,
}
# The same functions as a reader of the stand-alone script sees them.
_SOURCES = {
    "exp": "torch.exp(x)", "log": "torch.log2(x)", "rsqrt": "torch.rsqrt(x)", "sqrt": "torch.sqrt(x)",
    "reciprocal": "torch.reciprocal(x)", "sigmoid": "torch.sigmoid(x)", "silu": "torch.nn.functional.silu(x)",
    "cos of large angles": "2.0 + torch.cos(x)", "sin of large angles": "2.0 + torch.sin(x)",
}  # fmt: skip
_UNITS_BODY = """
def function(x):
    return $function


got, want = function(stored["x"].to(device)).cpu(), function(stored["x"].double())
error = (got.double() - want).abs() / want.abs().clamp_min(2.0**-126)
print(f"largest error {float(error.max()) * 2**24:.3g} units of roundoff, non-finite {int((~got.isfinite()).sum())}")
"""
_OVERFLOW_BODY = """
big = torch.full((32, 32), 3e38)
show("sum beyond the range", (big.to(device) + big.to(device)).isinf(), torch.ones(32, 32).bool())
show("matrix product beyond the range", (big.to(device) @ big.to(device)).isinf(), torch.ones(32, 32).bool())
zero = torch.zeros(32, 32)
show("zero divided by zero", (zero.to(device) / zero.to(device)).isnan(), torch.ones(32, 32).bool())
"""

ROWS = (1, 31, 255, 1025, 2049)
WIDTHS = (1, 17, 127, 129, 257, 1023, 1025, 4097)
_MM, _SOFTMAX, _RMS_NORM = (
    torch.ops.aten.mm.default,
    torch.ops.aten.softmax.int,
    torch.ops.aten.rms_norm.default,
)


def shapes(context: CheckContext) -> list[Evidence]:
    """Softmax and RMS norm along rows at every width, contiguous and turned, in fp32 and bf16; and a product without rows."""
    calls = [*_cases(context.seed), _call(_MM, torch.zeros(0, 16), torch.zeros(16, 8))]
    return examine(context, [(call, play) for call in calls])


def _cases(seed: int) -> Iterator[Call]:
    for place, width in enumerate(WIDTHS):
        rows = ROWS[place % len(ROWS)]
        x = integers(seed, "shapes", (rows, width), -512, 512) / 128.0
        for dtype in (torch.float32, torch.bfloat16):
            yield _call(_SOFTMAX, x.to(dtype), -1)
            yield _call(_RMS_NORM, x.to(dtype), [width], None, 1e-6)
        yield _call(_SOFTMAX, x.t().contiguous().t(), -1)


def _call(op: Any, *args: Any) -> Call:
    return Call("forward", op, args, {}, signature_of(op, args, {}))
