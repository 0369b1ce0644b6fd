"""New weights while serving: nobody is dropped, no answer is half old and half new, and what fails the audit is not served."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from bascule.data.tokenizer import Tokenizer
from bascule.ledger import of_kind, read_ledger
from bascule.model.weights import fingerprint, initialise, load_hf, save_hf
from bascule.records import WeightsRenewed
from tests.serve.conftest import LARGE, Server, Start, wait_until

KEY = "a-key"
HEADERS = {"Authorization": f"Bearer {KEY}"}
ASK: dict[str, Any] = {"model": "tiny", "prompt": "1+2=", "max_tokens": 40, "temperature": 0}


@pytest.fixture(scope="module")
def keyed(start: Start) -> Server:
    return start(api_key=KEY)


def write(folder: Path, of: Path, *, seed: int = 0, broken: bool = False) -> str:
    """Another model of the same shape in `folder`; returns its hash."""
    model, config = load_hf(of)
    initialise(model, seed)
    if broken:
        model.model.norm.weight.data[:] = torch.nan
    folder.mkdir(exist_ok=True)
    Tokenizer().save(folder)
    save_hf(model, config, folder)
    return fingerprint(model)


def answer(server: Server) -> tuple[str, str]:
    """(greedy answer, which weights said it), streamed."""
    client = openai.OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)
    chunks = list(client.completions.create(**ASK, stream=True))
    return "".join(one.choices[0].text for one in chunks), str(chunks[0].system_fingerprint)


def test_a_stream_of_requests_crosses_the_change_and_every_answer_is_of_one_model(
    keyed: Server,
) -> None:
    before = answer(keyed)
    sha256 = write(keyed.folder.root / "next", keyed.folder.model, seed=2)
    said: list[tuple[str, str]] = []
    stop = threading.Event()

    def ask_on() -> None:
        while not stop.is_set():
            said.append(answer(keyed))

    askers = [threading.Thread(target=ask_on) for _ in range(3)]
    for asker in askers:
        asker.start()
    status, body = keyed.post("/admin/weights", {"folder": "next", "sha256": sha256}, **HEADERS)
    wait_until(lambda: said[-1][1] != before[1])
    stop.set()
    for asker in askers:
        asker.join()
    assert status == 200 and body["changed"] and body["weights_sha256"] == sha256
    assert keyed.get("/version")[1]["weights_sha256"] == sha256
    after = answer(keyed)
    assert before[0] != after[0]
    assert set(said) == {before, after}
    assert of_kind(read_ledger(keyed.folder.ledger), WeightsRenewed)[-1].sha256 == sha256


@pytest.mark.parametrize(
    "wrong",
    [
        "not a number",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("another hash", "no folder")),
    ],
)
def test_weights_that_fail_the_audit_are_refused_and_the_old_ones_go_on(
    wrong: str, keyed: Server
) -> None:
    before = answer(keyed)
    body = {"folder": "bad"}
    if wrong != "no folder":
        sha256 = write(
            keyed.folder.root / "bad", keyed.folder.model, seed=5, broken=wrong == "not a number"
        )
        body |= {"sha256": sha256 if wrong == "not a number" else "0" * 64}
    else:
        body = {"folder": "nothing-here"}
    status, told = keyed.post("/admin/weights", body, **HEADERS)
    assert status in (409, 503) and told["error"]["message"]
    assert answer(keyed) == before


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_weights_change_in_another_precision_too(precision: str, start: Start) -> None:
    if precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("no bf16 unit")
    server = start(api_key=KEY, model=LARGE, serve={"precision": precision})
    for seed in range(3):
        sha256 = write(server.folder.root / "next", server.folder.model, seed=seed)
        status, told = server.post(
            "/admin/weights", {"folder": "next", "sha256": sha256}, **HEADERS
        )
        assert status == 200 and told["weights_sha256"] == sha256, told
    assert server.get("/version")[1]["dtype"] == ("bfloat16" if precision == "bf16" else "int8")


@pytest.mark.slow
def test_a_hangup_signal_reads_the_runs_own_model_again(keyed: Server) -> None:
    sha256 = write(keyed.folder.model, keyed.folder.model, seed=7)
    keyed.process.send_signal(signal.SIGHUP)
    wait_until(lambda: keyed.get("/version")[1]["weights_sha256"] == sha256, 120)


def test_without_a_key_nobody_can_change_the_weights(server: Server) -> None:
    status, told = server.post("/admin/weights", {"folder": "next"})
    assert status == 403 and "SIGHUP" in told["error"]["message"]
