from __future__ import annotations

import json
from pathlib import Path

import pytest

from bascule.data import conversations
from bascule.data.tokenizer import Tokenizer
from bascule.errors import RecipeError

TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "2+3=?"},
    {"role": "assistant", "content": "<think>2+3=5</think>5"},
    {"role": "user", "content": "And 4 more?"},
    {"role": "assistant", "content": "<think>5+4=9</think>9"},
]


def written(folder: Path, *lines: object) -> Path:
    path = folder / "chat.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_every_assistant_turn_is_learnt_after_the_conversation_that_led_to_it(
    tmp_path: Path,
) -> None:
    tokenizer = Tokenizer()
    found, left_out = conversations.examples(written(tmp_path, {"messages": TALK}), tokenizer, 999)
    assert not left_out
    spelled = [
        ("".join(tokenizer.symbols[i] for i in read), tokenizer.decode(said))
        for read, said in found
    ]
    assert spelled == [
        ("<bos><system>Be short.<user>2+3=?<assistant>", "<think>2+3=5</think>5"),
        ("<bos><system>Be short.<user>2+3=?<assistant>5<eos><user>And 4 more?<assistant>", "<think>5+4=9</think>9"),
    ]  # fmt: skip
    assert all(said[-1] == tokenizer.eos_id for _, said in found)


def test_what_does_not_fit_is_left_out_and_counted(tmp_path: Path) -> None:
    found, left_out = conversations.examples(written(tmp_path, {"messages": TALK}), Tokenizer(), 40)
    assert len(found) == 1
    assert left_out == {"responses beyond model.max_position_embeddings = 40": 1}


def test_what_teaches_nothing_is_counted_by_its_reason(tmp_path: Path) -> None:
    asked, silent = TALK[1], {"role": "assistant", "content": " "}
    lines = [{"messages": TALK}, {"messages": [asked]}, {"messages": [TALK[2], asked]}, {"messages": []}, {"messages": [asked, silent]}]  # fmt: skip
    found, left_out = conversations.examples(written(tmp_path, *lines), Tokenizer(), 999)
    assert len(found) == 2
    assert left_out == {conversations.NO_TURN: 3, conversations.EMPTY: 1}


def test_tool_calls_beside_a_text_are_counted(tmp_path: Path) -> None:
    called = {**TALK[2], "tool_calls": [{"id": "1"}]}
    found, left_out = conversations.examples(written(tmp_path, {"messages": [TALK[1], called]}), Tokenizer(), 999)  # fmt: skip
    assert len(found) == 1 and left_out == {conversations.TOOLS: 1}


def test_a_line_ends_where_its_json_ends(tmp_path: Path) -> None:
    """Windows' marks and ends of lines, and a line separator inside a string, which json.dumps(ensure_ascii=False) leaves there."""
    path = tmp_path / "chat.jsonl"
    talk = [
        {"role": "user", "content": "2+3=?\u2028"},
        {"role": "assistant", "content": "<think></think>5"},
    ]
    path.write_bytes(
        ("\ufeff" + json.dumps({"messages": talk}, ensure_ascii=False) + "\r\n").encode()
    )
    assert len(conversations.examples(path, Tokenizer(), 999)[0]) == 1


@pytest.mark.parametrize(
    "line", [{"text": "no"}, {"messages": "no"}, {"messages": [{"role": "user"}]}, 3, {"messages": [{"role": "robot", "content": "x"}, *TALK]}]
)  # fmt: skip
def test_a_line_that_is_no_conversation_is_named(tmp_path: Path, line: object) -> None:
    with pytest.raises(RecipeError, match="line 2"):
        conversations.examples(written(tmp_path, {"messages": TALK}, line), Tokenizer(), 999)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        conversations.examples(tmp_path / "none.jsonl", Tokenizer(), 999)
