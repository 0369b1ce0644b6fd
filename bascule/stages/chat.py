"""`bascule chat`: talk to a finished run's model in the terminal; one question, or a conversation."""

from __future__ import annotations

import sys
from argparse import Namespace

from bascule.data import chat
from bascule.errors import UsageError
from bascule.infer.sampling import Sampling
from bascule.stages.answer import Answer
from bascule.stages.finished import Finished, open_finished
from bascule.terminal import colours


def main(arguments: Namespace) -> Answer:
    run = open_finished(arguments.run, arguments.on)
    if arguments.message is not None:
        thought, answer = _ask(
            run,
            [{"role": "user", "content": arguments.message}],
            arguments,
            show=not arguments.json,
        )
        return Answer(
            text="",
            data={"reasoning": thought, "content": answer, "accelerator": run.accelerator.name},
        )
    turns = _converse(run, arguments)
    return Answer(text="", data={"turns": turns})


def _converse(run: Finished, arguments: Namespace) -> int:
    simulated = ", simulated" if run.accelerator.info().simulated else ""
    print(
        f"{run.recipe.name} answers on {run.accelerator.name}{simulated}. An empty line or Ctrl-D ends.",
        file=sys.stderr,
    )
    history: list[dict[str, str]] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return len(history) // 2
        if not question:
            return len(history) // 2
        try:
            _, answer = _ask(
                run, [*history, {"role": "user", "content": question}], arguments, show=True
            )
        except UsageError as error:
            print(f"bascule: {error}", file=sys.stderr)
            continue
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _ask(
    run: Finished, messages: list[dict[str, str]], arguments: Namespace, *, show: bool
) -> tuple[str, str]:
    """Stream one answer; the thought is shown dimmed on a terminal. Raises UsageError for what the model cannot read."""
    prompt = run.tokenizer.encode(run.tokenizer.render(messages))
    room = run.engine.model.config.max_position_embeddings - len(prompt)
    if room < 1:
        raise UsageError(
            f"The conversation has {len(prompt)} tokens, the model's context holds {run.engine.model.config.max_position_embeddings}. Begin a new chat."
        )
    dim, plain = ("\x1b[2m", "\x1b[0m") if colours(sys.stdout) else ("", "")
    speller = run.tokenizer.speller()
    splitter, thought, answer = chat.ReasoningSplitter(opened=run.tokenizer.opens_thought), "", ""
    sampling = Sampling(
        temperature=arguments.temperature, max_tokens=room, seed=arguments.seed, purpose="chat"
    )
    for token, _ in run.engine.stream(prompt, sampling):
        more_thought, more_answer = splitter.feed(speller.feed(token))
        if show and more_answer and thought and not answer:
            print(f"{plain}")
        thought, answer = thought + more_thought, answer + more_answer
        if show:
            print(f"{dim}{more_thought}{plain}{more_answer}", end="", flush=True)
    last_thought, last_answer = splitter.feed(speller.close())
    more_thought, more_answer = splitter.close()
    more_thought, more_answer = last_thought + more_thought, last_answer + more_answer
    if show:
        print(f"{dim}{more_thought}{plain}{more_answer}")
        if (thought + more_thought).strip() and not (answer + more_answer).strip():
            print("(all of it thought: the model never came to an answer)", file=sys.stderr)
    return thought + more_thought, answer + more_answer
