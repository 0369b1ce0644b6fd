"""A stamped answer is believed on any chip, and not believed when the model, the weights, the text or the precision was another."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from bascule.errors import UsageError
from bascule.infer.batch import Batch
from bascule.infer.compiled import compiled
from bascule.infer.linear import Precision
from bascule.infer.reference import Reference
from bascule.infer.row import Row
from bascule.infer.sampling import Sampling
from bascule.infer.stamp import marks
from bascule.stages import verify_answer
from bascule.stages.finished import Finished, open_finished
from bascule.stages.verify_answer import Stamp, verify
from tests.serve.conftest import LARGE, Server, make_run

BF16 = torch.cpu._is_avx512_bf16_supported()
Edit = Callable[[Finished], None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder, _ = make_run(tmp_path_factory.mktemp("stamp") / "run", {"main": "cpu"})
    return open_finished(str(folder.root), "cpu")


@pytest.fixture(scope="module")
def reference(run: Finished) -> Reference:
    return Reference(run.engine.model)


def stamped(
    run: Finished, change: Edit | None = None, *, seed: int = 3
) -> tuple[dict[str, Any], Stamp]:
    """An answer by this run's model, or by what `change` made of it; the stamp names the run's own weights either way."""
    liar = open_finished(str(run.folder.root), "cpu")
    sha256 = verify_answer.fingerprint(liar.engine.model)
    if change is not None:
        change(liar)
    prompt = liar.tokenizer.encode(liar.tokenizer.prompt(f"{seed}+2=?"))
    sampling = Sampling(temperature=0.8, top_p=0.95, max_tokens=70, seed=seed, purpose="serve")
    (said,) = liar.engine.generate([prompt], sampling)
    stamp = Stamp(
        version=1, weights_sha256=sha256, dtype="float32", chip="c", accelerator="cpu", verdict_id=None, prompt=prompt,
        said=said.tokens, logprobs=said.logprobs, sampling=asdict(sampling), choice=0, drawn=True,
        marks=marks(liar.engine.model, prompt, said.tokens),
    )  # fmt: skip
    thought, content = verify_answer._spelled(run.tokenizer, stamp)
    return {"reasoning_content": thought, "content": content}, stamp


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder, _ = make_run(tmp_path_factory.mktemp("stamp") / "large", {"main": "cpu"}, model=LARGE)
    return open_finished(str(folder.root), "cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        pytest.param("int8", "int8", marks=pytest.mark.skipif(compiled() is None, reason="no C++ compiler")),
        pytest.param("bf16", "bfloat16", marks=pytest.mark.skipif(not BF16, reason="no bf16 unit")),
    ],
)  # fmt: skip
def test_an_answer_in_another_precision_is_believed_as_that_and_as_nothing_else(
    precision: Precision, dtype: str, larger: Finished
) -> None:
    stamps = [said_in(larger, precision, dtype, seed) for seed in range(3)]
    reference = Reference(larger.engine.model)
    for message, stamp in stamps:
        assert verify(message, stamp, larger, reference)[0] == []
        fine = stamp.model_copy(update={"dtype": "float32"})
        assert verify(message, fine, larger, reference)[0]
        seeded = stamp.model_copy(update={"sampling": {**stamp.sampling, "seed": 99}})
        assert verify(message, seeded, larger, reference)[0]


def said_in(run: Finished, precision: Precision, dtype: str, seed: int) -> tuple[dict[str, Any], Stamp]:  # fmt: skip
    model, tokenizer = run.engine.model, run.tokenizer
    prompt = tokenizer.encode(tokenizer.prompt(f"{seed}+2=?"))
    bias = ((tokenizer.eos_id, -100.0),)
    sampling = Sampling(max_tokens=70, seed=seed, purpose="serve", logit_bias=bias)
    batch = Batch(
        model, slots=1, length=100, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, precision=precision
    )  # fmt: skip
    row = Row(prompt, sampling)
    with torch.inference_mode():
        batch.join([[row]])
        while batch.rows:
            batch.step()
    stamp = Stamp(
        version=1, weights_sha256=verify_answer.fingerprint(model), dtype=dtype, chip="c", accelerator="cpu", verdict_id=None,
        prompt=prompt, said=row.said, logprobs=row.logprobs, sampling=asdict(sampling), choice=0, drawn=True,
        marks=marks(batch.reader, prompt, row.said),
    )  # fmt: skip
    thought, content = verify_answer._spelled(tokenizer, stamp)
    return {"reasoning_content": thought, "content": content}, stamp


def one_step_on(liar: Finished) -> None:
    """The size of a late optimizer step: 1e-4 of each weight's own size."""
    torch.manual_seed(0)
    for weight in liar.engine.model.parameters():
        weight.data += 1e-4 * weight.data.std(correction=0) * torch.randn_like(weight)


