"""Names become accelerators, or a sentence that says what to do."""

from __future__ import annotations

import pytest
import torch

from bascule.accelerators.names import CHIPS, known
from bascule.accelerators.registry import REAL, open_accelerator
from bascule.errors import AcceleratorUnavailable, RecipeError

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA chip")


def test_every_known_simulated_chip_opens_over_the_cpu() -> None:
    for name in known():
        if name.startswith("sim:"):
            assert open_accelerator(name).name == name


def test_knobs_in_the_name_override_the_faults_of_the_profile() -> None:
    chip = open_accelerator("sim:ascend-r2?onset_step=40&rate=0.5&input_range=[0,1]@cpu")
    (fault,) = chip.profile.faults
    assert (fault.onset_step, fault.rate, fault.input_range, fault.kind) == (
        40,
        0.5,
        (0.0, 1.0),
        "mixed",
    )


@no_cuda
def test_the_first_that_opens_is_taken_and_the_note_says_what_was_skipped() -> None:
    chip = open_accelerator("cuda|cpu")
    assert chip.name == "cpu" and "'cuda' cannot be opened" in chip.fallback_note
    assert open_accelerator("cpu|cuda").fallback_note is None


@no_cuda
def test_nothing_opens_and_the_sentence_says_what_to_do() -> None:
    with pytest.raises(AcceleratorUnavailable, match=r"'cuda' cannot be opened.*'cuda\|cpu'"):
        open_accelerator("cuda")


@no_cuda
def test_a_simulated_chip_over_a_missing_base_is_unavailable() -> None:
    with pytest.raises(AcceleratorUnavailable):
        open_accelerator("sim:clean@cuda:1")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpu", "not an accelerator.*Did you mean 'npu'"),
        ("cpu:1", "not an accelerator"),
        ("cuda:one", "not an accelerator"),
        ("sim", "not an accelerator"),
        ("", "not an accelerator"),
        ("sim:ascend-r3", "no fault profile 'ascend-r3'.*Did you mean 'ascend-r2'"),
        ("sim:ascend-r2?onset=3", "no knob 'onset'.*Did you mean 'onset_step'"),
        ("sim:ascend-r2?rate=2", "refuses.*less than or equal to 1"),
        ("sim:clean@sim:clean", "cannot be the base"),
        ("cpu|gpuu", "not an accelerator"),
    ],
)
def test_a_name_that_makes_no_sense_is_refused_even_where_another_would_open(
    name: str, says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        open_accelerator(name)


def test_every_chip_that_may_be_named_has_an_opener() -> None:
    assert tuple(REAL) == CHIPS
