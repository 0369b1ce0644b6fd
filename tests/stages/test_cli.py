"""The command line: fast help, exit codes, refusals in one sentence, JSON on stdout alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bascule.cli import main
from bascule.config.load import load_recipe
from bascule.records import RunFinished, RunStarted
from bascule.verbs import VERBS

RECIPE = '[pools.here]\naccelerator = "cpu"\n'


def bascule(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bascule.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


Here = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    """`bascule` in this process, where torch is imported already: for refusals that need no process of their own."""

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = main(list(arguments))
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, said.out, said.err)

    return ask


def test_help_answers_in_under_half_a_second_without_torch() -> None:
    before = os.times()
    done = bascule("--help")
    after = os.times()
    assert done.returncode == 0 and "qualify" in done.stdout
    # the child's processor time: what the wall clock says depends on the neighbours
    used_s = (
        after.children_user - before.children_user + after.children_system - before.children_system
    )
    assert used_s < 0.5
    code = "import sys, bascule.cli; bascule.cli.build_parser(); sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("verb", [name for name, *_ in VERBS])
def test_every_verb_has_help_with_an_example_and_the_exit_codes(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"example: bascule {verb}" in text and "75 preempted" in text and "--json" in text


def test_an_unknown_verb_is_a_usage_error_with_the_nearest_name() -> None:
    done = bascule("serv")
    assert done.returncode == 2 and "Did you mean 'serve'?" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["report"],
        ["qualify", "cpu", "--seed", "x"],
        ["run", "a", "b"],
        ["tarin"],
        ["drill", "r.toml", "--fault", "zeroed", "--at-step", "-3"],
        ["chat", "r", "--temperature", "nan"],
    ],
)
def test_wrong_words_are_refused_in_one_line_and_with_json_in_one_object(
    here: Here, words: list[str]
) -> None:
    done = here(*words, "--json")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert json.loads(done.stdout)["error"]["type"] == "UsageError"


def test_no_words_at_all_show_where_to_begin() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bascule"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "bascule doctor" in done.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RECIPE + "[sft]\nstep = 1\n", "Did you mean 'steps'?"),
        (RECIPE.replace("cpu", "sim:ascend-r3"), "ascend-r2"),
        (RECIPE.replace("cpu", "gpu"), "is not an accelerator"),
    ],
)
def test_a_bad_recipe_ends_with_2_and_says_the_right_name(
    here: Here, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "r.toml").write_text(text)
    done = here("run", str(tmp_path / "r.toml"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and words in done.stderr


def test_a_refusal_with_json_is_one_object_on_stdout(tmp_path: Path) -> None:
    done = bascule("run", str(tmp_path / "none.toml"), "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["exit_code"] == 2


def test_a_changed_recipe_under_a_half_finished_run_is_refused(here: Here, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    folder = tmp_path / "out" / "r"
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(load_recipe(recipe).model_dump_json())
    done = here("run", str(recipe), "--out", str(tmp_path / "out"), "--set", "sft.steps=3")
    assert done.returncode == 2
    assert "sft.steps was 800, now 3" in done.stderr and "--name" in done.stderr


def test_a_finished_run_says_so_and_exits_0(here: Here, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    folder = tmp_path / "out" / "r"
    folder.mkdir(parents=True)
    lines = [
        RunStarted(name="r", version="1", machine="m"),
        RunFinished(final_weights_sha256="0", steps=1, wall_s=1.0),
    ]
    (folder / "ledger.jsonl").write_text("".join(line.model_dump_json() + "\n" for line in lines))
    done = here("run", str(recipe), "--out", str(tmp_path / "out"))
    assert done.returncode == 0 and "already finished" in done.stdout


def test_two_supervisors_cannot_share_a_run_folder(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    (tmp_path / "out" / "r").mkdir(parents=True)
    hold = f"import fcntl, sys, time; f = open({str(tmp_path / 'out' / 'r' / 'lock')!r}, 'a+'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(30)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        done = bascule("run", str(recipe), "--out", str(tmp_path / "out"))
    finally:
        holder.kill()
        holder.wait()
    assert done.returncode == 2 and "in use" in done.stderr


def test_a_run_folder_that_is_none_is_refused(here: Here, tmp_path: Path) -> None:
    for verb in ("report", "evaluate", "serve", "chat", "export"):
        done = here(verb, str(tmp_path))
        assert done.returncode == 2 and "not a run folder" in done.stderr, verb


@pytest.mark.parametrize(
    ("arguments", "exit_code"), [(["faults"], 0), (["run", "nowhere.toml", "--json"], 2)]
)
def test_a_reader_that_has_gone_changes_neither_the_exit_code_nor_adds_a_traceback(
    arguments: list[str], exit_code: int
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "bascule.cli", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == exit_code and "Traceback" not in done.stderr
