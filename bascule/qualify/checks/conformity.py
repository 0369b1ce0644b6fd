"""PyTorch's own operator database against the chip, with our judge: what else would a changed model meet?

Each entry's samples run on the chip in fp32 and bf16 and are held against fp64 as this model's own calls are. Inputs are made on
the CPU, so a chip whose random fill fails is not blamed for it; what the CPU refuses is no question. Failures are clustered by what was
raised, or by operator where numbers are wrong. What no right chip can be held to is listed, with reasons, in opinfo_left_out.toml. Reported only: an operator the model never calls is no reason to refuse a chip.
What was answered is kept in `conformity.jsonl`, and a resumed battery goes on after it.
"""

from __future__ import annotations

import functools
import json
import re
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from bascule import numerics
from bascule.errors import DeviceFault
from bascule.qualify.context import CheckContext, Measured, describe
from bascule.qualify.hold import CPU, widest
from bascule.qualify.trace import transplant
from bascule.records import Evidence

DTYPES = (torch.float32, torch.bfloat16)
LEFT_OUT = files("bascule.qualify.checks").joinpath("opinfo_left_out.toml")


UNMADE = "inputs could not be made"


class InputsNotMade(Exception):
    """The database cannot make an entry's inputs here: the harness's limit, and no chip's."""


def opinfo(context: CheckContext) -> list[Evidence]:
    asked, unmade = 0, list[str]()
    clusters: Counter[str] = Counter()
    example: dict[str, str] = {}
    for name, troubles in _answers(context):
        if troubles and (troubles[0] or "").startswith(UNMADE):
            unmade.append(name)
            continue
        asked += len(troubles)
        for trouble in filter(None, troubles):
            clusters[trouble.partition(":")[0] if trouble.startswith("raised") else name] += 1
            example.setdefault(name, trouble)
    words = f"{asked} samples, {sum(clusters.values())} not conforming in {len(clusters)} clusters ({len(left_out())} kinds of operator listed as not to be judged)"
    if clusters:
        words += "; largest: " + ", ".join(
            f"{name} {count}" for name, count in clusters.most_common(5)
        )
        first = next(iter(example.items()))
        words += f"; for instance {first[0]}: {first[1]}"
    if unmade:
        words += f"; inputs could not be made for {len(unmade)} ({', '.join(unmade[:3])}): our harness, not the chip"
    measured: Measured = {
        "samples": asked,
        "inputs_not_made": len(unmade),
        "not_conforming": sum(clusters.values()),
        "clusters": len(clusters),
    }
    if clusters:
        return [context.failed(words, measured)]
    return [context.passed(words, measured)]


def _answers(context: CheckContext) -> Iterator[tuple[str, list[str | None]]]:
    """(operator and type, what is wrong with each of its samples or None), from the file as far as it goes."""
    kept = context.workdir / "conformity.jsonl"
    lines = kept.read_text().split("\n")[:-1] if context.resume and kept.exists() else []
    known: dict[str, list[str | None]] = dict(json.loads(line) for line in lines)
    entries = _entries()
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(kept, "w", encoding="utf-8") as file:
        # Written anew, because the last line may be torn.
        file.writelines(json.dumps([name, troubles]) + "\n" for name, troubles in known.items())
        file.flush()
        for place, (name, entry, dtype) in enumerate(entries):
            context.progress(place, len(entries))
            if name not in known:
                known[name] = _troubles(context, entry, dtype)
                file.write(json.dumps([name, known[name]]) + "\n")
                file.flush()
            yield name, known[name]


def _troubles(context: CheckContext, entry: Any, dtype: torch.dtype) -> list[str | None]:
    try:
        return [_trouble(context, *question) for question in _of_entry(entry, dtype)]
    except InputsNotMade as error:
        return [f"{UNMADE}: {error}"]


def _trouble(
    context: CheckContext, function: Any, inputs: Any, exact: list[Tensor], plain: list[Tensor]
) -> str | None:
    placed = _on(inputs, context.accelerator.device, None)
    try:
        with context.session(context.work()), torch.no_grad():
            got = [value.to(CPU) for value in _floats(_call(function, placed))]
            context.accelerator.synchronize()
    except (RuntimeError, DeviceFault) as error:
        return f"raised {describe(error)}"
    for answer, right, usual in zip(got, exact, plain, strict=False):
        if answer.shape != right.shape:
            return f"shape {tuple(answer.shape)}, expected {tuple(right.shape)}"
        floor = widest(numerics.rounding_floor(right, usual.dtype), numerics.compare(usual, right))
        why = numerics.verdict(numerics.compare(answer, right), floor, usual.dtype)
        if why:
            return why
    return None


# Function, inputs, fp64 answers, answers at the sample's own type.
Question = tuple[Any, Any, list[Tensor], list[Tensor]]


def _entries() -> list[tuple[str, Any, torch.dtype]]:
    """(name, entry of the database, type); only what the CPU can answer in fp64 too."""
    # A private module of PyTorch's test-suite: there is no public list of operators with sample inputs.
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"PyTorch's operator database needs '{error.name}': pip install {error.name}"
        ) from None

    hard = left_out().keys()
    named: dict[str, tuple[str, Any, torch.dtype]] = {}
    for entry in op_db:
        if hard & set(re.split(r"[._]", entry.name)) or not entry.supports_dtype(
            torch.float64, "cpu"
        ):
            continue
        for dtype in DTYPES:
            if entry.supports_dtype(dtype, "cpu"):
                variant = f".{entry.variant_test_name}" if entry.variant_test_name else ""
                name = f"{entry.name}{variant} {str(dtype).removeprefix('torch.')}"
                named[name] = name, entry, dtype
    return list(named.values())


@functools.cache
def left_out() -> dict[str, str]:
    """Part of an operator's name -> why it is not judged."""
    tables = tomllib.loads(LEFT_OUT.read_text(encoding="utf-8"))
    return {part: f"{kind}: {why}" for kind, rows in tables.items() for part, why in rows.items()}


def _of_entry(entry: Any, dtype: torch.dtype) -> Iterator[Question]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            samples = list(entry.sample_inputs("cpu", dtype))
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise InputsNotMade(describe(error)) from error
        for sample in samples:
            inputs = ((sample.input, *sample.args), dict(sample.kwargs))
            if not _dense(inputs):
                continue
            try:
                with torch.no_grad():
                    exact = _floats(_call(entry.op, _on(inputs, CPU, torch.float64)))
                    plain = _floats(_call(entry.op, _on(inputs, CPU, None)))
            except (RuntimeError, ValueError, TypeError, IndexError):
                continue  # the reference refuses it
            if plain and [value.shape for value in plain] == [value.shape for value in exact]:
                yield entry.op, inputs, exact, plain


def _dense(inputs: Any) -> bool:
    """Sparse and nested tensors have no strides to keep, and no dense model asks for them."""
    return all(
        leaf.layout is torch.strided for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)
    )


def _call(function: Any, inputs: Any) -> Any:
    args, kwargs = inputs
    return function(*args, **kwargs)


def _on(inputs: Any, device: torch.device, wide: torch.dtype | None) -> Any:
    """Fresh copies there; float tensors as `wide` if given."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return transplant(leaf, device, wide if leaf.is_floating_point() else None)
        if isinstance(leaf, torch.device):
            return device
        return wide if wide and leaf in DTYPES else leaf

    return tree_map(move, inputs)


def _floats(out: Any) -> list[Tensor]:
    """The floating results; whole numbers and booleans next to rounding decisions are not judged here."""
    return [
        leaf.detach()
        for leaf in tree_flatten(out)[0]
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.layout is torch.strided
    ]
