"""Where the time of our engine goes: the share of this machine's memory bandwidth when decoding, and of its peak FLOPs when reading prompts.

    python benchmarks/serve/roofline.py [--size smollm2] [--batches 1,8,32] [--contexts 64,512] [--precisions fp32,int8]

The machine is measured beside the engine, in the same process and turn by turn, because others may be using it: what one thread reads of
a block far larger than its caches (as torch's sum or product with a vector, or as our product of one row, whichever is fastest: in pages of 2 MiB), and what it
multiplies in torch's own matrix product. A decoding step must read every weight once
and every cached token of its rows; reading T tokens takes two operations a weight and token, and attention's. Seconds are CPU
seconds of one thread; each figure is the best of `--rounds`.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bascule.config.model import ModelConfig
from bascule.infer import large_pages
from bascule.infer.batch import Batch
from bascule.infer.compiled import Panels, compiled
from bascule.infer.row import Row
from bascule.infer.sampling import Sampling
from bascule.infer.score import divergence
from bascule.model.existing import load
from bascule.model.transformer import Transformer
from bascule.model.weights import initialise

sys.path.insert(0, str(Path(__file__).parent))
from versus_llama_cpp import prompts, smollm2

STEPS, TOLD = 8, 100
STREAM_NUMBERS = 1 << 26  # 256 MiB of fp32
VECTOR = 1024
SQUARE = 1536
BYTES = {"fp32": 4, "int8": 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", default="smollm2", help="or a preset, with random weights")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--contexts", default="64,512")
    parser.add_argument("--precisions", default="fp32,int8")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = opened(options.size)
    stream = large_pages.take((STREAM_NUMBERS // VECTOR, VECTOR), torch.float32).fill_(1)
    reads = [stream.sum, lambda: stream @ stream[0]]
    if compiled() is not None:
        panels = Panels.of(stream)
        reads.append(lambda: panels.product(stream[:1]))
    square = torch.randn(SQUARE, SQUARE)
    with torch.inference_mode():
        for precision in options.precisions.split(","):
            for context in map(int, options.contexts.split(",")):
                for rows in map(int, options.batches.split(",")):
                    report(model, precision, context, rows, options.rounds, reads, square)
            print(f"{precision}: {distance(model, precision):.1e} nats a token from fp32, on {TOLD} tokens that it says itself")  # fmt: skip
    print(f"largest memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")  # fmt: skip
    return 0


def distance(model: Transformer, precision: str) -> float:
    batch = Batch(model, slots=1, length=TOLD + 1, eos_id=-1, pad_id=0, precision=precision, native=True)  # type: ignore[arg-type]  # fmt: skip
    row = Row([1], Sampling(max_tokens=TOLD))
    batch.join([[row]])
    while batch.rows:
        batch.step()
    return divergence(batch.model, batch.reader, row.text)


def report(
    model: Transformer, precision: str, context: int, rows: int, rounds: int, reads: Sequence[Callable[[], object]], square: torch.Tensor
) -> None:  # fmt: skip
    batch = Batch(model, slots=rows, length=context + STEPS + 1, eos_id=-1, pad_id=0, precision=precision, native=True)  # type: ignore[arg-type]  # fmt: skip
    reading = stepping = read_s = multiplied_s = float("inf")
    for _ in range(rounds):
        read_s = min(read_s, *map(seconds, reads))
        multiplied_s = min(multiplied_s, seconds(lambda: square @ square))
        asked = [Row(prompt, Sampling(temperature=0, max_tokens=STEPS + 1)) for prompt in prompts(rows, context)]  # fmt: skip
        reading = min(reading, seconds(lambda asked=asked: batch.join([[row] for row in asked])))  # type: ignore[misc]
        while batch.rows:
            stepping = min(stepping, seconds(batch.step))
    bandwidth, peak = 4 * STREAM_NUMBERS / read_s, 2 * SQUARE**3 / multiplied_s
    step_bytes = weights(model, precision) + rows * context * cached(model)
    prefill_flops = rows * (2 * context * multiplied(model) + attended(model, context))
    print(
        f"{precision} context {context} batch {rows}: step {stepping * 1e3:.2f} ms, {step_bytes / stepping / 1e9:.1f} of {bandwidth / 1e9:.1f} GB/s "
        f"({step_bytes / stepping / bandwidth:.0%}), {2 * rows * weights(model, 'fp32') / 4 / stepping / 1e9:.0f} GFLOP/s; prompts {reading:.2f} s, "
        f"{prefill_flops / reading / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s ({prefill_flops / reading / peak:.0%})", flush=True,
    )  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def opened(size: str) -> Transformer:
    if size == "smollm2":
        return load(smollm2(), positions=1024)[0].eval()
    model = Transformer(ModelConfig(preset=size, vocab_size=128, max_position_embeddings=1024))  # type: ignore[arg-type]  # fmt: skip
    initialise(model, seed=0)
    return model.eval()


def multiplied(model: Transformer) -> int:
    """Weights that every token of a prompt is multiplied with: the head only at its end."""
    return sum(p.numel() for p in model.model.layers.parameters())


def weights(model: Transformer, precision: str) -> int:
    """Bytes that one step reads of them, the head included."""
    return BYTES[precision] * (multiplied(model) + model.lm_head.weight.numel())


def cached(model: Transformer) -> int:
    """Bytes of the cache for one token."""
    return int(model.new_cache(1, 1).memory_bytes)


def attended(model: Transformer, context: int) -> int:
    """Operations of one prompt's attention, of which a causal one needs half the square."""
    config = model.config
    width = config.head_dim if config.attention == "gqa" else config.qk_nope_head_dim + config.qk_rope_head_dim  # fmt: skip
    return 2 * config.num_hidden_layers * config.num_attention_heads * width * context**2


if __name__ == "__main__":
    raise SystemExit(main())
