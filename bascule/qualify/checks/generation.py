"""Does generation on the chip say what the reference says, token by token, with the same probabilities?

The engine decodes greedily on the chip, cache and all. The reference then reads the same tokens in one fp64 pass without a cache:
its log-probability of each token is the truth. The model is first trained a little on the reference (`Workload.trained`). The mismatch
figures are those that reinforcement learning pays for (inference.md 5.1). `weights`: the same question once more after the engine's
weights were replaced under it. `accuracy`: sampled answers, scored by an exact verifier, against the reference's with the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bascule import numerics
from bascule.accelerators.base import Accelerator
from bascule.infer.engine import Engine
from bascule.infer.sampling import Sampling
from bascule.infer.sequence import Completion
from bascule.model.transformer import Transformer
from bascule.qualify import pinpoint
from bascule.qualify.checks.layers import nudged
from bascule.qualify.context import CheckContext, Measured
from bascule.records import Evidence

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 12, 24
REQUESTS = 3
RESPONSE_MARGIN = (
    2.0  # times the type's own margin: two right chips may each lie one response off, as for layers
)
ANSWERS_EACH, ANSWER_TOKENS, ANSWER_TEMPERATURE = 16, 2, 0.7
ACCURACY_ALPHA = 1e-3  # two-sided; a right chip differs from the reference in next to no sample, so its false alarms are rarer
REPEATED_RUN = 12  # the same token so often in a row, where the reference would not, is garble


@dataclass(frozen=True)
class _Gap:
    """Chip minus reference, over all generated tokens (log-probabilities, nats). `regret`: the most that the reference holds its own
    best token above a chosen one."""

    mean_abs: float
    max_abs: float
    k1: float
    k3: float
    chi2: float
    regret: float
    disagreements: int
    tokens: int


@dataclass(frozen=True)
class _Bounds:
    mean: float
    largest: float

    @property
    def regret(self) -> float:
        """Two log-probabilities, each off by as much as is allowed."""
        return max(1e-3, 2.0 * self.largest)


def greedy(context: CheckContext) -> list[Evidence]:
    trained, prompts = context.workload.trained, _prompts(context)
    twin = _twin(context, trained)
    engine = _engine(context, trained)
    worst: _Gap | None = None
    worst_request = 1
    for request in range(1, REQUESTS + 1):
        with context.chip(step=request):
            said = engine.generate(
                prompts, Sampling(temperature=0.0, max_tokens=NEW_TOKENS), work_step=request
            )
        gap = _gap(twin, prompts, said)
        if worst is None or gap.max_abs > worst.max_abs or math.isnan(gap.max_abs):
            worst, worst_request = gap, request
    assert worst is not None
    run = _longest_run(max((one.tokens for one in said), key=_longest_run))
    bounds = _bounds(context, trained, twin, prompts)
    wrong, words, measured = _read(worst, bounds, run)
    if not wrong:
        return [context.passed(words, measured)]
    carried, script = _carried(context, engine.model, prompts, worst_request)
    return [context.failed(words + carried, measured, script=script)]


def _carried(
    context: CheckContext, model: Transformer, prompts: list[list[int]], request: int
) -> tuple[str, Path | None]:
    """The operator behind it, looked for in a prefill and a few decoding steps under the request's number."""
    tokens_BT = context.accelerator.to_device(torch.tensor(prompts))

    @torch.no_grad()
    def run() -> object:
        return context.workload.prefill_and_decode(model, tokens_BT, steps=3)

    return pinpoint.hand_over(context, pinpoint.wrong_call(context, run, request))


