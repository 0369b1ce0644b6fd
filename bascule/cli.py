"""The command line: `bascule VERB ...`. Reads the words (verbs.py names them), calls the stage, turns what it raised into an exit code.

No torch here, nor in anything imported for `--help`: a stage's module is imported when its verb is called.

Exit codes: 0 ok · 1 our own fault · 2 usage or recipe · 3 a check failed · 4 the guard stopped the run · 5 device fault and no
pool left · 6 out of memory · 75 preempted, run me again · 130/143 ended by SIGINT/SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from bascule.accelerators.install import explain_torch_import
from bascule.errors import (
    EXIT_SIGINT,
    AcceleratorUnavailable,
    BasculeError,
    OutOfMemory,
    UsageError,
    nearest,
)
from bascule.terminal import laid_out, take_any_letter, width_of
from bascule.verbs import VERBS

BEGIN = """begin with:
  bascule doctor               what this machine can run
  bascule demo                 the whole story, in some minutes on two cores
  bascule VERB --help          the words of a verb, and an example"""

EXIT_CODES = """exit codes:
  0 ok · 1 our own fault · 2 usage or recipe · 3 a check failed (qualify, an eval
  gate, --strict) · 4 the guard stopped the run · 5 device fault and no pool left
  6 out of memory · 75 preempted: run the same command again · 130/143 signals"""


class Parser(argparse.ArgumentParser):
    """Wrong words are refused like everything else: one sentence, and one object on stdout with `--json`."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[0].upper()}{message[1:]}. See `{self.prog} --help`.")


def build_parser() -> Parser:
    parser = Parser(
        prog="bascule",
        description="Train and serve a DeepSeek-style reasoning model on accelerators that may not be up to it.",
        epilog=f"{BEGIN}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bascule {version('bascule')}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, what, arguments, example in VERBS:
        verb = verbs.add_parser(
            name, help=what, description=what[0].upper() + what[1:] + ".", epilog=f"example: {example}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        arguments(verb)
        verb.add_argument(
            "--json", action="store_true", help="one JSON object on stdout; logs go to stderr"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Answers go to stdout, progress and warnings to stderr. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    take_any_letter(sys.stdout)
    as_json = "--json" in words
    try:
        arguments = _read(words)
        stage = importlib.import_module(f"bascule.stages.{arguments.verb.replace('-', '_')}")
        answer = stage.main(arguments)
    except BasculeError as error:
        return _refuse(error, error.exit_code, as_json=as_json)
    except MemoryError as error:
        return _refuse(
            OutOfMemory(f"Host memory is exhausted: {error}."),
            OutOfMemory.exit_code,
            as_json=as_json,
        )
    except OSError as error:
        wrapped = UsageError(
            f"{error.strerror or error}: {error.filename or 'no file named'}. Nothing already written is lost; mend it and run the same command again."
        )
        return _refuse(wrapped, wrapped.exit_code, as_json=as_json)
    except RuntimeError as error:
        explained = explain_torch_import(error)
        if explained is None:
            raise
        return _refuse(
            AcceleratorUnavailable(explained),
            AcceleratorUnavailable.exit_code,
            as_json=as_json,
        )
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command resumes", file=sys.stderr)
        return EXIT_SIGINT
    text = laid_out(answer.text, width_of(sys.stdout))
    _print(json.dumps(answer.data, indent=1) if as_json else text)
    return int(answer.exit_code)


def _print(text: str) -> None:
    """To stdout, whether or not anyone still reads there: the exit code must come out all the same."""
    try:
        if text:
            print(text, flush=True)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain again when it flushes stdout at exit.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _read(words: list[str]) -> argparse.Namespace:
    """Raises UsageError; no words at all, or `--help`, print the help and end with SystemExit."""
    parser = build_parser()
    if not words:
        parser.print_help()
        parser.exit()
    verbs = [name for name, *_ in VERBS]
    if not words[0].startswith("-") and words[0] not in verbs:
        raise UsageError(
            f"'{words[0]}' is not a verb of bascule.{nearest(words[0], verbs)} The verbs: {', '.join(verbs)}."
        )
    return parser.parse_args(words)


def _refuse(error: BasculeError, exit_code: int, *, as_json: bool) -> int:
    if as_json:
        said = {"type": type(error).__name__, "message": str(error), "exit_code": exit_code}
        _print(json.dumps({"error": said}))
    print(f"bascule: {error}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
