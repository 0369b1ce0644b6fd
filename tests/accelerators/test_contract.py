"""One behaviour suite, handed every accelerator that opens here: the CPU, simulated chips over it, real ones with `-m gpu`, and an
`npu` where there is one (tests/standin runs this very file under its stand-in)."""

from __future__ import annotations

import math

import pytest
import torch

from bascule.accelerators.base import Accelerator, Work
from bascule.accelerators.registry import open_accelerator

NAMES = [
    "cpu",
    "sim:clean",
    "sim:ascend-r2",
    "sim:ascend-r2?onset_step=1@cpu",
    "sim:slow",
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("sim:clean@cuda", marks=pytest.mark.gpu),
    pytest.param("sim:ascend-r2?onset_step=1@cuda", marks=pytest.mark.gpu),
]
if (
    torch._C._get_privateuse1_backend_name() == "npu"
):  # a real Ascend chip, or the stand-in of tests/standin
    NAMES += ["npu", "sim:clean@npu", "sim:ascend-r2?onset_step=1@npu"]
TRAIN = Work("train", step=3)

pytestmark = pytest.mark.each_accelerator


@pytest.fixture(params=NAMES)
def chip(request: pytest.FixtureRequest) -> Accelerator:
    accelerator = open_accelerator(request.param, seed=1)
    accelerator.prepare(1)
    return accelerator


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(32, 48)
        self.head = torch.nn.Linear(48, 32, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("bias", torch.arange(32.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embed(tokens))) + self.bias


def gradients(chip: Accelerator, work: Work = TRAIN) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = chip.move(Tied())
    tokens = chip.to_device(torch.arange(128).view(4, 32) % 32)
    with chip.session(work):
        model(tokens).square().mean().backward()
    chip.synchronize()
    return [parameter.grad.cpu() for parameter in model.parameters()]


def test_it_says_what_it_is(chip: Accelerator) -> None:
    info = chip.info()
    assert info.name and info.driver
    assert info.simulated == chip.name.startswith("sim:") == (info.base is not None)
    assert chip.collective_backend in ("gloo", "nccl", "hccl")


def test_a_product_is_right_before_any_fault_sets_in(chip: Accelerator) -> None:
    ones = chip.to_device(torch.ones(16, 32))
    with chip.session(Work("infer", step=1)):
        product = ones @ ones.T
    assert torch.equal(product.cpu(), torch.full((16, 16), 32.0))


def test_the_same_work_gives_the_same_bits_each_time(chip: Accelerator) -> None:
    assert all(torch.equal(a, b) for a, b in zip(gradients(chip), gradients(chip), strict=True))


def test_tied_weights_stay_tied_and_in_place_after_a_move(chip: Accelerator) -> None:
    model = chip.move(Tied())
    assert model.head.weight is model.embed.weight
    assert model.head.weight.device.type == chip.device.type
    assert len(list(model.parameters())) == 1


def test_tensors_and_dicts_of_tensors_arrive_on_the_device(chip: Accelerator) -> None:
    values = chip.to_device({"a": torch.ones(2), "b": torch.zeros(3)})
    assert {tensor.device.type for tensor in values.values()} == {chip.device.type}
    assert chip.to_device(torch.ones(2)).device.type == chip.device.type


def test_timing_returns_the_result_and_a_positive_time(chip: Accelerator) -> None:
    result, seconds = chip.timed(lambda: 7)
    assert result == 7 and 0 < seconds < 5


def test_memory_figures_are_ordered_where_they_are_known(chip: Accelerator) -> None:
    chip.reset_peak_memory()
    kept = chip.to_device(torch.ones(1 << 20))
    use = chip.memory()
    if use.allocated_bytes is not None:
        assert kept.nbytes <= use.allocated_bytes <= use.total_bytes
        assert use.peak_bytes >= kept.nbytes
    chip.empty_cache()


def test_telemetry_never_fails_and_holds_finite_numbers(chip: Accelerator) -> None:
    assert all(math.isfinite(value) for value in chip.telemetry().values())


def test_prepare_asks_for_deterministic_kernels_and_full_fp32(chip: Accelerator) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_num_threads() == 1


def test_an_exception_inside_a_session_comes_out_and_leaves_the_chip_usable(
    chip: Accelerator,
) -> None:
    with pytest.raises(KeyError, match="mine"), chip.session(TRAIN):
        raise KeyError("mine")
    test_a_product_is_right_before_any_fault_sets_in(chip)


BASES = [name for name in NAMES if name in ("cpu", "npu")]


@pytest.mark.parametrize("base", [*BASES, pytest.param("cuda", marks=pytest.mark.gpu)])
def test_faults_of_the_backward_pass_reach_the_gradients_on_this_base(base: str) -> None:
    """On devices this asks whether dispatch modes follow autograd into its device thread."""
    chip = open_accelerator(f"sim:backward-wrong?stride=2@{base}")
    right = gradients(open_accelerator(base))
    assert not torch.equal(gradients(chip)[0], right[0])
