"""The thought and the answer: told apart in whole texts and in streams cut anywhere."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bascule.data import chat
from bascule.errors import UsageError

PIECES = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<", ">", "/", "think", "1+1=2", " ", "\n", "<thin", "a"]
    ),
    max_size=12,
)


def test_a_prompt_ends_where_the_answer_begins():
    assert chat.prompt("1+1=?") == "<bos><user>1+1=?<assistant>"


def test_earlier_thoughts_are_left_out_of_the_history():
    text = chat.render(
        [
            {"role": "assistant", "content": "<think>long</think>2"},
            {"role": "user", "content": "and?"},
        ]
    )
    assert text == "<bos><assistant>2<eos><user>and?<assistant>"


def test_an_unknown_role_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="Did you mean 'user'"):
        chat.render([{"role": "users", "content": "x"}])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think>b", ("a", "b")),
        ("<think>\na\n</think>\n\nb", ("a", "b")),
        ("a</think>b", ("a", "b")),
        ("<think>cut off", ("cut off", "")),
        ("<think>cut off</thi", ("cut off</thi", "")),
        ("no tags", ("", "no tags")),
        ("<think></think>b", ("", "b")),
        ("<think>a</think>b</think>c", ("a", "bc")),
        ("", ("", "")),
    ],
)
def test_split_reasoning_survives_missing_and_cut_tags(text, expected):
    assert chat.split_reasoning(text) == expected


@example(pieces=["<", "think", "<think>", ">"], cuts=[])
@given(PIECES, st.lists(st.integers(0, 60), max_size=8))
def test_a_stream_cut_anywhere_says_what_the_whole_text_says(pieces, cuts):
    text = "<think>" + "".join(pieces)
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    splitter = chat.ReasoningSplitter()
    deltas = [splitter.feed(text[a:b]) for a, b in zip(borders, borders[1:], strict=False)] + [
        splitter.close()
    ]
    thought, answer = ("".join(side) for side in zip(*deltas, strict=True))
    assert (thought.strip(), answer.strip()) == chat.split_reasoning(text)
    # Exactly the text's tags are gone. What stood around one may join into a new one ("<think" "<think>" ">"): that is text.
    assert len(thought) + len(answer) == len(re.sub("</?think>", "", text))


def test_a_stream_shows_text_as_soon_as_it_cannot_be_a_tag():
    splitter = chat.ReasoningSplitter()
    assert splitter.feed("<thi") == ("", "")
    assert splitter.feed("nk>1<2") == ("1<2", "")
    assert splitter.feed("3</") == ("3", "")
    assert splitter.feed("think>5") == ("", "5")
    assert splitter.close() == ("", "")


def test_a_stream_whose_prompt_opened_the_thought_starts_inside_it():
    assert chat.ReasoningSplitter(opened=True).feed("a</think>b") == ("a", "b")


@pytest.mark.parametrize(
    "text",
    [
        "8",
        "<think>1</think>",
        "<think>1",
        "<think>1</think>8</think>",
        "x<think>1</think>8",
        "<think><think>1</think>8",
    ],
)
def test_the_strict_format_refuses_everything_but_one_thought_and_an_answer(text):
    assert chat.parse_strict(text) is None


def test_the_strict_format_accepts_an_empty_thought():
    assert chat.parse_strict(chat.completion("", "8")) == ("", "8")
