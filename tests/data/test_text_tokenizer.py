"""Foreign vocabularies: a template that opens the thought, one that does not, none at all, and files that are no tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.data import chat, documents
from bascule.data.text_tokenizer import NO_TOKEN, TextTokenizer, open_or_own, open_tokenizer
from bascule.data.tokenizer import Tokenizer
from bascule.errors import UsageError
from bascule.stages.course import course
from bascule.train import rewards


def made(**settings: object) -> TextTokenizer:
    base = documents.train_tokenizer(["9-8=1,1+0=1 the user asks"] * 3, 300)
    return TextTokenizer(base.backend, {**base.settings, **settings}, source="test")


BYTES = made()
R1 = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{{ '<assistant><think>\n' }}"


def recipe():
    from bascule.config.load import recipe_from

    raw = {
        "name": "x", "pools": {"a": {"accelerator": "cpu"}},
        "data": {"train_problems": 16, "eval_problems": 4},
    }  # fmt: skip
    return recipe_from(raw, source="test")


def test_a_template_that_opens_the_thought_is_completed_for_learning_and_for_verifying() -> None:
    tokenizer = made(chat_template=R1)
    assert tokenizer.opens_thought
    found = course(recipe(), tokenizer)
    prompt, completion = found.examples(0)[0]
    assert tokenizer.decode(prompt).endswith("<think>\n")
    assert not tokenizer.decode(completion).startswith("<think>")
    reward = rewards.verifier(found.train, tokenizer)
    assert reward([0], [completion]) == [1.0]


def test_without_a_template_plain_words_are_used() -> None:
    tokenizer = made(chat_template=None)
    assert tokenizer.prompt("1+2=?") == "User: 1+2=?\nAssistant: "
    assert not tokenizer.opens_thought


def test_a_template_that_refuses_says_so() -> None:
    tokenizer = made(chat_template="{{ raise_exception('system messages are not supported') }}")
    with pytest.raises(UsageError, match="not supported"):
        tokenizer.prompt("hi")


def test_the_template_cannot_reach_python() -> None:
    tokenizer = made(chat_template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(UsageError, match="chat template"):
        tokenizer.prompt("hi")


def test_no_end_token_is_refused_and_missing_marks_equal_no_token() -> None:
    with pytest.raises(UsageError, match="eos_token"):
        made(eos_token="<nowhere>")
    assert made(unk_token=None).unk_id == NO_TOKEN


def test_save_and_open_give_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = made(eos_token={"content": chat.EOS})
    tokenizer.save(tmp_path)
    again = open_tokenizer(tmp_path)
    assert isinstance(again, TextTokenizer) and again.digest() == tokenizer.digest()
    assert again.eos_id == tokenizer.eos_id and again.prompt("hi") == tokenizer.prompt("hi")


def test_our_own_vocabulary_opens_as_what_it_is(tmp_path: Path) -> None:
    assert type(open_or_own(tmp_path)) is Tokenizer
    Tokenizer().save(tmp_path)
    assert type(open_tokenizer(tmp_path)) is Tokenizer
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="damaged"):
        open_tokenizer(tmp_path)


@given(st.text(max_size=40))
def test_pieces_joined_are_the_text_and_no_half_character_is_ever_shown(text: str) -> None:
    tokenizer = BYTES
    speller = tokenizer.speller()
    ids = tokenizer.encode(text)
    pieces = [*map(speller.feed, ids), speller.close()]
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_bytes_that_never_become_a_character_are_shown_and_not_kept_for_ever() -> None:
    tokenizer = BYTES
    (half,) = {
        token for token in range(tokenizer.vocab_size) if tokenizer.bytes_of(token) == b"\xe4"
    }
    (plain,) = tokenizer.encode("a")
    speller = tokenizer.speller()
    assert [speller.feed(half), speller.feed(plain), speller.feed(half), speller.close()] == [
        "",
        "\ufffda",
        "",
        "\ufffd",
    ]


@given(st.text(max_size=20))
def test_bytes_of_tokens_joined_are_the_utf8_of_the_text(text: str) -> None:
    tokenizer = BYTES
    assert b"".join(map(tokenizer.bytes_of, tokenizer.encode(text))).decode(
        errors="replace"
    ) == tokenizer.decode(tokenizer.encode(text))
