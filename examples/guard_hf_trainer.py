"""Guard a Hugging Face Trainer: a callback checks every matrix product of each step and stops before a wrong one commits.

pip install transformers accelerate && python examples/guard_hf_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from bascule.accelerators.base import Work
from bascule.accelerators.registry import open_accelerator
from bascule.guard.checksum import Checksums, parameter_names


class GuardCallback(TrainerCallback):
    """`chip.session` lets a simulated chip act up; on a real one it costs nothing. `every`: check each n-th step."""

    def __init__(self, accelerator: str = "cpu", every: int = 1) -> None:
        self.chip, self.every = open_accelerator(accelerator, seed=1), every
        self.entered: list[Any] = []

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.products = Checksums(names=parameter_names(model))
        self.entered = [self.chip.session(Work("train", state.global_step + 1))]
        if (state.global_step + 1) % self.every == 0:
            self.entered.append(self.products)
        for context in self.entered:
            context.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        while self.entered:
            self.entered.pop().__exit__(None, None, None)
        if wrong := self.products.violations():
            raise RuntimeError(f"step {state.global_step + 1} was not committed: {wrong[0]}")


def main() -> None:
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)  # fmt: skip
    tokens = torch.randint(0, 64, (256, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    for accelerator in ("cpu", "sim:zeroed?onset_step=12@cpu"):
        arguments = TrainingArguments(tempfile.mkdtemp(), max_steps=20, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True)  # fmt: skip
        trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=data, callbacks=[GuardCallback(accelerator)])  # type: ignore[arg-type]  # fmt: skip
        try:
            trainer.train()
            print(f"{accelerator}: 20 steps, no alarm")
        except RuntimeError as alarm:
            print(f"{accelerator}: {alarm}")


if __name__ == "__main__":
    main()
