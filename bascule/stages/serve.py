"""`bascule serve`: the OpenAI-compatible server and the chat page for a finished run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from bascule.config.environment import environment
from bascule.config.load import read_resolved
from bascule.config.serving import ServeConfig
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
    if arguments.engine and arguments.allow_origin:
        raise UsageError(
            "--allow-origin is for bascule's own server; an engine of yours has options of its own for it, which --engine-args takes."
        )
    serving = _with_origins(recipe.serve, arguments.allow_origin)
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
            allow_origins=serving.allow_origins,
        )
    return Answer(text="The server has ended.", data={"ended": True})


def _with_origins(serve: ServeConfig, more: Sequence[str] | None) -> ServeConfig:
    """The recipe's origins and those of the command line. Raises UsageError for what is no origin."""
    try:
        return ServeConfig(
            **{**serve.model_dump(), "allow_origins": (*serve.allow_origins, *(more or ()))}
        )
    except ValidationError:
        raise UsageError(
            f"--allow-origin {' '.join(more or ())}: an origin is a scheme and a host, with a port where it has one, and nothing behind it: "
            "https://chat.example or http://localhost:3000. `*` is not taken."
        ) from None


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
