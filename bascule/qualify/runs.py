"""Read training runs that others logged, refuse pairs that were not the same experiment, and say whether they learnt the same.

    MLPerf   `:::MLLOG` lines: `eval_accuracy` is the evaluation loss, `samples_count` its position; hyper-parameters are declared
    ledger   bascule's own `ledger.jsonl`: step statistics of pretrain and SFT, and the recipe
    JSONL    one object a line with a loss and a step; objects without a loss declare settings
    CSV      a header with a loss and a step column, or two bare columns `step loss`

A group is one or more runs: files, or folders of them. The figure of a run is its typical excess log loss in a late window: the
median, over the window's positions, of log loss minus the mean curve of all runs. A median, because public logs hold jumps of
several percent at single evaluations, and one of those must not decide. No torch.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bascule.errors import UsageError
from bascule.qualify import equivalence
from bascule.qualify.equivalence import Equivalence

# Public groups with equal declared settings fall into clusters about 0.2 % apart (tests/data/mlperf_llama31_8b.json), each cluster
# tight within 0.07 %; a margin of 0.5 % would call all of them equal. The value was chosen after looking at those logs, so what it
# says of them is in-sample (docs/log.md).
MARGIN = 0.0025
ALPHA_DIFFERENT = 0.05
WINDOW = 0.4  # the last part of the positions all runs share: late evaluations spread least (guard.md 6.2)
START_BAR = 0.01  # runs of one experiment start from the same loss; a generation of chips moves the first step by 0.01 %
SAME_SHARE = 1e-3  # positions this close, relative to the last one, are the same evaluation

_MARK = ":::MLLOG"
_STEP_NAMES = ("step", "global_step", "_step", "samples", "samples_count", "step_num", "tokens", "iteration", "iter", "epoch", "epoch_num", "position")  # fmt: skip
_LOSS_NAMES = ("loss", "eval_loss", "validation_loss", "val_loss", "train_loss", "lm_loss", "lm loss", "eval/loss", "val/loss", "train/loss")  # fmt: skip
_MLPERF_POSITIONS = ("samples_count", "step_num", "epoch_num", "epoch_count", "first_epoch_num")
_LOGS = (".txt", ".log", ".out", ".jsonl", ".csv", ".tsv")
EARLY_SHARE = 0.5  # a run that ends before this share of the others' length would move the window of all to the beginning
# Declared, but not what is trained: who ran it, on what, with which luck, how the batch was cut up, when it stopped.
_NOT_SETTINGS = ("seed", "submission_org", "submission_platform", "submission_division", "submission_status", "submission_poc_name",
                 "submission_poc_email", "gradient_accumulation_steps", "train_samples", "target_accuracy", "cache_clear",
                 "eval_accuracy", "tracked_stats", "max_steps", "name", "pools", "prefer", "threads", "strict", "guard", "qualify",
                 "serve", "evaluate", "recipe_sha256")  # fmt: skip
# Parts of names that say how a run was spread over machines or how fast it was, in submissions' own keys.
_NOT_TRAINED = ("parallel", "check_interval", "eval_interval", "eval_freq", "skip_evals", "extend_run", "start_time", "_path", "_dir", "container", "framework", "node", "world_size", "micro_batch", "minibatch", "throughput", "hostname", "elapsed", "gpus", "devices", "workers")  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One loss curve: positions (steps, samples or tokens) in rising order, losses, and what the run declared about itself."""

    source: str
    positions: NDArray[np.float64]
    losses: NDArray[np.float64]
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunComparison:
    """`refusal` is why the two groups cannot be compared; then there is no answer."""

    refusal: str | None
    result: Equivalence | None
    window: tuple[float, float] | None = None

    def data(self) -> dict[str, Any]:
        """For `--json`. `answer` is "refused" when there is none."""
        if self.result is None:
            return {"answer": "refused", "reason": self.refusal, "margin": None, "difference": None, "ci90": None, "power": None, "runs_needed": None}  # fmt: skip
        found = self.result
        return {
            "answer": found.answer,
            "margin": found.margin,
            "difference": found.difference,
            "ci90": [_finite(end) for end in found.ci90],
            "p_lower": found.p_lower,
            "p_upper": found.p_upper,
            "p_different": found.p_different,
            "power": found.power,
            "runs_needed": found.runs_needed,
            "runs": list(found.runs),
            "spread": _finite(found.spread),
            "window": list(self.window) if self.window else None,
        }

    def sentence(self) -> str:
        if self.result is None:
            return f"refused: {self.refusal}"
        assert self.window is not None
        return f"{self.result.sentence()}; positions {self.window[0]:g} to {self.window[1]:g}"


