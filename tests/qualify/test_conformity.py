"""PyTorch's operator database, CPU against CPU: nothing is blamed beyond the list, the list gives reasons, and a cut-off battery goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch.testing._internal.common_methods_invocations import op_db

from bascule.accelerators.registry import open_accelerator
from bascule.config.model import ModelConfig
from bascule.qualify import examine
from bascule.qualify.check import CHECKS, Ask
from bascule.qualify.checks import conformity
from bascule.qualify.context import CheckContext
from bascule.records import Evidence

CHECK = next(check for check in CHECKS if check.name == "conformity.opinfo")


def context(folder: Path, accelerator: str = "cpu") -> CheckContext:
    opened = open_accelerator(accelerator)
    opened.prepare(1)
    return examine.open_context(
        opened, ModelConfig(preset="tick"), quick=True, seed=0, workdir=folder
    )


@pytest.fixture
def a_few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Six entries of the database, in both types; their names."""
    entries = [
        one
        for one in conformity._entries()
        if one[0].split()[0] in ("softmax", "mm", "exp", "tanh", "sum", "sigmoid")
    ]
    monkeypatch.setattr(conformity, "_entries", lambda: entries)
    return [name for name, _, _ in entries]


def test_a_battery_that_was_cut_off_goes_on_where_it_was(
    a_few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = context(tmp_path)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    cut.progress = stop
    with pytest.raises(KeyboardInterrupt):
        examine.put(cut, Ask(CHECK, "train"))
    with open(tmp_path / "conformity.jsonl", "a", encoding="utf-8") as file:
        file.write('["torn')
    asked: list[str] = []
    of_entry = conformity._of_entry

    def counted(entry: object, dtype: object) -> object:
        asked.append(f"{entry.name} {dtype}".replace("torch.", ""))  # type: ignore[attr-defined]
        return of_entry(entry, dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(conformity, "_of_entry", counted)
    again = context(tmp_path)
    again.resume = True
    (found,) = examine.put(again, Ask(CHECK, "train"))
    assert asked == a_few[4:]
    assert found.outcome == "pass" and found == _without_time(found, whole(tmp_path / "whole"))
    asked.clear()
    (third,) = examine.put(again, Ask(CHECK, "train"))
    assert asked == [] and third.outcome == "pass"


def whole(folder: Path) -> Evidence:
    return examine.put(context(folder), Ask(CHECK, "train"))[0]


def _without_time(like: Evidence, item: Evidence) -> Evidence:
    return item.model_copy(update={"seconds": like.seconds, "time_s": like.time_s})


def test_a_wrong_softmax_is_named(a_few: list[str], tmp_path: Path) -> None:
    (found,) = examine.put(context(tmp_path, "sim:softmax-0.99"), Ask(CHECK, "train"))
    assert found.outcome == "fail" and "softmax" in found.detail


def test_inputs_that_cannot_be_made_are_the_harness_limit_and_no_chips(
    a_few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ditorch's report on Ascend: random fill fails above a dimension limit, and operators were blamed for it."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("fill: at most 5 dimensions")

    for _, entry, _ in conformity._entries():
        if entry.name == "exp":
            monkeypatch.setattr(entry, "sample_inputs", refuse)
    (found,) = examine.put(context(tmp_path), Ask(CHECK, "train"))
    assert found.outcome == "pass" and found.measured["inputs_not_made"] == 2
    assert "inputs could not be made" in found.detail and "not the chip" in found.detail


def test_every_line_of_the_list_leaves_something_out_and_says_why() -> None:
    parts = {part for entry in op_db for part in re.split(r"[._]", entry.name)}
    listed = conformity.left_out()
    assert set(listed) - parts - {"log_normal"} == set()
    assert all(len(why.split()) > 2 for why in listed.values())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_cpu_conforms_to_itself_on_every_sample(tmp_path: Path) -> None:
    (found,) = examine.put(context(tmp_path), Ask(CHECK, "train"))
    assert found.measured["not_conforming"] == 0, found.detail
    assert int(found.measured["samples"] or 0) > 20_000
