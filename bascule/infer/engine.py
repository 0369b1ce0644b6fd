"""The engine for whoever wants whole completions: rollouts, evaluation, checks, benchmarks. Serving drives a Batch itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from bascule.accelerators.base import Accelerator, Work
from bascule.errors import UsageError
from bascule.infer.batch import Batch
from bascule.infer.linear import Precision
from bascule.infer.row import Row
from bascule.infer.sampling import Sampling
from bascule.infer.sequence import Completion
from bascule.model.transformer import Transformer

BEAT_EVERY_STEPS = 8


class Engine:
    """Samples from one model on one chip. `on_progress(request number)` is called every few steps: proof of life.

    `native`: steps in compiled code (decoder.py) where the chip is a CPU in fp32 and there is a compiler. Raises UsageError on a simulated chip
    with faults of inference that act on operators: it would hide them.
    `warn` is told why a step could not be recorded on a chip that plays recordings (recorded.py), once; none is tried any more then.
    `precision`: of a larger model's matrices (linear.py), read anew from the weights at every call.
    `reproducible`: a completion's tokens and log-probabilities are the same bits whatever else is in the batch (runner.py).
    """

    def __init__(
        self,
        model: Transformer,
        accelerator: Accelerator,
        *,
        eos_id: int,
        pad_id: int,
        batch_size: int = 1024,
        reproducible: bool = False,
        native: bool = False,
        precision: Precision = "fp32",
        on_progress: Callable[[int], None] | None = None,
        warn: Callable[[str], object] = warnings.warn,
    ) -> None:
        if native and accelerator.needs_operators("infer"):
            raise UsageError(
                f"Compiled decoding was asked for on '{accelerator.name}', which simulates faults of inference that act on torch's operators "
                "and would not be met. Decode in operators there (train.rollout_decoder)."
            )
        self.model = model
        self.accelerator = accelerator
        self.batch_size = batch_size
        self.reproducible = reproducible
        self.native = native
        self.precision: Precision = precision
        self.requests = 0
        self._warn = warn
        self._recorder = accelerator.recorder("infer")
        self._eos_id = eos_id
        self._pad_id = pad_id
        self._on_progress = on_progress

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        indices: Sequence[int] | None = None,
        *,
        group_size: int = 1,
        first_index: int = 0,
        work_step: int | None = None,
    ) -> list[Completion]:
        """`group_size` completions of every prompt, all samples of prompt 0 first. Prompts of a group are read once.

        `indices` (one a completion) or `first_index` say which random numbers a completion owns; the result of an index
        does not depend on the other rows. Raises UsageError when a prompt and `max_tokens` exceed the model's positions,
        NonFiniteLogits when the chip returns NaN or infinity.
        """
        wanted = len(prompts) * group_size
        numbers = range(first_index, first_index + wanted) if indices is None else indices
        if len(numbers) != wanted:
            raise UsageError(f"generate got {len(numbers)} indices for {wanted} completions.")
        self.requests += 1
        rows = [
            Row(prompts[at // group_size], sampling, index=index)
            for at, index in enumerate(numbers)
        ]
        if sampling.max_tokens and rows:
            self._check(prompts, sampling)
            with self.accelerator.session(Work("infer", work_step or self.requests)):
                for start in range(0, wanted, self.batch_size):
                    self._run(rows[start : start + self.batch_size])
        return [
            Completion(row.said, row.logprobs, "stop" if row.finish == "stop" else "length")
            for row in rows
        ]

    @torch.inference_mode()
    def stream(
        self, prompt: Sequence[int], sampling: Sampling, *, index: int = 0
    ) -> Iterator[tuple[int, float]]:
        """(token, log-probability) one by one, the end token included."""
        self.requests += 1
        row = Row(prompt, sampling, index=index)
        batch = self._batch([row])
        work = Work("infer", self.requests)
        with self.accelerator.session(work):
            batch.join([[row]])
        while True:
            yield row.said[-1], row.logprobs[-1]
            if row.finish is not None:
                return
            with self.accelerator.session(work):
                batch.step()
            self._hear(batch)

    def _run(self, rows: Sequence[Row]) -> None:
        batch = self._batch(rows)
        batch.join(_groups(rows))
        steps = 0
        while batch.rows:
            batch.step()
            steps += 1
            self._hear(batch)
            if self._on_progress is not None and steps % BEAT_EVERY_STEPS == 0:
                self._on_progress(self.requests)

    def _hear(self, batch: Batch) -> None:
        if batch.trouble and self._recorder is not None:
            self._recorder = None
            self._warn(batch.trouble)

    def _batch(self, rows: Sequence[Row]) -> Batch:
        length = max(len(row.prompt) + row.sampling.max_tokens for row in rows)
        if self.reproducible:  # the longest row alone decides how many slots a call reads, so it is the same for every batch
            length = self.model.config.max_position_embeddings
        return Batch(
            self.model, slots=len(rows), length=length, eos_id=self._eos_id, pad_id=self._pad_id, reproducible=self.reproducible,
            native=self.native, precision=self.precision, record=self._recorder,
        )  # fmt: skip

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        longest = max(map(len, prompts))
        allowed = self.model.config.max_position_embeddings
        if longest + sampling.max_tokens > allowed:
            raise UsageError(
                f"A prompt of {longest} tokens and max_tokens={sampling.max_tokens} need {longest + sampling.max_tokens} positions; "
                f"the model has {allowed}. Ask for fewer tokens, or raise model.max_position_embeddings in the recipe."
            )


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Neighbours with the same prompt, so that it is read once."""
    groups: list[list[Row]] = []
    for row in rows:
        if groups and groups[-1][0].prompt == row.prompt:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
