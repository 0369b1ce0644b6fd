"""The verbs of the command line and the words each one takes. What a verb does stands in bascule/stages/, in the file of its name.

Nothing of bascule is imported here, so that `--help` is quick.
"""

from __future__ import annotations

import math
from argparse import Action, ArgumentError, ArgumentTypeError, Namespace
from argparse import ArgumentParser as Parser
from collections.abc import Callable
from typing import Any


class Once(Action):
    """A word that is said once and is not blank: of two, argparse alone would silently take the last."""

    def __call__(
        self, parser: Parser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest)
        if before is not None:
            raise ArgumentError(self, f"'{before}' and '{values}' were given; keep one of them")
        if not values.strip():
            raise ArgumentError(self, "is blank")
        setattr(namespace, self.dest, values)


def positive(text: str) -> int:
    """A whole number from 1 on; the sentence of what argparse says of another."""
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"'{text}' is not a whole number from 1 on")
    return int(text)


def not_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ArgumentTypeError(f"'{text}' is not a number from 0 on")
    return number


def above_zero(text: str) -> float:
    number = not_negative(text)
    if number == 0:
        raise ArgumentTypeError(f"'{text}' is not a number above 0")
    return number


def share(text: str) -> float:
    number = not_negative(text)
    if number >= 1:
        raise ArgumentTypeError(f"'{text}' is not a share from 0 to below 1")
    return number


def _overrides(parser: Parser) -> None:
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override one setting, e.g. --set train.steps=20 (repeatable; TOML values)",
    )


def _recipe(parser: Parser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE.toml", help="the recipe; see runs/ for commented examples"
    )
    _recipe_options(parser)


def _recipe_options(parser: Parser) -> None:
    _overrides(parser)
    parser.add_argument(
        "--out", metavar="DIR", default="out", help="where run folders live (default: out)"
    )
    parser.add_argument("--name", help="name of the run folder (default: the recipe's name)")


def _run_folder(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, e.g. out/demo")


def _strict(parser: Parser) -> None:
    parser.add_argument(
        "--strict",
        action="store_true",
        help="every fallback, truncation or dropped sample is an error",
    )


def _on(parser: Parser) -> None:
    parser.add_argument(
        "--on", metavar="ACCELERATOR", help="accelerator to use (default: the run's infer pool)"
    )


def _run(parser: Parser) -> None:
    _recipe(parser)
    _strict(parser)


def _demo(parser: Parser) -> None:
    _recipe_options(parser)
    _strict(parser)


def _plan(parser: Parser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE.toml | score FILE.csv",
        help="price this recipe's own pools; or `score FILE.csv`: predict a table of published runs and say how wrong",
    )
    _overrides(parser)
    parser.add_argument(
        "--model",
        action=Once,
        metavar="MODEL",
        help="a family name (deepseek-v3), a preset, a config.json, or a TOML table",
    )
    parser.add_argument(
        "--train",
        action=Once,
        metavar="SPEC",
        help='what to train on, e.g. "2048 x H800, 14.8T tokens"',
    )
    parser.add_argument(
        "--versus",
        metavar="SPEC",
        action="append",
        default=[],
        help='an alternative, e.g. "6144 x Ascend 910C" (repeatable)',
    )
    parser.add_argument(
        "--serve",
        metavar="SPEC",
        action="append",
        default=[],
        help='what to serve, e.g. "H20, 4k in, 1k out, 50 ms" (repeatable)',
    )
    parser.add_argument(
        "--chips",
        metavar="FILE.toml|RUN",
        help="your own chips by the catalogue's column names, or a run's folder: its pools as qualify measured them, "
        "its own pretraining as an anchor",
    )
    parser.add_argument(
        "--anchor",
        metavar="SPEC",
        action="append",
        default=[],
        help="a run of your own that corrects the forecast, with its speed per chip, in all, or a step's time, e.g. "
        '"64 x H800, llama-3-70b, seq 8k, batch 512, TP4 PP4 MB1, 410 tokens/s/chip"; or a service: '
        '"32 x H800, 4k in, 1k out, 50 ms, decode 1850 tokens/s/chip" (repeatable); an option\'s own speed is a part of it: '
        '"measured 410 tokens/s/chip"',
    )
    parser.add_argument(
        "--kind",
        choices=["train", "inference"],
        help="what the scored table holds (default: told from its columns)",
    )
    parser.add_argument("--html", metavar="FILE", help="also write a page with charts")


def _qualify(parser: Parser) -> None:
    parser.add_argument(
        "accelerators",
        nargs="+",
        metavar="POOL",
        help="accelerators to examine: cpu, cuda, cuda:1, npu, sim:PROFILE[@BASE]",
    )
    parser.add_argument(
        "--preset",
        default="nano",
        help="model whose operators and shapes are examined (default: nano)",
    )
    parser.add_argument(
        "--recipe",
        metavar="FILE",
        help="examine this recipe's model instead, and show what its plan counts on beside the measured speed",
    )
    parser.add_argument(
        "--check",
        action="append",
        default=[],
        metavar="NAME",
        help="only this check or family (repeatable)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the checks' inputs (default: 0)"
    )
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16", "fp16"],
        default="fp32",
        help="type of the model's weights (default: fp32)",
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--quick", action="store_true", help="the short battery, a few minutes (the default)"
    )
    depth.add_argument("--full", action="store_true", help="the long battery, within an hour")
    parser.add_argument(
        "--wide",
        action="store_true",
        help="also PyTorch's own operator database (OpInfo), beyond this model's operators",
    )
    parser.add_argument(
        "--html", metavar="FILE", help="where the page goes (default: report.html in --out)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the answers of an earlier battery that was cut off",
    )
    parser.add_argument(
        "--require",
        action="append",
        choices=["train", "infer"],
        default=[],
        help="exit 3 unless every accelerator is fit for this role (repeatable); without it, exit 3 when one is unfit for any",
    )
    parser.add_argument(
        "--readmit",
        metavar="RUN",
        help="POOL is one that this run condemned: examine it again, and let it back if it is fit now; exit 3 if not",
    )
    parser.add_argument(
        "--time-limit",
        type=above_zero,
        default=None,
        metavar="S",
        help="seconds per pool (default: 180, with --full 3600; up to 20 times as long for models of more than 1 M parameters)",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="out/qualify",
        help="where evidence and reproducers are written",
    )


