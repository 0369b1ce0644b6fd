"""What goes wrong slowly is told once, as a warning; healthy training of every kind is silent."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bascule.guard import drift
from bascule.guard.sentinels import Seen, Watch


def told(values: list[float], figure: str, phase: str = "grpo") -> list[tuple[int, str]]:
    watch, found = Watch.begin(drift.standard()), []
    for step, value in enumerate(values, start=1):
        metrics = {} if figure == "loss" else {figure: value}
        one = Seen(step, phase, value if figure == "loss" else 0.0, 1.0, 0.1, 100, metrics=metrics)
        watch, cries = watch.fold(one)
        assert not any(cry.suspect for cry in cries)
        found += [(step, cry.sentinel) for cry in cries]
    return found


def noisy(level: list[float], share: float, seed: int = 0) -> list[float]:
    noise = np.random.default_rng(seed).standard_t(5, len(level))
    return [max(0.0, value + share * n) for value, n in zip(level, noise, strict=True)]


@pytest.mark.parametrize(
    ("figure", "phase", "good", "bad", "share"),
    [
        ("loss", "sft", 1.0, 1.6, 0.1),
        ("reward", "grpo", 0.8, 0.3, 0.1),
        ("entropy", "grpo", 0.3, 1.2, 0.05),
        ("mismatch_k3_kl", "grpo", 5e-4, 8e-3, 1e-4),
    ],
)
def test_a_run_that_slowly_gets_worse_is_told_once(
    figure: str, phase: str, good: float, bad: float, share: float
) -> None:
    slide = [good + (bad - good) * min(1.0, max(0.0, (i - 200) / 150)) for i in range(600)]
    found = told(noisy(slide, share), figure, phase)
    assert len(found) == 1 and 200 < found[0][0] < 420
    assert found[0][1].split()[0] in figure


def test_it_is_told_again_only_after_the_run_was_better() -> None:
    wave = [1.0] * 96 + [2.0] * 160 + [0.9] * 96 + [2.0] * 160
    assert [name for _, name in told(noisy(wave, 0.05), "loss", "sft")] == ["loss drift"] * 2


@pytest.mark.parametrize("seed", range(5))
def test_falling_noisy_flat_and_new_phases_are_silent(seed: int) -> None:
    falling = [0.4 + 4.4 * math.exp(-i / 60) for i in range(800)]
    assert told(noisy(falling, 0.15, seed), "loss", "sft") == []
    assert told(noisy([0.5] * 800, 0.25, seed), "reward") == []
    assert told(noisy([2.0 * math.exp(-i / 200) for i in range(800)], 0.02, seed), "entropy") == []
    watch = Watch.begin(drift.standard())
    for step in range(400):
        loss = 0.5 if step < 200 else 3.0
        watch, cries = watch.fold(Seen(step, "sft" if step < 200 else "pretrain", loss, 1, 0, 9))
        assert cries == []
