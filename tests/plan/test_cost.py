"""The physics of a step: what a chip's size and its experts cost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bascule.plan.catalogue import chip_like
from bascule.plan.cost import Constants, gemm_peak, reached
from bascule.plan.models import shape_like
from bascule.plan.serving import ServeConstants, Serving, step_s


def test_a_larger_chip_reaches_a_smaller_share_and_a_tiny_one_never_more_than_its_peak() -> None:
    c, plain = Constants(), replace(chip_like("A100-80 SXM"), gemm_bf16_tflops=None)
    shares = [
        reached(one, "bf16", c) / gemm_peak(one, "bf16")
        for one in (replace(plain, bf16_tflops=peak) for peak in (0.1, 312.0, 2500.0))
    ]
    assert 1 > shares[0] > shares[1] > shares[2]
    assert shares[1] / shares[2] == pytest.approx((2500 / 312) ** math.exp(c.decline))


def test_routed_experts_are_read_more_slowly_than_dense_weights() -> None:
    c = ServeConstants()
    slower = replace(c, grouped=c.grouped - math.log(2))
    for name, rises in (("Llama-3.1-70B", False), ("Qwen3-235B-A22B", True)):
        shape = shape_like(name, None, None)
        assert shape is not None
        asked = Serving(
            shape=shape, chip=chip_like("H200"), chips=8, precision="fp8", phase="decode",
            prompt=1024, completion=1024, batch=4, split=False,
        )  # fmt: skip
        before, after = (step_s(asked, one, 4.0)["weights"] for one in (c, slower))
        assert (after > 1.3 * before) is rises
        assert rises or after == pytest.approx(before)
