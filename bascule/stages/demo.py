"""`bascule demo`: `bascule run` with the recipe that ships inside the package (the same file as runs/demo.toml)."""

from __future__ import annotations

from argparse import Namespace
from importlib.resources import as_file, files

from bascule.stages import run
from bascule.stages.answer import Answer


def main(arguments: Namespace) -> Answer:
    with as_file(files("bascule").joinpath("recipes", "demo.toml")) as recipe:
        arguments.recipe = str(recipe)
        return run.main(arguments)