def weights(context: CheckContext) -> list[Evidence]:
    """Generate, replace the weights as a rollout engine does, generate again: are the new answers those of the new weights?"""
    work, prompts = context.workload, _prompts(context)
    old, new = work.trained, work.new_model(seed=context.seed + 1)
    engine = _engine(context, old)
    state = context.accelerator.to_device(new.state_dict())
    greedily = Sampling(temperature=0.0, max_tokens=NEW_TOKENS)
    with context.chip():
        engine.generate(prompts, greedily, work_step=1)
        engine.model.load_state_dict(state)
        said = engine.generate(prompts, greedily, work_step=1)
    gap = _gap(_twin(context, new), prompts, said)
    before = _gap(_twin(context, old), prompts, said)
    bounds = _bounds(context, new, _twin(context, new), prompts)
    measured: Measured = {
        "mean_abs_gap": gap.mean_abs, "allowed_mean": bounds.mean, "mean_abs_gap_to_old_weights": before.mean_abs,
    }  # fmt: skip
    words = f"after new weights were loaded, log-probabilities differ from theirs by {gap.mean_abs:.1e} on average (allowed {bounds.mean:.1e}; from the old weights' by {before.mean_abs:.1e})"
    if gap.mean_abs <= bounds.mean:
        return [context.passed(words, measured)]
    stale = before.mean_abs < gap.mean_abs
    return [context.failed(f"{'stale weights: ' if stale else ''}{words}", measured)]


def accuracy(context: CheckContext) -> list[Evidence]:
    """Sampled answers, right or wrong by the chain's own rule, here and on the reference with the same draws: an exact McNemar test."""
    work = context.workload
    prompts = [prompt for prompt in _prompts(context) for _ in range(ANSWERS_EACH)]
    sampling = Sampling(temperature=ANSWER_TEMPERATURE, max_tokens=ANSWER_TOKENS, seed=context.seed)
    engine = _engine(context, work.trained)
    with context.chip():
        said = engine.generate(prompts, sampling, work_step=1)
    reference = Engine(work.trained, context.referee, eos_id=-1, pad_id=0)
    expected = reference.generate(prompts, sampling, work_step=1)
    here, there = (_scores(context, prompts, answers) for answers in (said, expected))
    better, worse = int((here & ~there).sum()), int((~here & there).sum())
    p = two_sided_sign_test(better, worse)
    needed = math.ceil(1 - math.log2(ACCURACY_ALPHA))
    measured: Measured = {
        "accuracy": float(here.mean()), "reference_accuracy": float(there.mean()), "answers": len(prompts),
        "only_here_right": better, "only_there_right": worse, "p_two_sided": p, "difference_that_shows": needed / len(prompts),
    }  # fmt: skip
    words = (
        f"{here.mean():.1%} of {len(prompts)} sampled answers are right, the reference's {there.mean():.1%} with the same draws "
        f"(two-sided p {p:.2g}; a loss of {needed / len(prompts):.0%} would have shown)"
    )
    return [
        context.failed(words, measured) if p < ACCURACY_ALPHA else context.passed(words, measured)
    ]


def two_sided_sign_test(better: int, worse: int) -> float:
    """Exact p-value of `better` and `worse` discordant pairs when both are equally likely (McNemar)."""
    pairs = better + worse
    tail = sum(math.comb(pairs, count) for count in range(min(better, worse) + 1))
    return min(1.0, 2.0 * tail / 2.0**pairs)


