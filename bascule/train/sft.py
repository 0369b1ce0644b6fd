"""Supervised fine-tuning on worked solutions or conversations: mean cross-entropy of the completion's tokens, prompts not counted."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bascule.config.training import SftConfig
from bascule.errors import UsageError
from bascule.model.transformer import Output
from bascule.train import schedule
from bascule.train.objective import (
    Batch,
    FromText,
    choose,
    collate,
    counted_logprobs,
    packed,
    seated,
)


class Sft(FromText[SftConfig]):
    """`examples` are (prompt ids, completion ids). It keeps no cursor: a batch is a function of (seed, step) alone."""

    phase = "sft"

    def __init__(
        self,
        config: SftConfig,
        examples: Sequence[tuple[list[int], list[int]]],
        *,
        seed: int,
        pad_id: int,
        first_step: int = 1,
    ) -> None:
        if not examples:
            raise UsageError(
                "SFT was asked to train on no examples. Add a task that has solver traces, name conversations (sft.data), or drop the sft phase."
            )
        self.config = config
        self.examples = examples
        self.seed = seed
        self.pad_id = pad_id
        self.first_step = first_step
        self.steps = config.steps
        self.clip_grad_norm = config.clip_grad_norm

    def learning_rate(self, step: int) -> tuple[float, float]:
        factor = schedule.linear(
            step - self.first_step,
            self.config.steps,
            warmup=self.config.warmup_steps,
            final=self.config.final_learning_rate_ratio,
        )
        return factor, factor * self.config.learning_rate

    def next_batch(self, step: int) -> Batch:
        """Rows are drawn without regard to length: sorting the rows of eight batches before cutting them learned worse (held-out loss .154
        against .057 after 300 steps). Their padding, some 28 % on the demo's task, is not worked out (model/seats.py)."""
        size = self.config.batch_sequences
        start = (step - self.first_step) * size
        rows = [
            self.examples[i]
            for i in choose(self.seed, "sft.order", start, size, len(self.examples))
        ]
        if self.config.pack_tokens:
            return Batch(self.phase, step, packed(rows, self.config.pack_tokens, self.pad_id))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        tensors = collate(rows, self.pad_id)
        groups = [(prompt, [completion]) for prompt, completion in rows]
        return Batch(self.phase, step, tensors | seated(groups, tensors["tokens"].shape[1]))

    def loss(self, output: Output, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over all counted tokens of the batch (a long row weighs more than a short one)."""
        nats_BT = -counted_logprobs(output, tensors)
        mask_BT = tensors["mask"]
        return (nats_BT * mask_BT).sum() / mask_BT.sum(), {}
