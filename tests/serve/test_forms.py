"""Answers that must follow a form do, whatever the model would rather say. The model here is random: it never would by itself."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from existing import make_llama

from bascule.data.text_tokenizer import open_tokenizer
from bascule.data.tokenizer import Tokenizer
from bascule.errors import UsageError
from bascule.serve.grammar import Grammars, call_form, compile_form
from tests.serve.conftest import Server

ASK = [{"role": "user", "content": "1+2=?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "sum": {"type": "integer", "minimum": 0, "maximum": 99},
        "sure": {"type": "boolean"},
    },
    "required": ["sum", "sure"],
    "additionalProperties": False,
}
ADD = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def finished(server: Server, body: dict[str, object]) -> dict[str, object]:
    """The first of a few seeds whose answer ends: a random model may think until its room is used up."""
    for seed in range(20):
        status, answer = server.post(
            "/v1/chat/completions", {"model": "tiny", "messages": ASK, "seed": seed, **body}
        )
        assert status == 200, answer
        if answer["choices"][0]["finish_reason"] != "length":
            return dict(answer["choices"][0])
    raise AssertionError("no answer ended")


def test_a_json_schema_binds_the_answer(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}
    choice = finished(server, {"response_format": form})
    found = json.loads(choice["message"]["content"])  # type: ignore[index]
    assert (
        set(found) == {"sum", "sure"}
        and 0 <= found["sum"] <= 99
        and isinstance(found["sure"], bool)
    )


def test_a_regex_and_a_choice_bind_raw_completions(client: openai.OpenAI) -> None:
    for form, allowed in (
        ({"regex": "[0-9]{3}-[ab]"}, None),
        ({"choice": ["yes", "no"]}, ["yes", "no"]),
    ):
        reply = client.completions.create(
            model="tiny",
            prompt="1",
            max_tokens=20,
            seed=1,
            n=4,
            extra_body={"structured_outputs": form},
        )
        for choice in reply.choices:
            assert choice.finish_reason == "stop"
            assert (
                choice.text in allowed
                if allowed
                else (len(choice.text) == 5 and choice.text[:3].isdigit())
            )


def test_a_required_tool_is_called_with_arguments_that_fit(server: Server) -> None:
    choice = finished(server, {"tools": [ADD], "tool_choice": "required"})
    (call,) = choice["message"]["tool_calls"]  # type: ignore[index]
    assert choice["finish_reason"] == "tool_calls" and call["function"]["name"] == "add"
    assert set(json.loads(call["function"]["arguments"])) == {"sum", "sure"}


def test_a_streamed_call_comes_as_a_call_and_never_as_text(client: openai.OpenAI) -> None:
    for seed in range(20):
        chunks = list(
            client.chat.completions.create(
                model="tiny",
                messages=ASK,
                tools=[ADD],
                tool_choice="required",
                seed=seed,
                stream=True,
            )
        )  # type: ignore[list-item,call-overload]
        if chunks[-1].choices[0].finish_reason == "tool_calls":
            break
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert len(calls) == 1 and json.loads(calls[0].function.arguments)
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_a_conversation_with_a_tools_result_goes_on(server: Server) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]
    assert (
        server.post(
            "/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 3}
        )[0]
        == 200
    )


@pytest.mark.parametrize(
    "body",
    [
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "wat"}},
            }
        },
        {"response_format": {"type": "xml"}},
        {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "nobody"}}},
        {"tools": [ADD], "response_format": {"type": "json_object"}},
        {"tool_choice": "required"},
    ],
)
def test_forms_that_make_no_sense_are_refused(server: Server, body: dict[str, object]) -> None:
    status, answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": ASK, **body})
    assert status == 400 and answer["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_no_token_spells_is_an_error_and_never_another_answer(
    server: Server, stream: bool
) -> None:
    form = {"choice": ["no: \u65e5\u672c"]}
    body = {"model": "tiny", "prompt": "1", "structured_outputs": form, "stream": stream}
    status, answer = server.post("/v1/completions", {**body, "max_tokens": 40})
    told = answer if stream else answer["error"]["message"]
    assert status == (200 if stream else 400) and "cannot follow its form" in told
    assert not stream or "[DONE]" not in told
    assert "<state>" not in told, "what concerns the makers of the grammar library is left out"


def test_the_thought_is_free_and_the_answer_is_bound() -> None:
    tokenizer = Tokenizer()
    bound = Grammars(tokenizer, tokenizer.vocab_size).constraint(
        compile_form({"choice": ["yes"]}), may_think=True, thinking=False
    )
    for token in tokenizer.encode("<think>anything {at} all</think>"):
        assert bound.allowed()[token]
        bound.take(token)
    assert [tokenizer.symbols[token] for token in bound.allowed().nonzero()[0]] == ["y"]
    for token in tokenizer.encode("yes"):
        bound.take(token)
    assert bound.allowed().nonzero()[0].tolist() == [tokenizer.eos_id]


def test_without_a_tool_in_mind_plain_text_may_come() -> None:
    tokenizer = Tokenizer()
    bound = Grammars(tokenizer, tokenizer.vocab_size).constraint(
        compile_form(call_form([{"name": "f"}], free=True)), may_think=False, thinking=False
    )
    allowed = bound.allowed()
    assert allowed[tokenizer.encode("x")[0]] and allowed[tokenizer.encode("{")[0]]
    with pytest.raises(UsageError, match="not understood"):
        compile_form({"lark": "start: nothing"})


@pytest.mark.parametrize(
    ("form", "pattern"),
    [({"regex": "[äöü€]{2,4}"}, "[äöü€]{2,4}"), ({"json": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}}, r'\{"n":-?\d+\}')],
    ids=["characters of several tokens", "schema"],
)  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_a_form_binds_a_vocabulary_of_byte_pairs(
    form: dict[str, Any], pattern: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any token that the form allows may come; with more rows than tokens, as models of others have them."""
    folder = tmp_path_factory.mktemp("bpe")
    make_llama(folder)
    tokenizer = open_tokenizer(folder)
    rows = tokenizer.vocab_size + 2
    bound = Grammars(tokenizer, rows).constraint(compile_form(form), may_think=True, thinking=False)
    choose, said = random.Random(seed), []
    while len(said) < 60:
        allowed = np.flatnonzero(bound.allowed()).tolist()
        assert max(allowed) < tokenizer.vocab_size
        ends = tokenizer.eos_id in allowed and len(said) > 8
        said.append(tokenizer.eos_id if ends else choose.choice(allowed))
        if said[-1] == tokenizer.eos_id:
            break
        bound.take(said[-1])
    if said[-1] == tokenizer.eos_id:
        assert re.fullmatch(pattern, tokenizer.decode(said))
    else:
        assert tokenizer.decode(said).startswith('{"n":')
