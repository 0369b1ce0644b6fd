"""What the strongest vendor tool passes: msprobe's own comparison classes and our judge, on the same tensors, in one run.

    python -m venv /tmp/msprobe && /tmp/msprobe/bin/pip install -c constraints.txt -e . mindstudio-probe==26.2.0
    /tmp/msprobe/bin/python benchmarks/qualify/blind_spots.py              seconds; a venv of its own, the package brings many others

Each mutant is a wrong result of one operator in fp32, bf16 or fp16, held against fp64. msprobe: stage one (`Comparator`) holds device
against CPU one precision up; stage two (`api_precision_compare`) divides the device's errors by those of a right chip, which here is the
reference rounded once. The package's whole path through two cards uses these classes. Ours: `numerics.compare` and `numerics.verdict`.
The right result goes through both as well, and must pass. Without the package its columns say "absent" and the rest is printed all the same.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bascule import numerics
from bascule.draws import generator, key

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE_UP = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
Z_BAR = 20.0


def normal(what: str, *shape: int) -> Tensor:
    values = generator(key(0, f"blind/{what}")).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).to(torch.bfloat16).double()


def truncated(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """`exact` cut toward zero to `dtype`: where rounding went away from zero, the next number toward it."""
    rounded = exact.to(dtype)
    inward = torch.nextafter(rounded, torch.zeros_like(rounded))
    return torch.where(rounded.double().abs() > exact.abs(), inward, rounded)


def lone_nan(exact: Tensor, dtype: torch.dtype) -> Tensor:
    wrong = exact.to(dtype)
    wrong.view(-1)[777] = float("nan")
    return wrong


def scaled(factor: float) -> Callable[[Tensor, torch.dtype], Tensor]:
    return lambda exact, dtype: (factor * exact).to(dtype)


PRODUCT = normal("a", 256, 512) @ normal("b", 512, 256)
SOFTMAX = torch.softmax(normal("s", 64, 4096), -1)
NORM = torch.nn.functional.rms_norm(normal("n", 256, 512), (512,))
SIGMOID = torch.sigmoid(normal("g", 256, 256))
GRADIENT = 1e-5 * normal("g", 256, 256)

# mutant -> (the operator as msprobe names it, exact result, what the chip makes of it)
MUTANTS: dict[str, tuple[str, Tensor, Callable[[Tensor, torch.dtype], Tensor]]] = {
    "gradient of 1e-5 doubled": ("layer_norm", GRADIENT, scaled(2.0)),
    "gradient of 1e-5 halved": ("layer_norm", GRADIENT, scaled(0.5)),
    "softmax rows sum to 0.99": ("softmax", SOFTMAX, scaled(0.99)),
    "softmax rows sum to 0.995": ("softmax", SOFTMAX, scaled(0.995)),
    "softmax truncated": ("softmax", SOFTMAX, truncated),
    "product truncated": ("matmul", PRODUCT, truncated),
    "product 0.2 % too large": ("matmul", PRODUCT, scaled(1.002)),
    "rms_norm 0.5 % too large": ("rms_norm", NORM, scaled(1.005)),
    "one NaN in a sigmoid": ("sigmoid", SIGMOID, lone_nan),
}


def main() -> None:
    probe = Msprobe.open()
    print(f"msprobe: {probe.words if probe else absent()}\n")
    print("| mutant | type | msprobe stage 1 | stage 2 | bascule | gain | z |\n|---|---|---|---|---|---|---|")  # fmt: skip
    missed, small, wolves, passed = [], [], [], 0
    for name, (operator, exact, mutate) in MUTANTS.items():
        for dtype in DTYPES:
            found, why = ours(mutate(exact, dtype), exact)
            short = str(dtype).removeprefix("torch.")
            word = ours_in_a_word(found, why)
            if word != "caught":
                (small if word == "seen, too small to fail" else missed).append(
                    f"{name} in {short}"
                )
            if ours(exact.to(dtype), exact)[1]:
                wolves.append(f"{name} in {short}")
            stages = probe.judge(operator, mutate(exact, dtype), exact) if probe else ("absent", "absent")  # fmt: skip
            passed += "pass" in stages
            z = "non-finite" if found.nonfinite else f"{found.gain_z:+.0f}"
            print(f"| {name} | {short} | {stages[0]} | {stages[1]} | {word} | {found.gain:+.1e} | {z} |")  # fmt: skip
    cases = len(MUTANTS) * len(DTYPES)
    print(f"\nbascule: {cases - len(missed) - len(small)} of {cases} caught at |z| > {Z_BAR:g} (a NaN: as non-finite), {len(small)} seen at |z| > {Z_BAR:g} but allowed; {len(wolves)} of the right results called wrong.")  # fmt: skip
    print(
        f"msprobe: {passed} of {cases} pass at least one stage." if probe else "msprobe: not run."
    )
    if missed or wolves:
        sys.exit(f"missed: {missed}; cried wolf: {wolves}")


def ours(wrong: Tensor, exact: Tensor) -> tuple[numerics.Comparison, str | None]:
    found = numerics.compare(wrong, exact)
    floor = numerics.rounding_floor(exact, wrong.dtype)
    return found, numerics.verdict(found, floor, wrong.dtype)


def ours_in_a_word(found: numerics.Comparison, why: str | None) -> str:
    """fp32 cut off in its last bit biases by 4e-8: z shows it, but another order of summation may do as much, so it passes."""
    seen = found.nonfinite > 0 or abs(found.gain_z) > Z_BAR
    return "caught" if why and seen else "seen, too small to fail" if seen else "MISSED"


def absent() -> str:
    return "the package mindstudio-probe is NOT installed here, so this is not a side by side. See the docstring for the venv."


class Msprobe:
    """The package's own classes, driven as its two commands drive them."""

    def __init__(self, comparator: Any, columns: Any, registry: Any, make_input: Any, output: Any) -> None:  # fmt: skip
        self.words = f"mindstudio-probe {version('mindstudio-probe')}"
        self._comparator, self._columns, self._registry = comparator, columns, registry
        self._make_input, self._output = make_input, output

    @classmethod
    def open(cls) -> Msprobe | None:
        try:
            version("mindstudio-probe")
        except PackageNotFoundError:
            return None
        from msprobe.pytorch.api_accuracy_checker.compare import api_precision_compare as stage_two
        from msprobe.pytorch.api_accuracy_checker.compare.compare import Comparator
        from msprobe.pytorch.api_accuracy_checker.compare.compare_column import (
            ApiPrecisionOutputColumn,
        )
        from msprobe.pytorch.api_accuracy_checker.compare.compare_input import PrecisionCompareInput
        from msprobe.pytorch.api_accuracy_checker.compare.compare_utils import (
            ApiPrecisionCompareColumn,
        )

        folder = Path(tempfile.mkdtemp())
        comparator = Comparator(str(folder / "result.csv"), str(folder / "details.csv"), False)
        return cls(comparator, ApiPrecisionCompareColumn, stage_two.register_compare_func(), PrecisionCompareInput, ApiPrecisionOutputColumn)  # fmt: skip

    def judge(self, operator: str, wrong: Tensor, exact: Tensor) -> tuple[str, str]:
        """(stage one, stage two): pass, warning or error."""
        dtype = wrong.dtype
        bench = exact.to(ONE_UP[dtype])
        status, device, _ = self._comparator._compare_core(operator, bench, wrong, False)
        _, right, _ = self._comparator._compare_core(operator, bench, exact.to(dtype), False)
        name = str(dtype)
        asked = self._make_input(self._row(device, name), self._row(right, name), name, self._output(), api_name=operator)  # fmt: skip
        rule = self._registry.get_comparison_function(operator, name, "torch.float32")
        return str(status), str(rule(asked))

    def _row(self, column: Any, dtype: str) -> dict[str, Any]:
        names = self._columns
        return {
            names.DEVICE_DTYPE: dtype,
            names.SMALL_VALUE_ERROR_RATE: column.small_value_err_ratio,
            names.RMSE: column.rmse,
            names.MAX_REL_ERR: column.max_rel_error,
            names.MEAN_REL_ERR: column.mean_rel_error,
            names.EB: column.eb,
            names.ERROR_RATE: column.error_rate,
            names.INF_NAN_ERROR_RATIO: column.inf_nan_error_ratio,
            names.REL_ERR_RATIO: column.rel_err_ratio,
            names.ABS_ERR_RATIO: column.abs_err_ratio,
            names.MEAN_ULP_ERR: column.mean_ulp_error,
            names.ULP_ERR_PROPORTION: column.ulp_error_proportion,
            names.REL_ERR_THOUSANDTH: column.rel_err_thousandth,
        }


if __name__ == "__main__":
    main()