def _scores(
    context: CheckContext, prompts: list[list[int]], answers: list[Completion]
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    pairs = zip(prompts, answers, strict=True)
    return np.array([context.workload.follows([asked[-1], *said.tokens]) for asked, said in pairs])


def _prompts(context: CheckContext) -> list[list[int]]:
    rows: list[list[int]] = context.workload.batch(10_001)["tokens"].tolist()
    return [row[:PROMPT_TOKENS] for row in rows][:PROMPTS]


def _engine(context: CheckContext, model: Transformer) -> Engine:
    here = context.accelerator.move(_copy(context, model))
    return Engine(here, context.accelerator, eos_id=-1, pad_id=0)


def _copy(context: CheckContext, model: Transformer) -> Transformer:
    copied = context.workload.new_model()
    copied.load_state_dict(model.state_dict())
    return copied


def _twin(context: CheckContext, model: Transformer) -> Transformer:
    twin = context.workload.new_twin()
    twin.load_state_dict(model.state_dict())
    return twin


def _bounds(
    context: CheckContext, model: Transformer, twin: Transformer, prompts: list[list[int]]
) -> _Bounds:
    """From the reference's own gap: its engine with these weights, and with all of them moved by one ulp, against the fp64 twin."""
    moved = nudged(_copy(context, model), context.seed)
    gaps = [_gap(twin, prompts, _decode(one, context.referee, prompts)) for one in (model, moved)]
    allowed = numerics.tolerance(context.workload.dtype)
    margin = RESPONSE_MARGIN * allowed.margin
    return _Bounds(
        mean=margin * max(allowed.unit, *(gap.mean_abs for gap in gaps)),
        largest=margin * max(allowed.unit, *(gap.max_abs for gap in gaps)),
    )


def _decode(
    model: Transformer, accelerator: Accelerator, prompts: list[list[int]]
) -> list[Completion]:
    engine = Engine(model, accelerator, eos_id=-1, pad_id=0)
    return engine.generate(prompts, Sampling(temperature=0.0, max_tokens=NEW_TOKENS), work_step=1)


def _gap(twin: Transformer, prompts: list[list[int]], said: list[Completion]) -> _Gap:
    """The chip's words, read by the reference."""
    rows = [prompt + list(one.tokens) for prompt, one in zip(prompts, said, strict=True)]
    with torch.no_grad():
        logits_BTV = twin(torch.tensor(rows)).logits_BTV.double()
    logprobs_BTV = logits_BTV.log_softmax(-1)[:, PROMPT_TOKENS - 1 : -1]
    tokens_BT = torch.tensor([list(one.tokens) for one in said])
    truth = logprobs_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1)
    chip = torch.tensor([list(one.logprobs) for one in said], dtype=torch.float64)
    difference = chip - truth
    best: Tensor = logprobs_BTV.max(-1).values
    ratio = torch.exp(-difference)
    return _Gap(
        mean_abs=float(difference.abs().mean()),
        max_abs=float(difference.abs().max()),
        k1=float(difference.mean()),
        k3=float((ratio - 1.0 + difference).mean()),
        chi2=float((ratio - 1.0).square().mean()),
        regret=float((best - truth).max()),
        disagreements=int((best > truth).sum()),
        tokens=difference.numel(),
    )


def _read(gap: _Gap, allowed: _Bounds, run: int) -> tuple[bool, str, Measured]:
    """Is it wrong, in words, in figures. `run`: the longest repetition of one token."""
    measured: Measured = {
        "mean_abs_gap": gap.mean_abs, "max_abs_gap": gap.max_abs, "k1_kl": gap.k1, "k3_kl": gap.k3, "chi2": gap.chi2,
        "disagreements": gap.disagreements, "regret": gap.regret, "tokens": gap.tokens, "allowed_mean": allowed.mean,
        "allowed_max": allowed.largest, "longest_repeated_run": run,
    }  # fmt: skip
    words = f"log-probabilities differ by {gap.mean_abs:.1e} on average and {gap.max_abs:.1e} at most over {gap.tokens} tokens (allowed {allowed.mean:.1e} and {allowed.largest:.1e})"
    if not gap.mean_abs <= allowed.mean or not gap.max_abs <= allowed.largest:
        return True, words, measured
    if gap.regret > allowed.regret:
        words = f"{gap.disagreements} of {gap.tokens} greedy tokens are not the reference's choice (by up to {gap.regret:.1e}); {words}"
        return True, words, measured
    if run >= REPEATED_RUN:
        measured["note"] = "the reference repeats itself as well"
    return False, f"greedy tokens agree; {words}", measured


def _longest_run(tokens: Sequence[int]) -> int:
    if not tokens:
        return 0
    changes = np.flatnonzero(np.diff(np.array(tokens))) + 1
    return int(np.diff(np.concatenate([[0], changes, [len(tokens)]])).max())
