"""Does generation on the chip say what the reference says, token by token, with the same probabilities?

The engine decodes greedily on the chip, cache and all. The reference then reads the same tokens in one fp64 pass without a cache:
its log-probability of each token is the truth. The model is first trained a little on the reference, so that its choices are choices
and not ties. The mismatch figures are those that reinforcement learning pays for (inference.md 5.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bascule import draws, numerics
from bascule.accelerators.base import Accelerator
from bascule.infer.engine import Engine
from bascule.infer.sampling import Sampling
from bascule.infer.sequence import Completion
from bascule.model.transformer import Transformer
from bascule.qualify import workload
from bascule.qualify.context import CheckContext, Measured
from bascule.records import Evidence

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 12, 24
TRAINED_STEPS = 24
REQUESTS = 3
MARGIN = 16.0  # times the response to one ulp, as for layers
REPEATED_RUN = 12  # the same token so often in a row, where the reference would not, is garble


@dataclass(frozen=True)
class _Gap:
    """Chip minus reference, over all generated tokens (log-probabilities, nats)."""

    mean_abs: float
    max_abs: float
    k1: float
    k3: float
    chi2: float
    disagreements: int
    tokens: int


def greedy(context: CheckContext) -> list[Evidence]:
    work = context.workload
    trained = _trained(context)
    twin = work.new_model(dtype=torch.float64)
    twin.load_state_dict(trained.state_dict())
    prompts = [row[:PROMPT_TOKENS] for row in work.batch(10_001)["tokens"].tolist()][:PROMPTS]
    engine = Engine(
        context.accelerator.move(_copy(context, trained)), context.accelerator, eos_id=-1, pad_id=0
    )
    worst: _Gap | None = None
    for request in range(1, REQUESTS + 1):
        with context.chip(step=request):
            said = engine.generate(
                prompts, Sampling(temperature=0.0, max_tokens=NEW_TOKENS), work_step=request
            )
        gap = _gap(twin, prompts, said)
        if worst is None or gap.max_abs > worst.max_abs or math.isnan(gap.max_abs):
            worst = gap
    assert worst is not None
    floor = _response(context, trained, twin, prompts)
    return [_evidence(context, worst, floor, said)]


def _trained(context: CheckContext) -> Transformer:
    work = context.workload
    model = work.new_model()
    optimizer = work.optimizer(model)
    for step in range(1, TRAINED_STEPS + 1):
        workload.train_step(model, optimizer, work.batch(step))
    return model


def _copy(context: CheckContext, model: Transformer) -> Transformer:
    copied = context.workload.new_model()
    copied.load_state_dict(model.state_dict())
    return copied


def _response(
    context: CheckContext, trained: Transformer, twin: Transformer, prompts: list[list[int]]
) -> _Gap:
    """The reference's own gap: its fp32 engine with all weights moved by one ulp, against the fp64 twin."""
    model = _copy(context, trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(
                numerics.perturb_one_ulp(
                    parameter, draws.key(context.seed, f"qualify.generation/{name}")
                )
            )
    return _gap(twin, prompts, _decode(model, context.referee, prompts))


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
    # A token that the reference holds within a hair of the best is a tie, not a disagreement.
    disagreements = int((best - truth > 1e-3).sum())
    ratio = torch.exp(-difference)
    return _Gap(
        mean_abs=float(difference.abs().mean()),
        max_abs=float(difference.abs().max()),
        k1=float(difference.mean()),
        k3=float((ratio - 1.0 + difference).mean()),
        chi2=float((ratio - 1.0).square().mean()),
        disagreements=disagreements,
        tokens=difference.numel(),
    )


def _evidence(context: CheckContext, gap: _Gap, floor: _Gap, said: list[Completion]) -> Evidence:
    bound = MARGIN * max(floor.mean_abs, numerics.tolerance(torch.float32).unit)
    bound_max = MARGIN * max(floor.max_abs, numerics.tolerance(torch.float32).unit)
    run = max(_longest_run(one.tokens) for one in said)
    measured: Measured = {
        "mean_abs_gap": gap.mean_abs, "max_abs_gap": gap.max_abs, "k1_kl": gap.k1, "k3_kl": gap.k3, "chi2": gap.chi2,
        "disagreements": gap.disagreements, "tokens": gap.tokens, "allowed_mean": bound, "allowed_max": bound_max,
        "longest_repeated_run": run,
    }  # fmt: skip
    words = f"log-probabilities differ by {gap.mean_abs:.1e} on average and {gap.max_abs:.1e} at most over {gap.tokens} tokens (allowed {bound:.1e} and {bound_max:.1e})"
    if not gap.mean_abs <= bound or not gap.max_abs <= bound_max:
        return context.failed(words, measured)
    if gap.disagreements:
        return context.failed(
            f"{gap.disagreements} of {gap.tokens} greedy tokens are not the reference's choice; {words}",
            measured,
        )
    if run >= REPEATED_RUN:
        measured["note"] = "the reference repeats itself as well"
    return context.passed(f"greedy tokens agree; {words}", measured)


def _longest_run(tokens: list[int]) -> int:
    if not tokens:
        return 0
    changes = np.flatnonzero(np.diff(np.array(tokens))) + 1
    return int(np.diff(np.concatenate([[0], changes, [len(tokens)]])).max())
