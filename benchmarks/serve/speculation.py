"""What guesses of the prediction layer buy: the same model, the same questions, with and without, in one run.

    python benchmarks/serve/speculation.py [--shapes nano,dense,smollm2] [--steps 1200,40,16] [--batches 1,4,8]

The model is trained for `--steps` steps with its prediction layer on the solver traces of chain_sum, then answers held-out questions,
sampled at temperature 1. The tokens of both must be equal, or nothing is printed. Figures are output tokens per CPU-second of one thread
(a busy machine slows both) from the median step of each, the better of three runs. `kept` is the share of guesses that were right: on this text,
after so little training; what a guessing step costs does not depend on it, so it is printed too: with the share s right, the gain is
(1 + s) / cost. `smollm2` has that model's shape and its 49,152 rows of vocabulary, not its weights, which have no prediction layer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from torch.nn import functional as F

from bascule.config.model import ModelConfig
from bascule.config.training import DataConfig
from bascule.data.corpus import sft_examples, split
from bascule.data.tokenizer import Tokenizer
from bascule.infer.batch import Batch
from bascule.infer.row import Row
from bascule.infer.sampling import Sampling
from bascule.model.transformer import Transformer
from bascule.model.weights import initialise

SHAPES: dict[str, dict[str, object]] = {
    "nano": {"preset": "nano", "max_position_embeddings": 256},
    "dense": {
        "preset": "nano", "attention": "gqa", "ffn": "swiglu", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1536, "max_position_embeddings": 256,
    },
    "smollm2": {
        "preset": "nano", "attention": "gqa", "ffn": "swiglu", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536, "max_position_embeddings": 256, "vocab_size": 49152,
    },
}  # fmt: skip
ROWS, NEW = 8, 96


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shapes", default="nano,dense,smollm2")
    parser.add_argument("--steps", default="1200,40,16", help="of training, one number a shape")
    parser.add_argument("--batches", default="1,4,8")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer()
    chosen = split(DataConfig(train_problems=4096, eval_problems=64), seed=0)
    texts = [tokenizer.encode(a + b) for a, b in sft_examples(chosen.train, 0)]
    asked = [tokenizer.encode(tokenizer.prompt(one.question)) for one in chosen.heldout]
    for shape, steps in zip(options.shapes.split(","), map(int, options.steps.split(",")), strict=True):  # fmt: skip
        model = trained(shape, texts, steps, tokenizer)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        print(f"{shape}: {size:.1f} M parameters, {steps} steps", flush=True)
        for count in map(int, options.batches.split(",")):
            compare(model, [asked[at % len(asked)] for at in range(count)], tokenizer)
    return 0


def compare(model: Transformer, asked: list[list[int]], tokenizer: Tokenizer) -> None:
    step_s = {0: float("inf"), len(asked): float("inf")}
    tokens_a_step = dict.fromkeys(step_s, 0.0)
    said: list[list[list[int]]] = []
    for _ in range(3):
        for limit in step_s:
            batch = Batch(model, slots=len(asked), length=256, eos_id=-1, pad_id=tokenizer.pad_id, speculate=limit, native=True)  # fmt: skip
            rows = [Row(prompt, Sampling(max_tokens=NEW, seed=at)) for at, prompt in enumerate(asked)]  # fmt: skip
            found_s, tokens_a_step[limit] = measured(batch, rows)
            step_s[limit] = min(step_s[limit], found_s)
            said.append([row.said for row in rows])
    if any(one != said[0] for one in said):
        sys.exit("The tokens with guesses differ from those without. Nothing is reported.")
    plain, quick = (tokens_a_step[limit] / step_s[limit] for limit in step_s)
    print(
        f"  batch {len(asked):3}: {plain:6.0f} tokens/core-s without, {quick:6.0f} with, {quick / plain:.2f}x; kept {batch.kept / batch.guessed:.0%}, "
        f"a step costs {step_s[len(asked)] / step_s[0]:.2f}x", flush=True,
    )  # fmt: skip


@torch.inference_mode()
def measured(batch: Batch, rows: list[Row]) -> tuple[float, float]:
    """CPU time of the median step in which all rows run, and the tokens of the mean one."""
    batch.join([[row] for row in rows])
    seconds: list[float] = []
    tokens = 0
    while len(batch.rows) == len(rows):
        start = time.process_time()
        tokens += len(batch.step())
        seconds.append(time.process_time() - start)
    while batch.rows:  # whole answers are compared
        batch.step()
    return statistics.median(seconds), tokens / len(seconds)


def trained(shape: str, texts: list[list[int]], steps: int, tokenizer: Tokenizer) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(**{"vocab_size": tokenizer.vocab_size} | SHAPES[shape], num_nextn_predict_layers=1)  # type: ignore[arg-type]  # fmt: skip
    model = Transformer(config)
    initialise(model, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3 if shape == "nano" else 6e-4)
    for step in range(steps):
        rows = [texts[(step * ROWS + at) % len(texts)] for at in range(ROWS)]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [tokenizer.pad_id] * (width - len(row)) for row in rows])
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]).bool()
        output = model(tokens, ahead=True)
        assert output.ahead_BTV is not None
        targets = tokens.masked_fill(~real, -100)
        loss = F.cross_entropy(output.logits_BTV[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        loss = loss + 0.5 * F.cross_entropy(output.ahead_BTV[:, :-1].flatten(0, 1), targets[:, 2:].flatten())  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    raise SystemExit(main())
