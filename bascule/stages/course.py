"""What a recipe's data becomes: tokenizer, problems, worked examples as token ids, and the verifier over token ids.

Shared by the training worker and `bascule evaluate`, so that both measure the same held-out problems in the same words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bascule.config.model import ModelConfig
from bascule.config.recipe import Recipe
from bascule.data import chat, corpus
from bascule.data.tasks import registry
from bascule.data.tasks.base import Problem
from bascule.data.text_tokenizer import sized
from bascule.data.tokenizer import Tokenizer
from bascule.errors import UsageError
from bascule.ledger import Ledger, last
from bascule.records import LessonsDrawn


@dataclass(frozen=True)
class Course:
    """`worked` of the training problems come with their solution (None: all of them); solutions that are wrong are left out if `verified`."""

    tokenizer: Tokenizer
    model: ModelConfig
    train: list[Problem]
    heldout: list[Problem]
    worked: int | None = None
    verified: bool = True

    def prompts(self, problems: Sequence[Problem]) -> list[list[int]]:
        tokenizer = self.tokenizer
        return [tokenizer.encode(tokenizer.prompt(problem.question)) for problem in problems]

    def verifier(self, problems: Sequence[Problem]) -> Callable[[int, list[int]], float]:
        """(number of the problem, completion's token ids) to reward."""
        tasks = [registry.get(problem.task) for problem in problems]

        def verify(number: int, tokens: list[int]) -> float:
            return tasks[number].verify(problems[number], self.tokenizer.completion(tokens))

        return verify

    def answer(self, tokens: list[int]) -> str:
        """The final answer of a completion: what stands after its thought."""
        return chat.split_reasoning(self.tokenizer.completion(tokens))[1]

    def examples(self, seed: int) -> list[tuple[list[int], list[int]]]:
        """(prompt ids, completion ids with the end token) of every worked training problem whose solver succeeded."""
        encode, end = self.tokenizer.encode, [self.tokenizer.eos_id]
        opened = chat.THINK_OPEN if self.tokenizer.opens_thought else ""
        return [
            (encode(prompt), encode(trace.removeprefix(opened)) + end)
            for prompt, trace in corpus.sft_examples(
                self.train[: self.worked], seed, self.tokenizer.prompt, verified=self.verified
            )
        ]


def course(recipe: Recipe, tokenizer: Tokenizer | None = None) -> Course:
    """Draw the recipe's problems. Pure: the same recipe and tokenizer (default: our own) give the same course anywhere."""
    tokenizer = tokenizer or Tokenizer()
    if not {"sft", "grpo"} & set(recipe.train.phases):
        return Course(
            tokenizer=tokenizer, model=sized(recipe.model, tokenizer), train=[], heldout=[]
        )
    split = corpus.split(recipe.data, recipe.seed)
    model = sized(recipe.model, tokenizer)
    data = recipe.data
    return Course(
        tokenizer, model, split.train, split.heldout, data.worked_problems, data.verify_solutions
    )


def same_lessons(recipe: Recipe, drawn: Course, ledger: Ledger) -> None:
    """Note what is learnt from at a run's beginning, and compare ever after: a file that was edited, or a task's package of another version,
    would end in a run of two halves. Raises UsageError."""
    if not drawn.train:
        return
    talk = Path(recipe.sft.data).read_bytes() if "sft" in recipe.train.phases and recipe.sft.data else b""  # fmt: skip
    found = LessonsDrawn(
        train_sha256=_sha256(drawn.train, talk), heldout_sha256=_sha256(drawn.heldout), train_problems=len(drawn.train),
        heldout_problems=len(drawn.heldout),
    )  # fmt: skip
    began = last(ledger.read(), LessonsDrawn)
    if began is None:
        ledger.append(found)
        return
    same_heldout(recipe, drawn.heldout, ledger)
    if began.train_sha256 != found.train_sha256:
        raise _others("training problems", recipe, began.train_sha256)


def same_heldout(recipe: Recipe, heldout: Sequence[Problem], ledger: Ledger) -> None:
    """Raises UsageError when the recipe's held-out problems are not those that the run began with: what it learnt from may be among them."""
    began = last(ledger.read(), LessonsDrawn)
    if began and began.heldout_sha256 != _sha256(heldout):
        raise _others("held-out problems", recipe, began.heldout_sha256)


def _others(which: str, recipe: Recipe, sha256: str) -> UsageError:
    names = ", ".join(dict.fromkeys(task.name for task in recipe.data.tasks))
    return UsageError(
        f"The {which} of {names} are not those that this run began with (SHA-256 {sha256[:12]}…): a file of them, or the package that makes "
        "them, has changed. Put the old one back, or begin another run with --name."
    )


def _sha256(problems: Sequence[Problem], more: bytes = b"") -> str:
    """Without what a foreign family keeps in lists and objects: it need not be the same in every process."""
    digest = hashlib.sha256(more)
    for one in problems:
        plain = [
            (k, v) for k, v in sorted(one.metadata.items()) if isinstance(v, str | int | float)
        ]
        digest.update(json.dumps([one.task, one.key, one.question, one.answer, plain]).encode())
    return digest.hexdigest()


def heldout_only(recipe: Recipe, tokenizer: Tokenizer | None = None) -> Course:
    """The course without its training side, for evaluation."""
    tokenizer = tokenizer or Tokenizer()
    model = sized(recipe.model, tokenizer)
    return Course(
        tokenizer=tokenizer, model=model, train=[], heldout=corpus.heldout_problems(recipe.data)
    )
