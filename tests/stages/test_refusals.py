"""What a verb refuses before it starts, in a sentence instead of a traceback."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bascule.cli import main
from bascule.errors import UsageError
from bascule.stages import chat, replay, serve


@pytest.mark.parametrize("empty", ["", " ", "\n"], ids=repr)
def test_an_empty_api_key_in_the_environment_is_no_open_door(
    monkeypatch: pytest.MonkeyPatch, empty: str
) -> None:
    monkeypatch.setenv("BASCULE_API_KEY", empty)
    with pytest.raises(UsageError, match="BASCULE_API_KEY is empty"):
        serve._api_key(None)
    monkeypatch.setenv("BASCULE_API_KEY", "secret")
    assert serve._api_key(None) == "secret"
    monkeypatch.delenv("BASCULE_API_KEY")
    assert serve._api_key(None) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b"\xff\xf0\n", "printable ASCII"), (b"one\ntwo\n", "one key"), (None, "cannot be read")],
)  # fmt: skip
def test_a_key_file_that_holds_no_key_is_refused_in_words(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        serve._api_key(str(file))
    file.write_bytes(b" secret \r\n")
    assert serve._api_key(str(file)) == "secret"


@pytest.mark.parametrize("place", ["/x", "/", "."])
def test_replay_of_a_folder_that_is_no_incident_is_refused(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"holds no incident\.json"):
        replay.main(Namespace(incident=place, on="cpu"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cpu", "--preset", "nanu"], "Did you mean 'nano'?"),
        (["cpu", "mars"], "'mars' is not an accelerator"),
        (["cpu", "--time-limit", "0"], "is not a number above 0"),
    ],
)
def test_qualify_refuses_a_slip_before_the_first_chip_is_examined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["qualify", *words, "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--train", "8 x H100, 1T tokens", "--train", "8 x B200, 1T tokens"], "keep one of them"),
        (["--model", "", "--train", "8 x H100, 1T tokens"], "--model: is blank"),
    ],
)
def test_a_question_that_would_go_unheard_is_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["plan", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_run_folder_that_is_not_there_is_said_to_the_planner(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "runs/tiny.toml", "--chips", "out/nowhere"]) == 2
    assert "'out/nowhere' is not there" in capsys.readouterr().err


def test_a_fault_is_described_in_words_and_knobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["faults", "bit-rot"]) == 0
    said = capsys.readouterr().out
    assert "  bit_rot: rate 0.01, min_elements 1\n" in said and "{" not in said


@pytest.mark.parametrize(
    ("spoken", "noted"), [("<think>1+1", True), ("<think>1+1</think>2", False)]
)
def test_chat_says_when_all_was_thought(
    capsys: pytest.CaptureFixture[str], spoken: str, noted: bool
) -> None:
    tokenizer = SimpleNamespace(
        render=str,
        encode=list,
        opens_thought=False,
        speller=lambda: SimpleNamespace(feed=str, close=str),
    )
    engine = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(max_position_embeddings=99)),
        stream=lambda prompt, sampling: ((letter, 0.0) for letter in spoken),
    )
    run: Any = SimpleNamespace(tokenizer=tokenizer, engine=engine)
    chat._ask(run, [], Namespace(temperature=0.0, seed=0), show=True)
    assert ("never came to an answer" in capsys.readouterr().err) == noted


def test_a_stamped_answer_that_is_not_there_is_named_before_the_model_is_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify-answer", str(tmp_path / "a.json"), "--run", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "a.json' cannot be read (No such file or directory). Give the file that holds" in said
