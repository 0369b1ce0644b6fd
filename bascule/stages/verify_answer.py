"""`bascule verify-answer`: was this stamped answer really written by this run's model? Checked on any chip, without the server."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from bascule.accelerators.base import Work
from bascule.accelerators.names import device_of
from bascule.data import chat
from bascule.data.tokenizer import Tokenizer
from bascule.errors import CheckFailed, UsageError
from bascule.infer.linear import as_laid_out
from bascule.infer.reference import Reference, opinion_of
from bascule.infer.stamp import judge, settings
from bascule.model.weights import fingerprint
from bascule.stages.answer import Answer
from bascule.stages.finished import Finished, open_finished

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


class Stamp(BaseModel):
    """As Service.stamp writes it."""

    model_config = ConfigDict(extra="ignore")

    version: int
    weights_sha256: str
    dtype: Literal["float32", "bfloat16", "float16", "int8"]
    chip: str
    accelerator: str
    verdict_id: str | None
    prompt: list[int]
    said: list[int]
    logprobs: list[float]
    sampling: dict[str, Any]
    choice: int
    drawn: bool
    marks: list[list[tuple[int, float]]]


def main(arguments: Namespace) -> Answer:
    """Exit 3 when any stamped choice is refused."""
    choices = _read(Path(arguments.stamped))
    run = open_finished(arguments.run, arguments.on)
    reference = Reference(run.engine.model)
    told, data = [], []
    for number, (message, stamp) in enumerate(choices):
        troubles, figures = verify(message, stamp, run, reference)
        data.append({"choice": number, "accepted": not troubles, "troubles": troubles, **figures})
        word = "REFUSED: " + "; ".join(troubles) if troubles else "accepted"
        told.append(
            f"choice {number}, said by {stamp.chip} ({stamp.accelerator}), {word}. Checked on {run.accelerator.name}: {_figures(figures)}"
        )
    accepted = all(one["accepted"] for one in data)
    return Answer(
        "\n".join(told),
        {"accepted": accepted, "choices": data},
        0 if accepted else CheckFailed.exit_code,
    )


def verify(
    message: dict[str, Any], stamp: Stamp, run: Finished, reference: Reference
) -> tuple[list[str], dict[str, Any]]:
    """(what speaks against the answer, the measured figures)."""
    model, vocabulary = run.engine.model, run.tokenizer.vocab_size
    tokens = [*stamp.prompt, *stamp.said]
    if not stamp.prompt or not stamp.said or len(stamp.said) != len(stamp.logprobs):
        return ["the stamp lacks tokens, or a log-probability for each"], {}
    if len(tokens) > model.config.max_position_embeddings or not all(
        0 <= one < vocabulary for one in tokens
    ):
        return ["its tokens are none that this model can read"], {}
    troubles = []
    if stamp.weights_sha256 != fingerprint(model):
        troubles.append(
            f"it names the weights {stamp.weights_sha256[:12]}…, the run has {fingerprint(model)[:12]}…"
        )
    if _spelled(run.tokenizer, stamp) != _shown(message):
        troubles.append("the text is not what its tokens spell")
    dtype = DTYPES[stamp.dtype]
    claimed = as_laid_out(model, dtype, experts=device_of(stamp.accelerator) != "cpu")
    if dtype == torch.int8:  # its numbers are those of a model of its own, to fp32's rounding
        reference, dtype = Reference(claimed), torch.float32
    with run.accelerator.session(Work("infer", 1)):
        opinion = opinion_of(claimed, tokens)
    found = judge(
        reference, opinion, prompt=stamp.prompt, said=stamp.said, logprobs=stamp.logprobs, claimed=stamp.marks,
        sampling=settings(stamp.sampling), choice=stamp.choice, dtype=dtype, drawn=stamp.drawn,
    )  # fmt: skip
    return [*troubles, *found.troubles], asdict(found)


def _spelled(tokenizer: Tokenizer, stamp: Stamp) -> tuple[str, str]:
    opened = chat.THINK_OPEN in tokenizer.decode(stamp.prompt[-8:])
    splitter = chat.ReasoningSplitter(opened=opened)
    first, last = splitter.feed(tokenizer.decode(stamp.said)), splitter.close()
    return first[0] + last[0], first[1] + last[1]


def _shown(message: dict[str, Any]) -> tuple[str, str]:
    return message.get("reasoning_content") or "", message.get("content") or ""


def _figures(figures: dict[str, Any]) -> str:
    if not figures:
        return "nothing was computed."
    drawn = (
        "no token was drawn again (a form bound the answer)"
        if figures["redrawn"] is None
        else f"{figures['redrawn']} tokens drawn differently"
    )
    return (
        f"activations differ by {figures['marks']:.1e} ({figures['marks_bound']:.1e} allowed), log-probabilities by "
        f"{figures['logprobs']:.1e} ({figures['logprobs_bound']:.1e}), {drawn}."
    )


def _read(path: Path) -> list[tuple[dict[str, Any], Stamp]]:
    """(message, stamp) of every choice of a saved chat completion. Raises UsageError when there is none."""
    try:
        choices = json.loads(path.read_text(encoding="utf-8"))["choices"]
        found = [(one["message"], Stamp.model_validate(one["stamp"])) for one in choices]
        wrong = [stamp.dtype for _, stamp in found if stamp.dtype not in DTYPES]
        for _, stamp in found:
            settings(stamp.sampling)
    except OSError as error:
        raise UsageError(
            f"The stamped answer '{path}' cannot be read ({error.strerror}). Give the file that holds the whole reply to a chat completion asked "
            'for with "stamp": true.'
        ) from None
    except (
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        ValidationError,
    ) as error:
        raise UsageError(
            f"'{path}' is no stamped answer ({type(error).__name__}: {str(error).splitlines()[0]}). Save the whole reply to a chat completion "
            'asked for with "stamp": true.'
        ) from None
    if wrong or not found:
        raise UsageError(
            f"'{path}' claims the type {wrong or 'of no answer'}; allowed: {', '.join(DTYPES)}."
        )
    return found