def _evaluate(parser: Parser) -> None:
    _run_folder(parser)
    _on(parser)
    parser.add_argument(
        "--eval-seed", type=int, metavar="N", help="draw the held-out problems with another seed"
    )
    parser.add_argument(
        "--problems",
        type=positive,
        metavar="N",
        help="how many held-out problems (default: the recipe's)",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        metavar="N",
        help="samples of each for pass@k and maj@k (default: the recipe's)",
    )


def _serve(parser: Parser) -> None:
    _run_folder(parser)
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port (default: 8000; 0 picks a free one)")
    _on(parser)
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="require this key (or set BASCULE_API_KEY)"
    )
    parser.add_argument(
        "--allow-origin", action="append", metavar="ORIGIN", help="let scripts of web pages from there use the server (https://chat.example); may be repeated"
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "int8"), help="of a larger model's matrices on a CPU (default: the recipe's)"
    )  # fmt: skip
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help="serve with your own engine instead, vllm or sglang, once it has proved to compute this model",
    )
    parser.add_argument(
        "--python",
        metavar="PATH",
        help="with --engine: the interpreter of the engine's environment",
    )
    parser.add_argument(
        "--engine-args", metavar="WORDS", help="with --engine: further words for its command line"
    )


def _export(parser: Parser) -> None:
    _run_folder(parser)
    parser.add_argument("--to", metavar="DIR", help="where to write (default: RUN/export)")
    parser.add_argument(
        "--gguf", action="store_true", help="also write a GGUF file for llama.cpp (extra gguf)"
    )


def _verify_answer(parser: Parser) -> None:
    parser.add_argument(
        "stamped",
        metavar="STAMPED.json",
        help='the saved reply to a chat completion asked for with "stamp": true',
    )
    parser.add_argument(
        "--run", metavar="RUN", required=True, help="the run whose model is said to have answered"
    )
    _on(parser)


def _chat(parser: Parser) -> None:
    _run_folder(parser)
    parser.add_argument("message", nargs="?", help="one question; without it, an interactive chat")
    _on(parser)
    parser.add_argument(
        "--temperature",
        type=not_negative,
        default=0.0,
        help="0 (the default) takes the likeliest token",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")


def _report(parser: Parser) -> None:
    _run_folder(parser)
    parser.add_argument(
        "--seeds",
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs of the same recipe with other seeds: the page gains their curves with the range from lowest to highest",
    )


def _replay(parser: Parser) -> None:
    parser.add_argument(
        "incident",
        metavar="INCIDENT",
        help="an incident folder, e.g. out/demo/incidents/0001-step-310",
    )
    parser.add_argument(
        "--on",
        metavar="ACCELERATOR",
        default="cpu",
        help="accelerator to replay the step on (default: cpu)",
    )


def _blame(parser: Parser) -> None:
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        help="PyTorch Flight Recorder dumps, one file a rank (pickle or JSON)",
    )


