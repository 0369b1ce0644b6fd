"""The questions a chip is asked. No torch here, so that the supervisor and the judge can know them.

A *check* is one question; it is asked once for each role it decides for, inside a session of that role, so that a chip that
fails in training only stays fit for inference. `entry` names the function in `checks/` that asks it; each returns Evidence.
`catches` names the fault profiles (bascule/faults/profiles.toml) that the check must see: the truth table test holds it to that.
"""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bascule.config.model import ModelConfig
from bascule.errors import UsageError, nearest
from bascule.records import Evidence, Role

BOTH: tuple[Role, ...] = ("train", "infer")
Depth = Literal["quick", "full", "wide"]
# Types a model may be examined in: our short names, torch's long ones.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Check:
    """One question. `decides` is False where the answer is a figure to read, not a reason to refuse the chip.

    `must_answer` is False where not every kind of chip can be asked: silence is written down, and only a wrong answer counts.
    `depth`: the shortest battery that asks it. `limit_s`: how long the chip may be silent in quick mode before it counts as a hang;
    the full battery allows ten times that.
    """

    name: str
    roles: tuple[Role, ...]
    question: str
    bound: str
    entry: str
    catches: tuple[str, ...] = ()
    limit_s: float = 60.0
    depth: Depth = "quick"
    decides: bool = True
    must_answer: bool = True

    @property
    def family(self) -> str:
        return self.name.partition(".")[0]

    def function(self) -> Callable[..., list[Evidence]]:
        """The function that asks. Imports torch."""
        module, _, name = self.entry.partition(":")
        found: Any = getattr(importlib.import_module(f"bascule.qualify.checks.{module}"), name)
        return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Ask:
    """One check put to one role: the unit that runs, crashes, hangs or answers."""

    check: Check
    role: Role
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"{self.check.name}[{self.role}]")


def command(
    accelerator: str, model: ModelConfig, ask: Ask, *, seed: int, dtype: str, quick: bool
) -> str:
    """The words that put one question again."""
    words = f"bascule qualify {shlex.quote(accelerator)} --preset {model.preset} --check {ask.check.name} --seed {seed}"
    return words + (f" --dtype {dtype}" if dtype != "fp32" else "") + ("" if quick else " --full")