def _finite(value: float) -> float | None:
    """JSON has no infinity: a single run has no spread, so its interval has no ends."""
    return value if math.isfinite(value) else None


def compare_groups(a: Sequence[Run], b: Sequence[Run], *, margin: float = MARGIN) -> RunComparison:
    """Hold group A against group B. Never raises for runs that differ: that is a refusal, with its reason."""
    refusal = (
        _different_settings(a, b)
        or _different_start(a, b)
        or _ends_early(a)
        or _ends_early(b)
        or _twice(a)
        or _twice(b)
    )
    if refusal:
        return RunComparison(refusal, None)
    grid = shared_positions([*a, *b])
    if grid is None:
        return RunComparison(
            "the runs share no range of positions: they count other things or stop before the others begin",
            None,
        )
    late = grid[int(len(grid) * (1.0 - WINDOW)) :]
    curves = np.array([np.interp(late, run.positions, np.log(run.losses)) for run in (*a, *b)])
    figures = np.median(curves - curves.mean(0), axis=1)
    result = equivalence.compare(
        figures[: len(a)].tolist(),
        figures[len(a) :].tolist(),
        margin=margin,
        alpha_different=ALPHA_DIFFERENT,
    )
    return RunComparison(None, result, (float(late[0]), float(late[-1])))


def shared_positions(runs: Sequence[Run]) -> NDArray[np.float64] | None:
    """Positions of the coarsest run inside the range that every run covers. Runs that stop early at their goal end the range for
    all: what lies behind would be a choice of the slow ones."""
    first = max(float(run.positions[0]) for run in runs)
    last = min(float(run.positions[-1]) for run in runs)
    slack = SAME_SHARE * max(abs(last), 1.0)
    coarsest = min(runs, key=lambda run: len(run.positions)).positions
    grid = coarsest[(coarsest >= first - slack) & (coarsest <= last + slack)]
    return grid if len(grid) else None


def _different_settings(a: Sequence[Run], b: Sequence[Run]) -> str | None:
    """The first setting on which two runs that declare it disagree. A setting that one side does not declare proves nothing."""
    seen: dict[str, tuple[str, str]] = {}
    for run in (*a, *b):
        for name, value in run.settings.items():
            known, source = seen.setdefault(name, (value, run.source))
            if known != value:
                return f"they were not set up alike: {name} is {known} in {source} and {value} in {run.source}"
    return None


def _different_start(a: Sequence[Run], b: Sequence[Run]) -> str | None:
    """Runs logged from their very first step must start from one loss."""
    starts = [
        [math.log(run.losses[0]) for run in group if run.positions[0] <= 1] for group in (a, b)
    ]
    if not all(starts):
        return None
    x, y = (np.array(group) for group in starts)
    gap = abs(float(x.mean() - y.mean()))
    spread = max(float(group.std(ddof=1)) if len(group) > 1 else 0.0 for group in (x, y))
    if gap <= max(START_BAR, 3.0 * spread):
        return None
    return f"they do not start from the same model or data: the first loss differs by {100 * gap:.1f} %, allowed {100 * max(START_BAR, 3.0 * spread):.1f} %"


def _ends_early(group: Sequence[Run]) -> str | None:
    """The window lies where all runs are, so one run that was cut off would decide it."""
    usual = float(np.median([run.positions[-1] for run in group]))
    short = min(group, key=lambda run: float(run.positions[-1]))
    if short.positions[-1] >= EARLY_SHARE * usual:
        return None
    return f"{short.source} ends at position {short.positions[-1]:g}, the others of its group at about {usual:g}: leave it out and say so"


