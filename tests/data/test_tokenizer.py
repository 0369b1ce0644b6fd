"""The closed vocabulary: same ids as transformers, nothing lost, nothing silently dropped."""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.data import chat
from bascule.data.tokenizer import CHARACTERS, CONTROL, TAGS, Tokenizer
from bascule.errors import UsageError

TOKENIZER = Tokenizer()
TEXT = st.lists(
    st.sampled_from([*CHARACTERS, *CONTROL, *TAGS, "<", "</", "think>"]), max_size=60
).map("".join)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_vocabulary_is_small_and_ids_are_consecutive():
    assert 64 <= TOKENIZER.vocab_size <= 128
    assert TOKENIZER.encode("".join(TOKENIZER.symbols)) == list(range(TOKENIZER.vocab_size))


def test_special_ids_are_what_their_names_say():
    named = [
        TOKENIZER.pad_id,
        TOKENIZER.bos_id,
        TOKENIZER.eos_id,
        TOKENIZER.think_open_id,
        TOKENIZER.think_close_id,
    ]
    assert named == TOKENIZER.encode("<pad><bos><eos><think></think>")
    assert len(set(named)) == 5


@given(TEXT)
@settings(max_examples=200, deadline=None)
def test_transformers_gives_the_same_ids_and_the_same_text(hugging_face, text):
    ids = TOKENIZER.encode(text)
    assert hugging_face.encode(text, add_special_tokens=False) == ids
    loud = "".join(TOKENIZER.symbols[i] for i in ids)
    assert hugging_face.decode(ids, skip_special_tokens=False) == loud == text


def test_transformers_has_the_same_special_tokens(hugging_face):
    assert (hugging_face.pad_token_id, hugging_face.bos_token_id, hugging_face.eos_token_id) == (
        TOKENIZER.pad_id,
        TOKENIZER.bos_id,
        TOKENIZER.eos_id,
    )


def test_transformers_keeps_the_thought_when_it_skips_special_tokens(hugging_face):
    ids = TOKENIZER.encode("<think>1+1=2</think>2<eos><pad>")
    assert (
        hugging_face.decode(ids, skip_special_tokens=True)
        == TOKENIZER.decode(ids)
        == "<think>1+1=2</think>2"
    )


@pytest.mark.parametrize("generation", [True, False])
def test_the_chat_template_renders_what_render_renders(hugging_face, generation):
    messages = [
        {"role": "system", "content": " Be brief."},
        {"role": "user", "content": "1+1=?\n"},
        {"role": "assistant", "content": "<think>1+1=2</think> 2"},
        {"role": "user", "content": "3-1=?"},
    ]
    theirs = hugging_face.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation
    )
    assert theirs == chat.render(messages, add_generation_prompt=generation)


def test_an_unknown_character_is_refused_by_name():
    with pytest.raises(UsageError, match="'é'"):
        TOKENIZER.encode("café")


def test_an_unknown_character_becomes_unk_only_when_asked():
    assert TOKENIZER.encode("é1", replace_unknown=True) == [
        TOKENIZER.unk_id,
        *TOKENIZER.encode("1"),
    ]


def test_saving_and_loading_keeps_every_id(tmp_path):
    TOKENIZER.save(tmp_path)
    assert Tokenizer.load(tmp_path).symbols == TOKENIZER.symbols
    assert (tmp_path / "tokenizer_config.json").exists()


def test_a_foreign_or_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}}})
    )
    with pytest.raises(UsageError, match="BPE"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        Tokenizer.load(tmp_path)


def test_encoding_256_completions_takes_milliseconds():
    text = "<think>9-8=1,1+0=1,1+7=8</think>8<eos>"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(256):
            TOKENIZER.encode(text)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02
