"""What the strongest published vendor tool passes (guard.md 6.1), ours must see: each mutant at |z| > 20, and the right result never.

The tool's own short cut is restated in one line (largest absolute error under 0.001 passes), so the blind spot can be seen here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bascule import numerics
from bascule.draws import generator, key

BF16 = torch.bfloat16


def normal(what: str, *shape: int) -> Tensor:
    values = generator(key(0, f"test.blind/{what}")).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).to(BF16).double()


def truncated(exact: Tensor) -> Tensor:
    """bf16 by cutting the lower half of fp32 off."""
    return (exact.float().view(torch.int32) & -65536).view(torch.float32).to(BF16)


def with_a_nan(exact: Tensor) -> Tensor:
    out = exact.to(BF16)
    out.view(-1)[777] = float("nan")
    return out


PRODUCT = normal("a", 256, 512) @ normal("b", 512, 256)
SOFTMAX = torch.softmax(normal("s", 64, 4096), -1)
NORM = torch.nn.functional.rms_norm(normal("n", 256, 512), (512,))
SMALL = 1e-5 * normal("g", 256, 256)

MUTANTS: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
    "product cut off instead of rounded": (PRODUCT, truncated),
    "product 0.2 % too large": (PRODUCT, lambda exact: (1.002 * exact).to(BF16)),
    "softmax rows that sum to 0.995": (SOFTMAX, lambda exact: (0.995 * exact).to(BF16)),
    "softmax rows that sum to 0.99": (SOFTMAX, lambda exact: (0.99 * exact).to(BF16)),
    "softmax cut off": (SOFTMAX, truncated),
    "norm 0.5 % too large": (NORM, lambda exact: (1.005 * exact).to(BF16)),
    "norm 0.3 % too large": (NORM, lambda exact: (1.003 * exact).to(BF16)),
    "gradient of 1e-5 doubled": (SMALL, lambda exact: (2.0 * exact).to(BF16)),
    "gradient of 1e-5 doubled, fp32": (SMALL, lambda exact: (2.0 * exact).float()),
    "gradient of 1e-5 halved, fp32": (SMALL, lambda exact: (0.5 * exact).float()),
    "gradient of 1e-5 with its sign turned": (SMALL, lambda exact: (-exact).to(BF16)),
    "gradient of 1e-5 zeroed": (SMALL, lambda exact: torch.zeros_like(exact, dtype=BF16)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_seen_beyond_twenty_standard_errors(name: str) -> None:
    exact, mutate = MUTANTS[name]
    wrong = mutate(exact)
    found = numerics.compare(wrong, exact)
    floor = numerics.rounding_floor(exact, wrong.dtype)
    assert numerics.verdict(found, floor, wrong.dtype) is not None
    assert abs(found.gain_z) > 20
    right = exact.to(wrong.dtype)
    assert numerics.verdict(numerics.compare(right, exact), floor, wrong.dtype) is None, (
        "cries wolf"
    )


def test_a_lone_nan_is_seen() -> None:
    found = numerics.compare(with_a_nan(NORM), NORM)
    reason = numerics.verdict(found, numerics.rounding_floor(NORM, BF16), BF16)
    assert reason is not None and "1 non-finite" in reason


def test_a_product_summed_in_bf16_chunks_has_no_gain_and_is_seen_by_its_noise() -> None:
    """Signed gain alone is not enough: eight partial sums, each rounded to bf16."""
    a, b = normal("a", 256, 512), normal("b", 512, 256)
    total = torch.zeros(256, 256, dtype=BF16)
    for part in range(0, 512, 64):
        total = (total.float() + (a[:, part : part + 64] @ b[part : part + 64]).float()).to(BF16)
    found = numerics.compare(total, PRODUCT)
    floor = numerics.rounding_floor(PRODUCT, BF16)
    assert abs(found.gain_z) < 20
    reason = numerics.verdict(found, floor, BF16)
    assert reason is not None


def test_the_short_cut_that_others_take_passes_the_small_gradients() -> None:
    small = [
        name
        for name, (exact, mutate) in MUTANTS.items()
        if float((mutate(exact).double() - exact).abs().max()) < 1e-3
    ]
    assert {
        "gradient of 1e-5 doubled",
        "gradient of 1e-5 zeroed",
        "softmax rows that sum to 0.99",
    } <= set(small)
