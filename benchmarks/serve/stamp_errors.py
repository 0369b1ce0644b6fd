"""How often is an honest answer refused, and a dishonest one believed? Stamps of one run's model, made and forged in many ways.

    python benchmarks/serve/stamp_errors.py out/demo --answers 50 [--on cuda]

Honest answers are made on the CPU (in fp32 and, as a chip that rounds otherwise, in float64) and judged on `--on`. Forgers name the right
weights: they hold weights moved by a share of their own size (a late optimizer step moves them by about 1e-4), compute in another type,
or alter what was said. The bound is measured on each answer, so nothing here is tuned.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

import torch

from bascule.infer.reference import Reference
from bascule.infer.sampling import Sampling
from bascule.infer.stamp import marks
from bascule.model.weights import fingerprint
from bascule.stages.finished import Finished, open_finished
from bascule.stages.verify_answer import Stamp, _spelled, verify

Change = Callable[[Finished], None]


def moved(share: float) -> Change:
    def change(liar: Finished) -> None:
        torch.manual_seed(0)
        for weight in liar.engine.model.parameters():
            weight.data += share * weight.data.std(correction=0) * torch.randn_like(weight)

    return change


def rounded(dtype: torch.dtype) -> Change:
    return lambda liar: liar.engine.model.to(dtype).to(torch.float32)


MAKERS: dict[str, Change] = {
    "honest, fp32": lambda liar: None,
    "honest, float64": lambda liar: liar.engine.model.double(),
    "weights moved by 1e-3": moved(1e-3),
    "weights moved by 1e-4": moved(1e-4),
    "weights moved by 1e-5": moved(1e-5),
    "bfloat16": rounded(torch.bfloat16),
    "float16": rounded(torch.float16),
}


def stamp(maker: Finished, sha256: str, seed: int) -> tuple[dict[str, str], Stamp]:
    tokenizer, model = maker.tokenizer, maker.engine.model
    prompt = tokenizer.encode(tokenizer.prompt(f"{seed % 10}+{seed // 10 % 10}-{seed % 7}=?"))
    room = min(64, model.config.max_position_embeddings - len(prompt))
    sampling = Sampling(temperature=1.0, max_tokens=room, seed=seed, purpose="serve")
    (said,) = maker.engine.generate([prompt], sampling)
    made = Stamp(
        version=1, weights_sha256=sha256, dtype="float32", chip="", accelerator="cpu", verdict_id=None, prompt=prompt,
        said=said.tokens, logprobs=said.logprobs, sampling=asdict(sampling), choice=0, drawn=True,
        marks=marks(model, prompt, said.tokens),
    )  # fmt: skip
    return shown(maker, made), made


def shown(run: Finished, made: Stamp) -> dict[str, str]:
    thought, content = _spelled(run.tokenizer, made)
    return {"reasoning_content": thought, "content": content}


def with_a_token_changed(run: Finished, made: Stamp, seed: int) -> tuple[dict[str, str], Stamp]:
    said, at = [*made.said], seed % len(made.said)
    said[at] = 9 + (said[at] + 1 + seed) % (run.tokenizer.vocab_size - 9)
    forged = made.model_copy(update={"said": said})
    return shown(run, forged), forged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--answers", type=int, default=50)
    parser.add_argument("--on", default="cpu")
    options = parser.parse_args()
    run = open_finished(options.run, options.on)
    reference, sha256 = Reference(run.engine.model), fingerprint(run.engine.model)
    refused: dict[str, int] = {}
    nearest: dict[str, float] = {}
    for name, change in MAKERS.items():
        maker = open_finished(options.run, "cpu")
        change(maker)
        for seed in range(options.answers):
            answers = {name: stamp(maker, sha256, seed)}
            if name == "honest, fp32":
                answers["one token changed, text too"] = with_a_token_changed(
                    run, answers[name][1], seed
                )
                answers["text changed"] = (
                    {"reasoning_content": "", "content": "42"},
                    answers[name][1],
                )
            for what, (message, made) in answers.items():
                troubles, figures = verify(message, made, run, reference)
                refused[what] = refused.get(what, 0) + bool(troubles)
                ratio = figures["marks"] / figures["marks_bound"]
                worse = max if what.startswith("honest") else min
                nearest[what] = worse(nearest.get(what, ratio), ratio)
    print(json.dumps({"run": options.run, "judged_on": run.accelerator.name, "answers": options.answers,
                      "refused": refused, "marks_over_bound_nearest": nearest}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