def _twice(group: Sequence[Run]) -> str | None:
    """A run that stands twice in a group shows no spread of its own."""
    seen: dict[bytes, str] = {}
    for run in group:
        known = seen.setdefault(run.positions.tobytes() + run.losses.tobytes(), run.source)
        if known is not run.source:
            return f"{known} and {run.source} are the same run, number by number: a copy, or one seed twice, tells nothing about the spread"
    return None


# --- reading ---------------------------------------------------------------------------------------------------------------


def read_group(paths: Iterable[Path], left_out: list[str] | None = None) -> list[Run]:
    """Runs of one group. A folder stands for every log inside it; a run folder of bascule for its ledger. Files of a folder without
    a single loss (a README, a machine's log) are no runs: their names go to `left_out`."""
    runs: list[Run] = []
    for path in paths:
        found = {file: _read(file) for file in _files(path)}
        if path.is_file() and found[path] is None:
            raise _no_series(path, 0)
        runs += [run for run in found.values() if run]
        if left_out is not None:
            left_out += [str(file) for file, run in found.items() if run is None]
    if not runs:
        raise UsageError("A group has no runs. Give result files, or folders that hold them.")
    return runs


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise UsageError(
            f"'{path}' does not exist. Give a log file (MLPerf result, JSONL, CSV), a folder of logs, or a run folder."
        )
    if path.is_file():
        return [path]
    if (path / "ledger.jsonl").exists():
        return [path / "ledger.jsonl"]
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and (file.name.removesuffix(".gz").endswith(_LOGS) or file.name.startswith("result"))
        and not file.name.startswith(".")
    ]
    if not found:
        raise UsageError(f"The folder '{path}' holds no {', '.join(_LOGS)} file, plain or .gz.")
    return found


def read_run(path: Path) -> Run:
    """Raises UsageError when the file holds no loss series, or losses that are not positive and finite."""
    run = _read(path)
    if run is None:
        raise _no_series(path, 0)
    return run


def _no_series(path: Path, count: int) -> UsageError:
    return UsageError(
        f"'{path}' holds {count} loss values; a loss series needs two. Known forms: MLPerf :::MLLOG with eval_accuracy, JSONL and CSV with a step and a loss."
    )


def _read(path: Path) -> Run | None:
    """None when there is not a single loss in the file."""
    text = _text(path)
    if _MARK in text:
        points, settings = _from_mlperf(text)
        _one_run(path, points)
    elif text.lstrip().startswith("{"):
        points, settings = _from_jsonl(text)
    else:
        points, settings = _from_table(text), {}
    points = sorted(dict(points).items())
    if not points:
        return None
    if len(points) < 2:
        raise _no_series(path, len(points))
    bad = next(
        (position for position, loss in points if not (math.isfinite(loss) and loss > 0)), None
    )
    if bad is not None:
        raise UsageError(
            f"'{path}' has a loss that is not a positive number at position {bad:g}: a diverged run cannot be averaged. Leave it out and say so."
        )
    positions, losses = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    return Run(f"{path.parent.name}/{path.name}", positions, losses, settings)


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"'{path}' is a damaged gzip file: {error}.") from None
    return raw.decode("utf-8-sig", errors="replace")


Points = list[tuple[float, float]]


def _one_run(path: Path, points: Points) -> None:
    """Several ranks may log the same evaluation, but not another loss at the same position."""
    seen: dict[float, float] = {}
    for position, loss in points:
        if abs(seen.setdefault(position, loss) - loss) > 1e-6 * abs(loss):
            raise UsageError(
                f"'{path}' holds two losses at position {position:g}, {seen[position]:g} and {loss:g}: several runs in one file, or several metrics. Give one file a run."
            )