def in_bfloat16(liar: Finished) -> None:
    liar.engine.model.to(torch.bfloat16).to(torch.float32)


@pytest.mark.parametrize("seed", range(4))
def test_honest_answers_are_accepted(seed: int, run: Finished, reference: Reference) -> None:
    troubles, figures = verify(*stamped(run, seed=seed), run, reference)
    assert troubles == [] and figures["redrawn"] <= 1


@pytest.mark.parametrize("change", [one_step_on, in_bfloat16])
def test_other_weights_and_lower_precision_are_refused_though_the_stamp_names_the_right_ones(
    change: Edit, run: Finished, reference: Reference
) -> None:
    troubles, figures = verify(*stamped(run, change), run, reference)
    assert any("activations" in trouble for trouble in troubles)
    assert figures["marks"] > 3 * figures["marks_bound"]


def test_altered_text_prompt_tokens_and_seeds_are_refused(
    run: Finished, reference: Reference
) -> None:
    message, stamp = stamped(run)
    other = [*stamp.said]
    other[5] = (other[5] + 1) % 100 + 9
    forged = {
        "text": ({**message, "content": "42"}, stamp),
        "prompt": (
            message,
            stamp.model_copy(update={"prompt": [*stamp.prompt[:-2], 20, stamp.prompt[-1]]}),
        ),
        "token": (message, stamp.model_copy(update={"said": other})),
        "seed": (message, stamp.model_copy(update={"sampling": {**stamp.sampling, "seed": 99}})),
        "other weights": (message, stamp.model_copy(update={"weights_sha256": "0" * 64})),
        "no marks": (message, stamp.model_copy(update={"marks": [[] for _ in stamp.marks]})),
        "nan": (message, stamp.model_copy(update={"logprobs": [float("nan")] * len(stamp.said)})),
    }
    for what, (shown, claimed) in forged.items():
        troubles, _ = verify(shown, claimed, run, reference)
        assert troubles, what


def test_a_servers_stamp_is_believed_by_the_verb(
    server: Server, tmp_path: Path, capsys: Any
) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "1+2=?"}],
        max_tokens=40,
        n=2,
        seed=5,
        extra_body={"stamp": True},
    )
    saved = tmp_path / "answer.json"
    saved.write_text(reply.model_dump_json())
    words = Namespace(stamped=str(saved), run=str(server.folder.root), on="sim:clean@cpu")
    answer = verify_answer.main(words)
    assert answer.exit_code == 0 and answer.data["accepted"] and len(answer.data["choices"]) == 2
    raw = json.loads(saved.read_text())
    assert raw["choices"][0]["stamp"]["verdict_id"]
    raw["choices"][1]["message"]["content"] = "no"
    saved.write_text(json.dumps(raw))
    assert verify_answer.main(words).exit_code == 3


def test_what_is_no_stamp_is_refused_in_words(run: Finished, tmp_path: Path) -> None:
    path = tmp_path / "plain.json"
    path.write_text('{"choices": [{"message": {"content": "3"}}]}')
    with pytest.raises(UsageError, match="no stamped answer"):
        verify_answer.main(Namespace(stamped=str(path), run=str(run.folder.root), on="cpu"))