CHECKS: tuple[Check, ...] = (
    Check(
        "exact.matmul", BOTH,
        "Are products of small-integer matrices, right in any summation order, exactly right?",
        "every element equal; tolerance zero", "exact:matmul",
        catches=("gain-0.2-percent", "input-range", "buffer-1024", "backward-wrong", "narrow-accumulation", "corrupt", "zeroed", "bit-flip", "sign", "nan", "truncation", "doubled-gradient", "intermittent", "stuck-lane", "cache-line", "one-tile", "over-read", "stale-replay", "ignores-strides", "batched-backward"),
    ),
    Check(
        "exact.reduction", BOTH,
        "Are sums, cumulative sums, maxima, sorts and gathers of small integers exactly right, odd sizes included?",
        "every element equal; tolerance zero", "exact:reduction",
        catches=("drop-best",),
    ),
    Check(
        "coverage.forward", BOTH,
        "Does the chip have every operator of this model's forward pass, with these shapes, strides and types, and run it itself?",
        "no operator missing, none silently run on the host", "coverage:forward",
        catches=("missing-op",),
    ),
    Check(
        "coverage.training", ("train",),
        "The same for the backward pass and the optimizer.",
        "no operator missing, none silently run on the host", "coverage:training",
        catches=("missing-backward-op",),
    ),
    Check(
        "numerics.forward", BOTH,
        "Is each operator of this model's forward pass as precise as its type allows, on the inputs this model gives it?",
        "signed gain, RMS and tail within the noise floor measured against fp64 (numerics.TOLERANCES); no non-finite mismatch",
        "numerics:forward",
        catches=("gain-0.2-percent", "truncation", "softmax-0.99", "low-precision", "narrow-accumulation", "corrupt", "mask-slip", "stale-copy"),
    ),
    Check(
        "numerics.half", BOTH,
        "Is each operator of this model, forward and for training backward, as precise in bf16 and fp16 as these types allow?",
        "as numerics.forward, with the bars of the half types", "numerics:half", depth="full",
    ),
    Check(
        "numerics.backward", ("train",),
        "Is the gradient of each operator as precise as its type allows?",
        "as numerics.forward, for each input's gradient by itself", "numerics:backward",
        catches=("backward-wrong", "doubled-gradient", "attention-backward", "first-layer-gradient"),
    ),
    Check(
        "numerics.optimizer", ("train",),
        "Is each operator of the optimizer as precise as its type allows?",
        "as numerics.forward", "numerics:optimizer",
        catches=("truncation",),
    ),
    Check(
        "numerics.layers", BOTH,
        "Is the output of every layer of this model within the response to a one-ulp perturbation?",
        "RMS error at most 16 times the measured response; signed gain within the type's bar", "layers:forward",
        catches=("softmax-0.99",),
    ),
    Check(
        "numerics.gradients", ("train",),
        "Is the gradient of every weight of this model within the response to a one-ulp perturbation, in size and direction?",
        "RMS error at most 16 times the measured response; signed gain within the type's bar", "layers:gradients",
        catches=("backward-wrong", "doubled-gradient"),
    ),
    Check(
        "numerics.special", BOTH,
        "Are exp, rsqrt, sin and others right at the ends of their range, and do overflow and NaN stay Inf and NaN?",
        "error at most 8 units of roundoff; Inf and NaN where IEEE 754 says so", "special:ranges",
        catches=("saturating", "exp-off", "large-angles", "rsqrt-off"),
    ),
    Check(
        "numerics.shapes", BOTH,
        "Do products, softmax and norms stay right across size boundaries, long sums, odd tails and non-contiguous layouts?",
        "as numerics.forward, at every shape", "special:shapes",
        catches=("softmax-0.99", "softmax-past-power"),
    ),
    Check(
        "determinism.training", ("train",),
        "Does the same training step, twice, give the same bits?",
        "gradients and updated weights bit-equal", "determinism:training",
        catches=("jitter",),
    ),
    Check(
        "determinism.inference", ("infer",),
        "Does the same forward pass, twice, give the same bits? (Batch invariance is reported beside it.)",
        "logits bit-equal when repeated", "determinism:inference",
        catches=("jitter",),
    ),
    Check(
        "memory.capacity", BOTH,
        "Can the memory that the chip advertises really be used, and does it hold what is written to it?",
        "every pattern reads back; the model's step fits", "memory:capacity",
        catches=("oom",),
    ),
    Check(
        "memory.leak", ("train",),
        "Does memory stay level over repeated training steps?",
        "no growth after the first steps", "memory:leak", must_answer=False,
        catches=("leak", "fragmented"),
    ),
    Check(
        "memory.fragmentation", BOTH,
        "After blocks of many sizes came and went, is the free memory still there in one piece?",
        "after churn, one block of 90 % of what was free in one piece before", "memory:fragmentation", must_answer=False,
    ),
    Check(
        "speed.step", BOTH,
        "How fast are products, memory, and this model's own step, and how steady?",
        "reported beside the reference; no bar", "speed:step", decides=False,
    ),
    Check(
        "learning.curve", ("train",),
        "Does a short real training on the chip learn what it learns on the reference: same start, same data?",
        "two one-sided tests on late-window log loss, margin 0.5 %", "learning:curve", limit_s=90.0,
        catches=("backward-wrong", "device-error", "nan"),
    ),
    Check(
        "generation.logprobs", ("infer",),
        "Does greedy generation on the chip give the reference's tokens with the reference's log-probabilities?",
        "mean gap within the response to a one-ulp perturbation; no garble", "generation:greedy",
        catches=("infer-bad",),
    ),
    Check(
        "generation.weights", ("infer",),
        "After new weights were loaded into the running engine, does it answer with them, or with the old ones?",
        "mean gap to the new weights' log-probabilities within the response to a one-ulp perturbation", "generation:weights",
    ),
    Check(
        "generation.accuracy", ("infer",),
        "Are sampled answers as often right, by an exact verifier, as the reference's with the same draws?",
        "two-sided exact test on discordant answers, alpha 0.001", "generation:accuracy",
    ),
    Check(
        "links.collectives", ("train",),
        "Do collectives of two processes return exact sums, odd sizes and tails included?",
        "every element equal; tolerance zero", "links:collectives", limit_s=120.0,
        catches=("wrong-all-reduce", "lost-tail", "double-all-reduce", "narrow-all-reduce", "hang-all-reduce", "undelivered"),
    ),
    Check(
        "resume.roundtrip", ("train",),
        "Can a training leave this chip and come back: snapshot here, restore on the reference, and back?",
        "state bit-equal after every hop; next step bit-equal here, and within 16 times the response to one ulp there", "resume:roundtrip",
        catches=("backward-wrong",),
    ),
    Check(
        "conformity.opinfo", ("train",),
        "Which of PyTorch's own operator samples does the chip get wrong, beyond this model's operators?",
        "as numerics.forward; reported, no bar", "conformity:opinfo", limit_s=60.0, depth="wide", decides=False,
    ),
    Check(
        "soak.training", ("train",),
        "Do repeated training steps with known answers stay right?",
        "every checksum equal; the report says what rate of corruption this could have seen", "soak:training",
        catches=("bit-rot", "saved-activation", "bad-page", "stale-copy", "stale-replay"),
    ),
    Check(
        "soak.inference", ("infer",),
        "Do repeated forward passes with known answers stay right?",
        "every checksum equal; the report says what rate of corruption this could have seen", "soak:inference",
        catches=("infer-bad", "bit-rot", "bad-page", "stale-copy", "stale-replay"),
    ),
)  # fmt: skip


def asks(
    *,
    quick: bool,
    wide: bool = False,
    only: Sequence[str] = (),
    roles: Sequence[Role] = BOTH,
    chips: int = 2,
) -> tuple[Ask, ...]:
    """The battery in order. `only` keeps named checks or families; an unknown name raises UsageError.

    A check that is named is asked at any depth. A pool of one chip has no links: it is asked about them only by name.
    """
    depths = {"quick"} | ({"full"} if not quick else set()) | ({"wide"} if wide else set())
    known = {check.name for check in CHECKS} | {check.family for check in CHECKS}
    for name in only:
        if name not in known:
            raise UsageError(
                f"'{name}' is not a check or a family of checks; allowed: {', '.join(sorted(known))}.{nearest(name, known)}"
            )
    wanted = [
        check
        for check in CHECKS
        if (check.depth in depths or check.name in only)
        and (not only or check.name in only or check.family in only)
        and (chips > 1 or check.family != "links" or only)
    ]
    return tuple(Ask(check, role) for check in wanted for role in check.roles if role in roles)


def required(role: Role, *, quick: bool, chips: int = 2) -> tuple[str, ...]:
    """Names of the checks that must have answered before `role` can be called fit."""
    return tuple(
        ask.check.name
        for ask in asks(quick=quick, chips=chips)
        if ask.role == role and ask.check.decides and ask.check.must_answer
    )
