"""The truth table of the checksums (products, attention, softmax, norms): which planted faults they must catch within one step, and when to stay silent."""

from __future__ import annotations

import pytest
import torch

from bascule.accelerators.base import Work
from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.guard.checksum import Checksums, Violation
from bascule.model import weights
from bascule.model.transformer import Transformer

CAUGHT = [
    "corrupt",
    "zeroed",
    "bit-flip",
    "sign",
    "nan?rate=0.2",
    "backward-wrong",
    "doubled-gradient",
    "transient?onset_step=1&until_step=9",
    "ascend-r2?onset_step=1&rate=0.2",
    "gain-0.2-percent",
    "truncation",
    "low-precision",
    "narrow-accumulation?amount=8",
    "buffer-1024?amount=64",
    "softmax-0.99",  # by the laws of attention
]
# Only by the laws of softmax and norms (guard/invariants): no product and no attention of these steps is wrong.
LAWS = {
    'gain-0.2-percent?ops=["_log_softmax"]&amount=1.0001': "_log_softmax",
    'zeroed?ops=["_log_softmax_backward_data"]&rate=1': "_log_softmax_backward_data",
    'gain-0.2-percent?ops=["mean"]': "rms_norm",
    'zeroed?ops=["pow"]&rate=1': "rms_norm",
    "rsqrt-off": "rms_norm",
}
SILENT = ["clean", "ascend-r2", "infer-bad", "slow", "transient", "ageing"]
# Not a matter of matrix products, or too small for a bound on rounding: replays, audits and qualification are for these.
BLIND = ["jitter", "drop-best", "bit-rot?rate=1", "saturating"]


def violations(name: str) -> list[Violation]:
    model = Transformer(ModelConfig(preset="tick"))
    weights.initialise(model, 0)
    tokens = torch.arange(16 * 32).view(16, 32) * 7 % 101
    chip, checksums = open_accelerator(f"sim:{name}@cpu", seed=3), Checksums()
    with chip.session(Work("train", step=2)), checksums:
        logits = model(tokens).logits_BTV
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        ).backward()
    return checksums.violations()


@pytest.mark.parametrize("name", CAUGHT)
def test_the_checksums_catch(name: str) -> None:
    assert violations(name)


@pytest.mark.parametrize("name", LAWS)
def test_only_the_laws_of_softmax_and_norms_catch(name: str) -> None:
    found = {violation.op for violation in violations(name)}
    assert LAWS[name] in found <= set(LAWS.values())


@pytest.mark.parametrize("name", SILENT)
def test_the_checksums_stay_silent_on(name: str) -> None:
    assert not violations(name)


@pytest.mark.parametrize("name", BLIND)
def test_the_checksums_are_blind_to_and_the_catalogue_must_not_count_on_them_for(name: str) -> None:
    assert not violations(name)


def test_the_checksums_say_that_a_fault_of_the_backward_pass_is_in_the_backward_pass() -> None:
    assert all(
        violation.direction.startswith("backward") for violation in violations("backward-wrong")
    )
