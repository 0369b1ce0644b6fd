"""`bascule serve --engine vllm|sglang --python PATH`: the owner's engine on the exported model, once it has proved to compute it."""

from __future__ import annotations

import asyncio
import shlex
from argparse import Namespace

from bascule.config.recipe import Recipe
from bascule.data.text_tokenizer import open_tokenizer
from bascule.errors import UsageError, nearest
from bascule.folder import RunFolder
from bascule.infer.reference import Reference
from bascule.ledger import Ledger
from bascule.model.weights import load_hf
from bascule.records import Admission
from bascule.serve.admission import Finding
from bascule.serve.engines import ENGINES
from bascule.serve.foreign import Plan, serve
from bascule.serve.server import bind, examples
from bascule.stages.answer import say
from bascule.stages.export import export


def run(
    folder: RunFolder,
    recipe: Recipe,
    arguments: Namespace,
    *,
    host: str,
    port: int,
    api_key: str | None,
) -> None:
    """Raises CheckFailed when the engine is refused; the finding is in the ledger either way."""
    if arguments.engine not in ENGINES:
        raise UsageError(
            f"--engine {arguments.engine} is not known; allowed: {', '.join(ENGINES)}.{nearest(arguments.engine, ENGINES)}"
        )
    if not arguments.python:
        raise UsageError(
            "--engine needs --python: the interpreter of the environment that has the engine, for instance /opt/vllm/bin/python."
        )
    target = folder.root / "export"
    export(folder, target)
    model, config = load_hf(target)
    tokenizer = open_tokenizer(target)
    questions = [tokenizer.encode(tokenizer.prompt(text)) for text in examples(recipe)]
    words = shlex.split(arguments.engine_args or "")
    plan = Plan(
        ENGINES[arguments.engine], arguments.python, target, config, recipe.name, words, api_key
    )
    with bind(host, port) as listener:
        address = f"http://{host}:{listener.getsockname()[1]}"
        say(
            f"{arguments.engine} starts on {target} and is examined; {address} opens when it is admitted"
        )
        asyncio.run(
            serve(
                plan, Reference(model), questions, listener, folder.logs / f"engine-{arguments.engine}.log",
                on_finding=lambda finding: _note(folder, plan, finding, address),
            )
        )  # fmt: skip


def _note(folder: RunFolder, plan: Plan, finding: Finding, address: str) -> None:
    Ledger(folder.ledger).append(
        Admission(
            engine=plan.engine.name, arguments=tuple(plan.extra), accepted=finding.accepted, reading=finding.reading,
            speaking=finding.speaking, bound=finding.bound, power=finding.power, tokens=finding.tokens, detail=finding.where,
        )
    )  # fmt: skip
    if finding.accepted:
        say(f"{finding.told(plan.engine.name, '')} {plan.name} answers on {address}.")
