"""The Responses API's subset, through OpenAI's own client."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.serve.conftest import Server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_it_says_what_chat_completions_say(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "1+2=?"}], temperature=0, max_tokens=30
    )
    reply = client.responses.create(
        model="tiny", input="1+2=?", temperature=0, max_output_tokens=30
    )
    assert reply.output_text == (chat.choices[0].message.content or "")
    assert reply.status == (
        "incomplete" if chat.choices[0].finish_reason == "length" else "completed"
    )
    assert reply.usage is not None and chat.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )


def test_instructions_and_earlier_turns_are_read(client: openai.OpenAI) -> None:
    turns = [
        {"role": "user", "content": "1+2=?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": [{"type": "input_text", "text": "2+2=?"}]},
    ]
    reply = client.responses.create(
        model="tiny", input=turns, instructions="Be brief.", temperature=0, max_output_tokens=5
    )  # type: ignore[arg-type]
    assert reply.usage is not None and reply.usage.input_tokens == len("Be brief.1+2=?32+2=?") + 7


def test_a_stream_ends_in_the_response_its_pieces_add_up_to(client: openai.OpenAI) -> None:
    events = list(
        client.responses.create(model="tiny", input="1+2=?", max_output_tokens=80, stream=True)
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response  # type: ignore[union-attr]
    assert events[-1].type == f"response.{final.status}"
    told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert told == final.output_text
    added = [event.item.id for event in events if event.type == "response.output_item.added"]
    assert added == [item.id for item in final.output]


def test_a_schema_binds_it(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    body = {
        "model": "tiny",
        "input": "1",
        "temperature": 0,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}},
    }
    status, answer = server.post("/v1/responses", body)
    texts = [
        part["text"]
        for item in answer["output"]
        if item["type"] == "message"
        for part in item["content"]
    ]
    assert status == 200 and all(text in ('{"a":true}', '{"a":false}') for text in texts)


def test_what_it_said_can_be_sent_back_thought_and_all(client: openai.OpenAI) -> None:
    replies = (
        client.responses.create(model="tiny", input=f"{seed % 10}+2=?", max_output_tokens=20)
        for seed in range(60)
    )  # a random model spells control tokens too, which nobody may send back
    said = next(one.output for one in replies if len(one.output) > 1 and "<" not in one.output_text)
    asked = {"role": "user", "content": "1+2=?"}
    turns: Any = [asked, *(one.model_dump() for one in said), asked]
    whole = client.responses.create(model="tiny", input=turns, max_output_tokens=2)
    plain = client.responses.create(
        model="tiny", input=[asked, {"role": "assistant", "content": said[-1].content[0].text}, asked], max_output_tokens=2  # type: ignore
    )  # fmt: skip
    assert whole.usage and plain.usage and whole.usage.input_tokens == plain.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="no message"):
        client.responses.create(model="tiny", input=[turns[1]])


def test_what_needs_a_memory_is_refused(server: Server) -> None:
    for extra in (
        {"previous_response_id": "resp_1"},
        {"store": True},
        {"background": True},
        {"tools": []},
    ):
        assert server.post("/v1/responses", {"model": "tiny", "input": "1", **extra})[0] == 400
