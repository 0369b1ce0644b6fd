"""The door, the limits, and what happens when clients misbehave or chips fail. Live servers throughout."""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import shutil
import signal
import socket
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.model import ModelConfig
from bascule.config.serving import ServeConfig
from bascule.data.tokenizer import Tokenizer
from bascule.errors import UsageError
from bascule.infer.sequence import Sampling
from bascule.ledger import of_kind, read_ledger
from bascule.model.transformer import Transformer
from bascule.model.weights import initialise
from bascule.records import PoolCondemned, Warned
from bascule.serve.broker import Broker
from bascule.serve.hush import Hush
from bascule.serve.inflight import Candidate
from bascule.serve.openai import application
from bascule.serve.server import bind
from bascule.serve.service import Service
from bascule.serve.worker import Desk
from bascule.stages.serve import _with_origins
from tests.serve.conftest import LARGE, Server, Start, wait_until

ECHO = {"model": "tiny", "prompt": "1+2", "max_tokens": 0, "echo": True, "logprobs": 0}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "1+2=?"}]}


def metric(server: Server, name: str) -> float:
    lines = [
        line
        for line in server.get("/metrics")[1].splitlines()
        if line.startswith(f"bascule:{name}")
    ]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def raw(server: Server, text: bytes) -> bytes:
    """Send bytes as they are and read the whole answer."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(text)
        answer = b""
        while block := connection.recv(65536):
            answer += block
    return answer


def test_health_ready_version_and_page(server: Server) -> None:
    assert server.get("/health")[0] == 200 and server.get("/ready")[1]["ready"] is True
    version = server.get("/version")[1]
    assert version["chip"]["pool"] == "main" and version["chip"]["verdict"] == "fit"
    wait_until(lambda: len(server.get("/version")[1]["examples"]) == 4)
    with urllib.request.urlopen(server.url + "/") as reply:
        assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
        page = reply.read().decode()
    assert (
        "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "src=" not in page
    )  # nothing is fetched from elsewhere


def test_tokenize_and_back(server: Server) -> None:
    found = server.post("/tokenize", {"messages": CHAT["messages"]})[1]
    assert found["count"] == len(found["tokens"]) and found["max_model_len"] == 128
    assert server.post("/detokenize", {"tokens": found["tokens"]})[1]["prompt"].endswith(
        "1+2=?<assistant>"
    )


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", b'{"model": "tiny", "messages": []}', 400),
        ("/v1/chat/completions", json.dumps({**CHAT, "temprature": 1}).encode(), 400),
        ("/v1/chat/completions", json.dumps({**CHAT, "stop": ""}).encode(), 400),
        ("/v1/chat/completions", json.dumps({**CHAT, "stream_options": {}}).encode(), 400),
        ("/v1/chat/completions", json.dumps({**CHAT, "logit_bias": {"x": 1}}).encode(), 400),
        ("/v1/completions", b'{"model": "tiny", "prompt": []}', 400),
        ("/v1/completions", b'{"model": "tiny", "prompt": [9999]}', 400),
        ("/v1/completions", b'{"model": "tiny", "prompt": ""}', 400),
        ("/v1/nothing", b"{}", 404),
        ("/health", b"{}", 405),
    ],
)
def test_bad_requests_are_answered_in_openais_shape(
    server: Server, path: str, body: bytes, status: int
) -> None:
    found, answer = server.post(path, body)
    assert found == status
    assert answer["error"]["message"] and set(answer["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }


def test_a_temperature_too_small_to_divide_by_is_greedy_and_harms_nobody(server: Server) -> None:
    said = {
        server.post("/v1/completions", {"model": "tiny", "prompt": "1+2", "temperature": warmth})[
            1
        ]["choices"][0]["text"]
        for warmth in (0, 1e-300, 1e-6)
    }
    assert len(said) == 1 and server.get("/version")[1]["moves"] == 0


def test_what_is_wrong_is_told_with_the_field_that_is_wrong(server: Server) -> None:
    picture = [{"type": "image_url", "image_url": {"url": "x"}}]
    for wrong, param, words in (
        (
            {"messages": [{"role": "user", "content": picture}]},
            "messages.0.content.0.type",
            "'text'",
        ),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "match"),
    ):
        status, answer = server.post("/v1/chat/completions", {**CHAT, **wrong})
        assert status == 400 and answer["error"]["param"] == param
        assert words in answer["error"]["message"]
    wrong_token = server.post("/detokenize", {"tokens": [1, 9999]})[1]["error"]
    assert wrong_token["param"] == "tokens" and "9999" in wrong_token["message"]


def test_a_foreign_page_cannot_use_a_local_server(server: Server) -> None:
    assert server.post("/v1/chat/completions", CHAT, Host="evil.example")[0] == 403
    assert server.post("/v1/chat/completions", CHAT, **{"Content-Type": "text/plain"})[0] == 415


def test_bodies_over_the_limit_are_refused_with_and_without_a_length(server: Server) -> None:
    assert server.post("/v1/chat/completions", b" " * (2 << 20))[0] == 413
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"40000\r\n" + b" " * 0x40000 + b"\r\n"
    assert raw(server, head + chunk * 5).startswith(b"HTTP/1.1 413")


def test_garbage_on_the_wire_changes_nothing_for_others(server: Server) -> None:
    raw(server, b"\x00\xff garbage\r\n\r\n")
    assert server.post("/v1/chat/completions", {**CHAT, "max_tokens": 4})[0] == 200


def test_a_request_that_would_never_fit_is_refused_for_good(server: Server) -> None:
    body = {"model": "tiny", "prompt": ["1+2"] * 200, "max_tokens": 1}
    for words in ({}, {"max_tokens": 0, "echo": True, "logprobs": 1}):
        status, answer = server.post("/v1/completions", {**body, **words})
        assert status == 400 and answer["error"]["code"] == "too_many_prompts"
    assert server.post("/v1/completions", {**body, "prompt": ["1+2"] * 90})[0] == 200


def test_scoring_too_ends_at_the_servers_time_limit(start: Start) -> None:
    hasty = start(serve={"timeout_s": 0.01})
    body = {"model": "tiny", "prompt": ["1+2" * 30] * 90, "max_tokens": 0, "echo": True}
    status, answer = hasty.post("/v1/completions", {**body, "logprobs": 1})
    assert status == 504 and answer["error"]["code"] == "timeout"
    assert hasty.get("/health")[0] == 200


def test_what_any_client_can_make_the_log_say_is_said_once_and_counted() -> None:
    hush = Hush(every_s=1000.0)

    def passes(words: str) -> logging.LogRecord | None:
        record = logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, words, (), None)
        return record if hush.filter(record) else None

    garbage = "Invalid HTTP request received."
    assert passes(garbage) is not None
    assert [passes(garbage) for _ in range(5)] == [None] * 5
    assert passes("another matter") is not None and passes("another matter") is not None
    hush._every_s = 0.0
    told = passes(garbage)
    assert told is not None and "5 more" in told.getMessage()


def test_a_client_that_hangs_up_frees_its_place(server: Server) -> None:
    before = metric(server, 'request_success_total{model_name="tiny",finished_reason="abort"}')
    body = json.dumps({**CHAT, "stream": True, "n": 8, "logit_bias": {"2": -100}}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % len(body)
                + body
            )
            connection.recv(200)
    wait_until(
        lambda: (
            metric(server, 'request_success_total{model_name="tiny",finished_reason="abort"}')
            > before
        )
    )
    wait_until(
        lambda: (
            metric(server, "num_requests_running") == 0
            and metric(server, "num_requests_waiting") == 0
        )
    )


def test_metrics_count_tokens_and_times(server: Server) -> None:
    before = metric(server, "generation_tokens_total")
    reply = server.post(
        "/v1/chat/completions", {**CHAT, "max_tokens": 6, "logit_bias": {"2": -100}}
    )[1]
    assert (
        metric(server, "generation_tokens_total")
        == before + reply["usage"]["completion_tokens"]
        == before + 6
    )
    assert metric(server, "time_to_first_token_seconds_count") >= 1
    assert metric(server, "num_preemptions_total") == 0
    guessed = metric(server, "spec_decode_num_draft_tokens_total")
    assert guessed >= 3 and metric(server, "spec_decode_num_accepted_tokens_total") <= guessed


def test_answers_with_guesses_are_those_without(server: Server, start: Start) -> None:
    plain = start(serve={"speculate": 0})
    for seed in range(4):
        body = {**CHAT, "seed": seed, "n": 2, "max_tokens": 24, "logprobs": True}
        with_guesses, without = (
            [choice["message"] for choice in one.post("/v1/chat/completions", body)[1]["choices"]]
            for one in (server, plain)
        )
        assert with_guesses == without
    assert metric(plain, "spec_decode_num_draft_tokens_total") == 0


def test_a_repeated_long_prompt_is_found_in_the_prefix_store(server: Server) -> None:
    body = {"model": "tiny", "prompt": "1+2=" * 20, "max_tokens": 4, "seed": 1}
    first, second = (server.post("/v1/completions", body)[1] for _ in range(2))
    assert first["choices"] == second["choices"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 64


def test_a_port_in_use_is_one_sentence(server: Server) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(UsageError, match=rf"Cannot listen on 127.0.0.1:{port} .*--port"):
        bind("127.0.0.1", port)


def test_a_post_to_what_is_only_read_is_405_whatever_it_carries(server: Server) -> None:
    for path in ("/", "/health", "/ready", "/version", "/metrics", "/openapi.json", "/v1/models"):
        for kind in ("text/plain", "application/json"):
            assert server.post(path, b"x", **{"Content-Type": kind})[0] == 405, path
    assert server.post("/tokenize", b"x", **{"Content-Type": "text/plain"})[0] == 415


def test_the_document_says_which_tokens_there_are_and_of_which_fields_there_is_one(
    server: Server,
) -> None:
    schemas = server.get("/openapi.json")[1]["components"]["schemas"]
    most = schemas["DetokenizeBody"]["properties"]["tokens"]["items"]["maximum"]
    assert server.post("/detokenize", {"tokens": [0, most]})[0] == 200
    assert server.post("/detokenize", {"tokens": [most + 1]})[0] == 400
    assert schemas["CompletionBody"]["properties"]["best_of"]["anyOf"][0]["minimum"] == 1
    one_of = schemas["TokenizeBody"]["oneOf"]
    assert [one["required"] for one in one_of] == [["prompt"], ["messages"]]
    assert server.post("/tokenize", {"prompt": "1", "messages": None})[0] == 200
    assert server.post("/tokenize", {"prompt": None})[0] == 400


def test_a_whole_number_may_be_written_with_a_point(server: Server) -> None:
    status, said = server.post("/detokenize", b'{"tokens": [5.0, 6]}')
    assert (status, said) == server.post("/detokenize", {"tokens": [5, 6]}) and status == 200
    for wrong in (b"[5.5]", b"[true]", b'["5"]', b"[1e300]"):
        assert server.post("/detokenize", b'{"tokens": ' + wrong + b"}")[0] == 400


def test_the_document_says_where_no_model_need_be_named(server: Server) -> None:
    schemas = server.get("/openapi.json")[1]["components"]["schemas"]
    assert schemas["DetokenizeBody"]["properties"]["model"] == {"enum": ["tiny", None]}
    assert server.post("/detokenize", {"model": None, "tokens": [27]})[0] == 200
    assert schemas["ChatBody"]["properties"]["model"] == {"type": "string", "enum": ["tiny"]}
    assert server.post("/v1/chat/completions", {**CHAT, "model": None})[0] == 400


def test_asked_to_stop_it_says_so_takes_nothing_new_and_ends_what_it_began(start: Start) -> None:
    server = start(model={"preset": "tick", "max_position_embeddings": 4096})
    host = server.url.removeprefix("http://")
    stream = http.client.HTTPConnection(host, timeout=60)
    body = {**CHAT, "stream": True, "logit_bias": {"2": -100}, "max_tokens": 1000}
    stream.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})  # fmt: skip
    reply = stream.getresponse()
    begun = reply.read(200)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: server.get("/ready")[0] == 503)
    assert server.get("/ready")[1] == {"ready": False, "status": "draining"}
    assert server.get("/health")[0] == 200
    for path, asked in (("/v1/chat/completions", CHAT), ("/v1/completions", ECHO)):
        late = http.client.HTTPConnection(host, timeout=60)
        late.request("POST", path, json.dumps(asked), {"Content-Type": "application/json"})
        refusal = late.getresponse()
        assert refusal.status == 503 and int(refusal.headers["Retry-After"]) > 0
        assert json.loads(refusal.read())["error"]["code"] == "draining"
    server.process.send_signal(
        signal.SIGTERM
    )  # who asks twice is not kept by requests that might still come
    whole = begun + reply.read()
    assert whole.endswith(b"data: [DONE]\n\n") and whole.count(b"finish_reason") > 500
    assert server.process.wait(timeout=40) in (0, -signal.SIGTERM)


def test_pages_of_named_origins_may_use_it_and_no_others(start: Start) -> None:
    server = start(api_key="k", allow_origins=["https://chat.example"])
    ask = "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nOrigin: {}\r\nAccess-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization,content-type\r\n\r\n"
    get = "GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nOrigin: {}\r\n{}\r\n"
    key = "Authorization: Bearer k\r\n"
    allowed = b"access-control-allow-origin: https://chat.example"
    answer = raw(server, ask.format("https://chat.example").encode()).lower()
    assert answer.startswith(b"http/1.1 200") and allowed in answer
    assert b"authorization" in answer and b"content-type" in answer
    answer = raw(server, get.format("https://chat.example", key).encode()).lower()
    assert answer.startswith(b"http/1.1 200") and allowed in answer
    answer = raw(server, get.format("https://chat.example", "").encode()).lower()
    assert answer.startswith(b"http/1.1 401") and allowed in answer  # the page may read why
    for foreign in ("https://evil.example", "https://chat.example.evil.example", "null"):
        assert b"access-control-allow-origin" not in raw(server, get.format(foreign, key).encode())
        assert raw(server, ask.format(foreign).encode()).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("origin", ["*", "chat.example", "https://chat.example/", "https://*.example", "file://x", ""])  # fmt: skip
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(UsageError, match="an origin is a scheme and a host"):
        _with_origins(ServeConfig(), [origin])
    assert _with_origins(ServeConfig(allow_origins=("http://a:1",)), ["https://b"]).allow_origins == ("http://a:1", "https://b")  # fmt: skip


def test_prompts_that_are_only_scored_wait_in_the_same_queue() -> None:
    broker = Broker(Path("model"), [Candidate(None, "cpu")], slots=1, max_queue=2)
    broker.state, broker.about = "serving", {"context": 128, "slots": 1}
    service = Service(broker, Tokenizer(), model="tiny", timeout_s=5)
    client = TestClient(application(service, about=dict, page=""))

    async def waiting() -> None:
        asked = [asyncio.create_task(broker.score([1, 2], 0)) for _ in range(3)]
        await asyncio.sleep(0)
        assert broker.running == 3

        def post() -> Any:
            return client.post("/v1/completions", json=ECHO)

        reply = await asyncio.to_thread(post)
        assert reply.status_code == 429 and reply.headers["Retry-After"] == "1"
        assert reply.json()["error"]["code"] == "overloaded"
        for task in asked:
            task.cancel()

    asyncio.run(waiting())


@torch.inference_mode()
def test_a_group_larger_than_the_batch_is_answered_in_parts_and_blocks_nobody() -> None:
    tokenizer = Tokenizer()
    model = Transformer(ModelConfig(preset="tick", vocab_size=tokenizer.vocab_size)).eval()
    initialise(model, seed=1)
    found = []
    for slots in (2, 8):
        desk = Desk(model, CpuAccelerator(), tokenizer, slots=slots)
        for job, choices in ((1, 5), (2, 1)):
            rows = [{"choice": choice, "said": []} for choice in range(choices)]
            sampling = asdict(Sampling(max_tokens=6))
            desk.submit({"id": job, "prompt": [1, 5, 27, job], "sampling": sampling, "top": None, "form": None, "rows": rows})  # fmt: skip
        said: dict[tuple[int, int], list[int]] = {}
        for _ in range(100):
            for job, choice, token, *_ in desk.tick()["said"]:
                said.setdefault((job, choice), []).append(token)
        assert not desk.busy
        found.append(said)
    assert set(found[0]) == {(1, choice) for choice in range(5)} | {(2, 0)}
    assert found[0] == found[1]


def test_the_key_opens_the_api_and_only_the_key(start: Start) -> None:
    server = start(api_key="s3cret", serve={"max_queue": 1}, slots=2)
    assert server.get("/v1/models")[0] == server.get("/metrics")[0] == 401
    assert server.post("/v1/chat/completions", CHAT, Authorization="Bearer s3cre")[0] == 401
    assert server.post("/v1/chat/completions", CHAT, Authorization="Bearer s3cret")[0] == 200
    assert server.get("/health")[0] == server.get("/")[0] == 200
    # the same small server: two run, one waits, the fourth is told to come back
    status, answer = server.post(
        "/v1/chat/completions", {**CHAT, "n": 4}, Authorization="Bearer s3cret"
    )
    assert status == 429 and answer["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    ("profile", "why"),
    [
        ("dies", "exit code -9"),
        pytest.param("nan", "NaN or infinity", marks=pytest.mark.slow),
        pytest.param("hang", "said nothing for 3 s", marks=pytest.mark.slow),
    ],
)
def test_a_chip_that_fails_is_left_and_no_answer_notices(
    server: Server, start: Start, profile: str, why: str
) -> None:
    body = {"model": "tiny", "prompt": "1+2", "max_tokens": 100, "n": 4, "logit_bias": {"2": -100}}
    expected = [
        server.post("/v1/completions", {**body, "seed": seed})[1]["choices"] for seed in range(5)
    ]
    frail = start(
        {"frail": f'sim:{profile}?roles=["infer"]&onset_step=4&rate=1.0@cpu', "spare": "cpu"},
        hang_timeout_s=3.0,
    )
    found: dict[int, object] = {}

    def ask(seed: int) -> None:
        found[seed] = frail.post("/v1/completions", {**body, "seed": seed})[1]["choices"]

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=90)
    assert [found[seed] for seed in range(5)] == expected
    version = frail.get("/version")[1]
    assert (
        version["chip"]["pool"] == "spare" and version["moves"] == 1 and why in version["trouble"]
    )
    records = read_ledger(frail.folder.ledger)
    condemned = of_kind(records, PoolCondemned)
    assert [record.pool for record in condemned] == ["frail"] and why in condemned[0].reason
    warned = [one.detail for one in of_kind(records, Warned) if one.what == "serving chip failed"]
    assert len(warned) == 1 and why in warned[0], "the ledger says why, not only that it ended"
    assert frail.get("/health")[0] == 200


@pytest.mark.slow
def test_a_standby_without_the_asked_precision_serves_in_fp32_and_says_so(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in ("g++", "as", "ld"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    monkeypatch.setenv("PATH", str(tmp_path))
    dies = 'sim:dies?roles=["infer"]&onset_step=2&rate=1.0@cpu'
    server = start({"frail": dies, "spare": "cpu"}, model=LARGE, serve={"precision": "int8"})
    (tmp_path / "g++").unlink()
    body = {**CHAT, "max_tokens": 60, "logit_bias": {"2": -100}, "stamp": True}
    assert server.get("/version")[1]["dtype"] == "int8"
    stamps = [server.post("/v1/chat/completions", body)[1]["choices"][0]["stamp"] for _ in range(3)]
    assert stamps[0]["dtype"] == "int8" and stamps[2]["dtype"] == "float32"
    assert None in stamps, "an answer of two precisions has no stamp"
    assert server.get("/version")[1]["dtype"] == "float32"
    warned = of_kind(read_ledger(server.folder.ledger), Warned)
    assert any(one.what == "precision fallback" for one in warned)


@pytest.mark.slow
def test_a_chip_that_answers_wrong_without_a_sign_is_caught_by_the_audit(start: Start) -> None:
    pools = {"liar": "sim:infer-bad?onset_step=12&rate=0.05@cpu", "spare": "cpu"}
    server = start(pools, serve={"audit_every": 2})
    body = {**CHAT, "max_tokens": 30, "logit_bias": {"2": -100}}
    wait_until(
        lambda: (
            server.post("/v1/chat/completions", body)[0] == 200
            and server.get("/version")[1]["moves"] == 1
        ),
        limit_s=60,
    )
    version = server.get("/version")[1]
    assert "audited answer" in version["trouble"] and version["chip"]["pool"] == "spare"
    condemned = of_kind(read_ledger(server.folder.ledger), PoolCondemned)
    assert [record.pool for record in condemned] == ["liar"]
    assert "audited answer" in condemned[0].reason and "exit code" not in condemned[0].reason


@pytest.mark.slow
def test_audits_of_a_right_chip_agree(start: Start) -> None:
    server = start({"right": "sim:clean@cpu"}, serve={"audit_every": 1})
    body = {**CHAT, "max_tokens": 30, "temperature": 0.7, "n": 3}
    wait_until(
        lambda: (
            server.post("/v1/chat/completions", body)[0] == 200
            and server.get("/version")[1]["audits"]["done"] >= 9
        ),
        limit_s=60,
    )
    version = server.get("/version")[1]
    assert version["audits"]["worst_logprob_difference"] < 1e-4 and version["moves"] == 0


@pytest.mark.slow
def test_when_no_chip_is_left_it_says_so(start: Start) -> None:
    server = start({"only": 'sim:nan?roles=["infer"]&onset_step=2&rate=1.0@cpu'})
    assert server.post("/v1/chat/completions", {**CHAT, "max_tokens": 4})[0] == 200
    status, answer = server.post("/v1/chat/completions", CHAT)
    assert status == 503 and "NaN or infinity" in answer["error"]["message"]
    assert server.get("/health")[0] == server.get("/ready")[0] == 503
    assert server.post("/v1/chat/completions", CHAT)[0] == 503


def test_a_reproducible_server_answers_with_equal_bits_whatever_else_it_answers(
    start: Start,
) -> None:
    server = start(serve={"reproducible": True})
    assert server.get("/version")[1]["reproducible"] is True
    body = {"model": "tiny", "prompt": "1+2", "seed": 4, "max_tokens": 24, "logprobs": 0}

    def ask(**other: Any) -> Any:
        choice = server.post("/v1/completions", {**body, **other})[1]["choices"][0]
        return choice["text"], choice["logprobs"]["token_logprobs"]

    alone = ask()
    with ThreadPoolExecutor(8) as crowd:
        others = [crowd.submit(ask, prompt="9" * n, seed=n, max_tokens=60) for n in range(1, 7)]
        amid = [crowd.submit(ask) for _ in range(2)]
    assert [one.result() for one in amid] == [alone, alone]
    assert len({other.result()[0] for other in others}) > 1


def test_the_document_describes_what_the_routes_check(server: Server) -> None:
    found = server.get("/openapi.json")[1]
    chat = found["components"]["schemas"]["ChatBody"]
    assert chat["additionalProperties"] is False and set(chat["required"]) == {"model", "messages"}
    assert chat["properties"]["model"]["enum"] == ["tiny"]
    for path, methods in found["paths"].items():
        for method in methods:
            status = (
                server.get(path)[0]
                if method == "get"
                else server.post(path, {"no": "such field"})[0]
            )
            refused = (
                403 if path == "/admin/weights" else 400
            )  # without a key nobody may ask for new weights
            assert status == (200 if method == "get" else refused)


def test_values_of_another_type_and_other_models_are_refused(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": 0}}
    assert server.post("/v1/chat/completions", {**CHAT, "tools": [tool]})[0] == 400
    assert server.post("/v1/responses", {"model": "tiny", "input": "1+1=?", "store": 0})[0] == 400
    for path, body in (("/detokenize", {"tokens": [5]}), ("/tokenize", {"prompt": "1"})):
        assert server.post(path, {**body, "model": "another"})[0] == 404
        assert server.post(path, body)[0] == server.post(path, {**body, "model": "tiny"})[0] == 200
