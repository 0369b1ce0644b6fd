"""The search for a layout: which split over tensor, pipeline, expert, context and data parallelism is fastest and fits.

Every candidate is costed by the physics (tens of microseconds each); the best dozen that fit are then costed with the
published runs' correction, and the fastest wins. Nothing that does not fit is offered unless nothing fits at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bascule.errors import RecipeError
from bascule.plan.architecture import Shape
from bascule.plan.ask import TrainAsk, possible
from bascule.plan.catalogue import Chip
from bascule.plan.cost import step_seconds
from bascule.plan.forecast import Forecast, Model
from bascule.plan.job import Job, Layout, Recompute
from bascule.plan.memory import Memory, memory_of

FINALISTS = 12
# Pipeline schedules that a stack ships beside 1F1B and interleaved; one that nobody described may have them all.
SHIPPED_SCHEDULES = {
    "megatron-bridge": (), "megatron-lm": (), "nemo": (), "fms-fsdp": (), "maxtext": (), "primus": ("zb",), "habana": (), "neuronx": (),
    "mindspeed": ("dualpipe",), "torchtitan": ("zb", "dualpipe"), "deepseek": ("dualpipe",),
}  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """The layout found or given, its forecast, and what was considered."""

    job: Job
    forecast: Forecast
    memory: Memory
    considered: int
    fitting: int
    notes: tuple[str, ...]

    @property
    def basis(self) -> str:
        if not self.considered:
            return "given"
        which = "fastest" if self.fitting else "least memory"
        return f"{which} of {self.considered:,} layouts{' that fits' if self.fitting else ''}"


def candidates(
    job: Job, schedule: str | None = None, recompute: Recompute | None = None
) -> Iterator[Job]:
    """All layouts worth costing for the job's model, chips and batch; the batch is moved by up to 5 % to divide evenly.
    `schedule`: the only one considered for pipelines (None: what the stack ships); `recompute` likewise (None: none and full)."""
    s, chip = job.shape, job.chip
    domain = min(chip.scaleup_chips or 8, 64)
    for tp in _powers(min(domain, s.heads, 16)):
        for pp in _divisors(job.chips // tp, min(64, s.layers)):
            for cp in _powers(min(16, max(1, job.sequence // 16384))):
                if job.chips % (tp * pp * cp):
                    continue
                dp = job.chips // (tp * pp * cp)
                for ep in _expert_splits(s, dp * cp * tp):
                    yield from _batches(job, tp, pp, cp, dp, ep, schedule, recompute)


def _batches(
    job: Job, tp: int, pp: int, cp: int, dp: int, ep: int, schedule: str | None, only: Recompute | None,
) -> Iterator[Job]:  # fmt: skip
    recomputes: tuple[Recompute, ...] = (only,) if only else ("none", "full")
    for micro in (1, 2, 4):
        unit = dp * micro
        batch = max(1, round(job.global_batch / unit)) * unit
        if abs(batch / job.global_batch - 1) > 0.05:
            continue
        schedules = list(_schedules(job, pp, batch // unit, schedule))
        zeros = (1,) if pp > 1 or job.shape.moe else (1, 3)
        for recompute, (name, virtual), zero in itertools.product(recomputes, schedules, zeros):
            layout = Layout(
                tp=tp, pp=pp, vpp=virtual, cp=cp, ep=ep, dp=dp, zero=zero, micro_batch=micro, recompute=recompute,
                tp_overlap=True, schedule=name,
            )  # fmt: skip
            yield replace(job, layout=layout, global_batch=batch)


def _schedules(
    job: Job, pp: int, micro_batches: int, only: str | None
) -> Iterator[tuple[str, int]]:
    """(schedule, virtual stages) that a pipeline of this depth can run; one that was asked for means a pipeline."""
    if pp == 1:
        yield from () if only else (("1f1b", 1),)
        return
    allowed = (
        (only,)
        if only
        else ("1f1b", "interleaved", *SHIPPED_SCHEDULES.get(job.software, ("zb", "dualpipe")))
    )
    if "1f1b" in allowed:
        yield "1f1b", 1
    if "zb" in allowed:
        yield "zb", 1
    if "dualpipe" in allowed and pp % 2 == 0 and micro_batches % 2 == 0 and micro_batches >= 2 * pp:
        yield "dualpipe", 1
    if "interleaved" in allowed and micro_batches % pp == 0:
        yield from (("interleaved", v) for v in (2, 4) if v <= math.ceil(job.shape.layers / pp))


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(int(math.log2(max(1, limit))) + 1)]


def _divisors(number: int, limit: int) -> list[int]:
    """Pipeline depths: powers of two and three times them, as clusters come."""
    return [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if n <= limit and number % n == 0]


def _expert_splits(s: Shape, room: int) -> list[int]:
    if not s.moe:
        return [1]
    return [
        n
        for n in _powers(min(s.experts, 256))
        if s.experts % n == 0 and room % n == 0 and n >= min(4, s.experts)
    ]


def search(
    job: Job, model: Model, schedule: str | None = None, recompute: Recompute | None = None
) -> Choice:
    """The fastest layout that fits. Raises RecipeError when no split of the chips is possible at all."""
    costed = [
        (step_seconds(one, model.constants), one) for one in candidates(job, schedule, recompute)
    ]
    if not costed:
        experts = (
            f", and a divisor of the {job.shape.experts} experts (4 or more) must divide the chips"
            if job.shape.moe
            else ""
        )
        raise RecipeError(
            f"No layout: {job.chips} chips cannot share {job.global_batch} sequences and {job.shape.name} evenly; tensor parallel "
            f"takes powers of two, the batch may move by 5 %{experts}. Take a multiple of 8 chips, or a batch that is a multiple of the chips."
        )
    costed.sort(key=lambda pair: pair[0] / pair[1].tokens_per_step)
    finalists: list[tuple[Job, Memory]] = []
    spare: tuple[Job, Memory] | None = None
    fitting = 0
    for _, one in costed:
        memory = memory_of(one)
        if memory.verdict in ("fits", "unknown"):
            fitting += 1
            finalists.append((one, memory))
        elif spare is None or memory.total < spare[1].total:
            spare = (one, memory)
        if len(finalists) >= FINALISTS:
            break
    notes = []
    if not finalists:
        assert spare is not None
        finalists = [spare]
        notes.append(
            "nothing fits with margin; shown is the layout that needs least memory"
            if spare[1].verdict == "does not fit"
            else "only a tight fit was found"
        )
    seconds = model.seconds([one for one, _ in finalists])
    best, memory = min(
        zip(finalists, seconds, strict=True), key=lambda pair: pair[1] / pair[0][0].tokens_per_step
    )[0]
    if best.global_batch != job.global_batch:
        notes.append(f"global batch {job.global_batch} became {best.global_batch} to divide evenly")
    return Choice(best, model.predict(best), memory, len(costed), fitting, tuple(notes))


def default_batch(ask: TrainAsk) -> int:
    """Sequences of a step when nobody said: about 16 M tokens for runs over a trillion tokens, 4 M below, and enough for the
    chips; options that are compared share the largest."""
    usual = round((16e6 if ask.tokens >= 1e12 else 4e6) / ask.sequence / 64) * 64
    return max(usual, min(ask.chips, 16384))


def choose(shape: Shape, ask: TrainAsk, model: Model) -> Choice:
    """The layout that was given, else the fastest that fits. Raises RecipeError for one that cannot be."""
    batch = ask.batch or default_batch(ask)
    job = empty_job(shape, ask.chip, ask.chips, ask.sequence, batch, ask.precision, ask.software)
    if ask.layout is None:
        return search(job, model, ask.schedule, ask.recompute)
    possible(ask.layout, shape)
    dp = ask.layout.dp
    given = replace(job, layout=ask.layout, global_batch=max(1, round(batch / dp)) * dp)
    return Choice(given, model.predict(given), memory_of(given), 0, 0, ())


def empty_job(
    shape: Shape, chip: Chip, chips: int, sequence: int, batch: int, precision: str, software: str
) -> Job:
    """A job whose layout is still to be found."""
    return Job(
        shape=shape, chip=chip, chips=chips, sequence=sequence, global_batch=batch, precision=precision, layout=Layout(dp=chips),
        software=software, balanced=False,
    )  # fmt: skip
