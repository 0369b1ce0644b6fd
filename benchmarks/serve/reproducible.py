"""What equal bits cost: one decode step in reproducible mode and in the ordinary one, the same rows, one thread.

    python benchmarks/serve/reproducible.py [--preset nano] [--batches 1,8,32] [--context 64]

First every row of the reproducible batch must give the tokens and log-probabilities, bit for bit, that it gives alone. Then both
modes step in turn, and each one's least CPU time counts, so that a busy machine slows both alike.
"""

from __future__ import annotations

import argparse
import time

import torch

from bascule.config.model import ModelConfig
from bascule.draws import integers, key
from bascule.infer.batch import Batch
from bascule.infer.row import Row
from bascule.infer.sampling import Sampling
from bascule.model.transformer import Transformer
from bascule.model.weights import initialise

STEPS = 20
ROOM = 2 * STEPS + 8  # tokens kept free behind each prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--context", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    room = options.context + ROOM
    model = Transformer(ModelConfig(preset=options.preset, vocab_size=128, max_position_embeddings=room)).eval()  # fmt: skip
    initialise(model, 0)
    with torch.inference_mode():
        for count in map(int, options.batches.split(",")):
            drawn = integers(key(0, "benchmark"), 120, count * options.context) + 5
            prompts = list(enumerate(drawn.reshape(count, options.context).tolist()))
            check(model, prompts)
            plain_s, equal_s = compare(model, prompts)
            print(f"batch {count}, context {options.context}: {plain_s * 1e3:.2f} ms a step, reproducible {equal_s * 1e3:.2f} ms ({equal_s / plain_s:.2f}x)", flush=True)  # fmt: skip


def begin(model: Transformer, prompts: list[tuple[int, list[int]]], *, reproducible: bool) -> Batch:
    """A batch that has read its prompts, given with their row numbers: a row's random numbers follow its number."""
    length = len(prompts[0][1]) + ROOM
    batch = Batch(
        model,
        slots=len(prompts),
        length=length,
        eos_id=-1,
        pad_id=0,
        reproducible=reproducible,
        native=True,
    )
    asked = Sampling(max_tokens=ROOM - 2)
    batch.join([[Row(prompt, asked, index=i)] for i, prompt in prompts])
    return batch


def check(model: Transformer, prompts: list[tuple[int, list[int]]]) -> None:
    together = begin(model, prompts, reproducible=True)
    for _ in range(STEPS):
        together.step()
    for row in together.rows[:4]:
        alone = begin(model, [(row.index, list(row.prompt))], reproducible=True)
        for _ in range(STEPS):
            alone.step()
        (same,) = alone.rows
        assert same.said == row.said and same.logprobs == row.logprobs, f"row {row.index} differs"


def compare(model: Transformer, prompts: list[tuple[int, list[int]]]) -> tuple[float, float]:
    """Least CPU seconds of one step: ordinary, reproducible."""
    modes = [begin(model, prompts, reproducible=on) for on in (False, True)]
    least = [float("inf"), float("inf")]
    for _ in range(STEPS):
        for place, batch in enumerate(modes):
            start_s = time.process_time()
            batch.step()
            least[place] = min(least[place], time.process_time() - start_s)
    return least[0], least[1]


if __name__ == "__main__":
    main()