def _from_mlperf(text: str) -> tuple[Points, dict[str, str]]:
    """Of several metrics (`metadata.metric`) the first by name is taken, and declared, so that both sides speak of the same one.
    Positions are samples where they are told; steps are turned into samples where the batch is declared."""
    found: list[tuple[str, str, float, float]] = []
    settings: dict[str, str] = {}
    for entry in _mlperf_entries(text):
        name, value = entry["key"], entry.get("value")
        if name in ("eval_accuracy", "eval_loss"):
            where = entry.get("metadata") or {}
            counted = next((key for key in _MLPERF_POSITIONS if _is_number(where.get(key))), None)
            if counted is not None and value is not None and _is_number(value):
                metric = str(where.get("metric", name))
                found.append((metric, counted, float(where[counted]), float(value)))
        elif entry.get("event_type", "POINT_IN_TIME") == "POINT_IN_TIME":
            _declare(settings, {name: value})
    metric = min((one[0] for one in found), default="")
    if len({one[0] for one in found}) > 1:
        settings["metric"] = metric
    batch = float(settings.get("global_batch_size", "nan"))
    points = []
    for of, counted, position, loss in found:
        in_samples = counted == "step_num" and math.isfinite(batch)
        if of == metric:
            points.append((position * batch if in_samples else position, loss))
    return points, settings


def _mlperf_entries(text: str) -> Iterator[dict[str, Any]]:
    """What stands after each mark; a launcher's prefix, and what another rank printed behind it on the same line, are passed over."""
    for line in text.splitlines():
        _, mark, body = line.partition(_MARK)
        if not mark:
            continue
        try:
            entry, _ = json.JSONDecoder().raw_decode(body.lstrip())
        except json.JSONDecodeError:
            continue  # a torn line of a log that others wrote
        if isinstance(entry, dict) and isinstance(entry.get("key"), str):
            yield entry


def _from_jsonl(text: str) -> tuple[Points, dict[str, str]]:
    points: Points = []
    settings: dict[str, str] = {}
    for number, line in enumerate(filter(str.strip, text.splitlines()), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # a torn last line
        if not isinstance(entry, dict):
            continue
        if (
            entry.get("kind", "step_stats") == "step_stats"
            and entry.get("phase")
            != "grpo"  # its loss is about 0 of either sign and says nothing of what was learnt
            and (loss := _first(entry, _LOSS_NAMES)) is not None
        ):
            step = _first(entry, _STEP_NAMES)
            points.append((float(number if step is None else step), float(loss)))
        elif entry.get("kind") == "recipe_resolved":
            _declare(settings, entry["recipe"])
        elif "kind" not in entry:
            _declare(settings, entry.get("config", entry))
    return points, settings


def _from_table(text: str) -> Points:
    """CSV, TSV or columns split by blanks; a header names the columns, without one they are step and loss."""
    lines = [
        line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    if not lines:
        return []
    separator = next((mark for mark in (",", "\t", ";") if mark in lines[0]), None)
    rows = (
        list(csv.reader(lines, delimiter=separator))
        if separator
        else [line.split() for line in lines]
    )
    header = [cell.strip().lower() for cell in rows[0]]
    place = _column(header, _LOSS_NAMES)
    if place is None:
        return [
            (float(row[0]), float(row[1]))
            for row in rows
            if len(row) >= 2 and _is_number(row[0]) and _is_number(row[1])
        ]
    at = _column(header, _STEP_NAMES)
    return [
        (float(row[at]) if at is not None else float(number), float(row[place]))
        for number, row in enumerate(rows[1:], start=1)
        if len(row) > place and _is_number(row[place])
    ]


def _column(header: Sequence[str], names: Sequence[str]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _first(entry: Mapping[str, Any], names: Sequence[str]) -> float | None:
    return next((entry[name] for name in names if isinstance(entry.get(name), (int, float))), None)


def _declare(settings: dict[str, str], declared: Mapping[str, Any]) -> None:
    """Numbers are compared as numbers: 1 and 1.0 are one setting."""
    for name, value in declared.items():
        if name in _NOT_SETTINGS or value is None or any(part in name for part in _NOT_TRAINED):
            continue
        if name.startswith("submission_") and name != "submission_benchmark":
            continue
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            settings[name] = f"{float(value):g}"
        else:
            settings[name] = json.dumps(value, sort_keys=True).lower()


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (ValueError, TypeError):
        return False
    return True