def _drill(parser: Parser) -> None:
    _recipe(parser)
    parser.add_argument(
        "--fault",
        metavar="NAME[:SEVERITY]",
        help="what to plant on the pool that trains; `bascule faults` lists the names; severities: low, medium, high",
    )
    parser.add_argument(
        "--at-step",
        type=positive,
        metavar="N",
        help="first training step at which it acts (default: the profile's own; with --all a third of the run)",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="the truth table: every fault of the catalogue at every severity, in turn; goes on where it was cut off",
    )
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="with --all: each cell with N seeds"
    )


def _faults(parser: Parser) -> None:
    parser.add_argument("fault", nargs="?", metavar="NAME", help="one profile, in full")


def _compare_runs(parser: Parser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="A",
        help="logs of one group: files or folders (MLPerf results, JSONL, CSV, run folders)",
    )
    parser.add_argument(
        "--against", nargs="+", required=True, metavar="B", help="logs of the other group"
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.0025,
        metavar="SHARE",
        help="largest difference that still counts as equal (default: 0.0025)",
    )


def _tokenize(parser: Parser) -> None:
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILES",
        help="text, JSON lines, Parquet, or folders of such files",
    )
    parser.add_argument(
        "--traces",
        metavar="RECIPE.toml",
        help="also read the worked solutions of this recipe's training problems, a document each",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="where the shards are written; must not hold any yet",
    )
    parser.add_argument(
        "--vocab-size",
        type=positive,
        default=4096,
        metavar="N",
        help="train a byte-level BPE of at most N tokens (default: 4096)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="use this model folder's (or GGUF file's) tokenizer instead of training one",
    )
    parser.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="name of the text in JSON lines and Parquet (default: text)",
    )
    parser.add_argument(
        "--held-out",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="share of documents kept for evaluation (default: 0.01; at least one document)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=positive,
        default=50_000_000,
        metavar="N",
        help="tokens in one shard (default: 50 million)",
    )


def _doctor(parser: Parser) -> None:
    del parser


# One line a verb: name, what it does, how its words are read, an example.
VERBS: tuple[tuple[str, str, Callable[[Parser], None], str], ...] = (
    ("run", "plan, qualify, place, train, evaluate and report one recipe; run again to resume", _run, "bascule run runs/demo.toml"),
    ("demo", "the demonstration: the shipped recipe runs/demo.toml, start to finish", _demo, "bascule demo"),
    ("plan", "what would it cost: memory, time, energy, money, failures, and the price of a preference", _plan, "bascule plan runs/demo.toml"),
    ("qualify", "examine accelerators and say fit, unfit or unproven for training and for inference", _qualify, "bascule qualify cpu sim:backward-wrong"),
    ("evaluate", "held-out problems with exact verifiers: pass@1, pass@k, maj@k, greedy; bits per byte where text was read", _evaluate, "bascule evaluate out/demo"),
    ("serve", "an OpenAI-compatible server and a chat page for a finished run", _serve, "bascule serve out/demo --port 8000"),
    ("export", "a finished run as a Hugging Face folder (and GGUF) that other engines load, held against transformers", _export, "bascule export out/demo --gguf"),
    ("verify-answer", "was a stamped answer really written by this run's model; checked on any chip", _verify_answer, "bascule verify-answer answer.json --run out/demo --on cpu"),
    ("chat", "talk to a finished run's model in the terminal", _chat, 'bascule chat out/demo "7+8-3=?"'),
    ("report", "write report.html and say what happened in a run", _report, "bascule report out/demo"),
    ("drill", "rehearse a fault of the catalogue on your own pools, in a folder of its own; what was seen, when, by whom, what it cost", _drill, "bascule drill runs/tiny.toml --fault zeroed:low --at-step 20"),
    ("faults", "the catalogue of faults that a drill can plant, and who must see them", _faults, "bascule faults bit-rot"),
    ("replay", "compute an incident's suspicious step again, on any accelerator", _replay, "bascule replay out/demo/incidents/0001-step-310 --on cpu"),
    ("compare-runs", "did two groups of training runs learn the same: equal, different, or too few runs to know", _compare_runs, "bascule compare-runs out/a out/b --against logs/"),
    ("blame", "name the guilty ranks from PyTorch Flight Recorder dumps", _blame, "bascule blame dumps/"),
    ("tokenize", "text files into packed, checksummed shards for the pretrain phase, with a tokenizer trained on them or given", _tokenize, "bascule tokenize docs/ --out data/docs --vocab-size 2048"),
    ("doctor", "what this machine can run, and what is missing", _doctor, "bascule doctor"),
)  # fmt: skip
