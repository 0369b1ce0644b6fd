"""`bascule serve`: the OpenAI-compatible server and the chat page for a finished run."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from bascule.config.environment import environment
from bascule.config.load import read_resolved
from bascule.errors import UsageError
from bascule.folder import RunFolder
from bascule.serve.server import run as run_server
from bascule.stages.answer import Answer
from bascule.stages.placed import infer_choice


def main(arguments: Namespace) -> Answer:
    folder = RunFolder(Path(arguments.run))
    recipe = read_resolved(folder.recipe)
    if not (folder.model / "config.json").exists():
        raise UsageError(
            f"The run {folder.root} has no model yet. Finish it first: bascule run with its recipe."
        )
    if not arguments.engine and (arguments.python or arguments.engine_args):
        raise UsageError(
            "--python and --engine-args are for an engine of your own; name it with --engine, or leave them out."
        )
    host = arguments.host or recipe.serve.host
    port = recipe.serve.port if arguments.port is None else arguments.port
    api_key = _api_key(arguments.api_key_file)
    if arguments.engine:
        from bascule.stages import engine  # with torch, which our own server's process does without

        engine.run(folder, recipe, arguments, host=host, port=port, api_key=api_key)
    else:
        accelerator, _ = infer_choice(folder, recipe, arguments.on)
        run_server(
            folder,
            accelerator,
            host=host,
            port=port,
            api_key=api_key,
            precision=arguments.precision,
        )
    return Answer(text="The server has ended.", data={"ended": True})


def _api_key(file: str | None) -> str | None:
    """From the file, else from BASCULE_API_KEY, else none. Raises UsageError for an empty one: an open door by mistake."""
    if file is None:
        given = environment("BASCULE_API_KEY")
        return None if given is None else _checked(given, "BASCULE_API_KEY", "unset it to serve")
    try:
        text = Path(file).read_bytes().decode("latin-1")
    except OSError as error:
        raise UsageError(f"The key file '{file}' cannot be read ({error.strerror}).") from None
    return _checked(text, f"The key file '{file}'", "leave --api-key-file out to serve")


def _checked(text: str, where: str, instead: str) -> str:
    key = text.strip()
    if not key:
        raise UsageError(f"{where} is empty. Put the key into it, or {instead} without a key.")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            f"{where} must hold one key and nothing else, in printable ASCII without spaces: what a header can carry."
        )
    return key
