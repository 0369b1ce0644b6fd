"""A live server: a real process, a random port, a tiny random model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bascule.config.load import recipe_from
from bascule.config.recipe import Recipe
from bascule.data.tokenizer import Tokenizer
from bascule.folder import RunFolder
from bascule.ledger import Ledger
from bascule.model.transformer import Transformer
from bascule.model.weights import initialise, save_hf
from bascule.records import Verdict

START = """
import sys
from pathlib import Path
from bascule.folder import RunFolder
from bascule.serve.server import run
run(RunFolder(Path(sys.argv[1])), sys.argv[2], port=0, api_key=sys.argv[3] or None, slots=int(sys.argv[4]), hang_timeout_s=float(sys.argv[5]),
    allow_origins=sys.argv[6:])
"""


# Large enough for matrices in another precision, which a small model never gets.
LARGE: dict[str, Any] = {
    "preset": "tick", "attention": "gqa", "ffn": "swiglu", "hidden_size": 384, "head_dim": 48, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 512,
}  # fmt: skip


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]
    folder: RunFolder

    def get(self, path: str) -> tuple[int, Any]:
        return self._answer(urllib.request.Request(self.url + path))

    def post(self, path: str, body: Mapping[str, Any] | bytes, **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json", **headers}
        )
        return self._answer(request)

    def _answer(self, request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                text, status = reply.read().decode(), reply.status
        except urllib.error.HTTPError as error:
            text, status = error.read().decode(), error.code
        return status, json.loads(text) if text.startswith("{") else text

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=40)


def make_run(root: Path, pools: Mapping[str, str], **sections: Any) -> tuple[RunFolder, Recipe]:
    """A finished run's folder: recipe, a random `tick` model with a prediction layer, and a fit verdict for `infer` on every pool."""
    folder = RunFolder(root).create()
    raw = {
        "name": "tiny",
        "model": {"preset": "tick", "num_nextn_predict_layers": 1},
        "pools": {name: {"accelerator": accelerator} for name, accelerator in pools.items()},
        "serve": {"speculate": 4},
        **sections,
    }
    recipe = recipe_from(raw, source="test")
    folder.recipe.write_text(json.dumps(recipe.model_dump(mode="json")))
    tokenizer = Tokenizer()
    config = recipe.model.model_copy(update={"vocab_size": tokenizer.vocab_size})
    model = Transformer(config)
    initialise(model, seed=1)
    folder.model.mkdir()
    tokenizer.save(folder.model)
    save_hf(model, config, folder.model)
    ledger = Ledger(folder.ledger)
    for name, accelerator in pools.items():
        ledger.append(
            Verdict(
                pool=name,
                role="infer",
                verdict="fit",
                reasons=("All checks passed.",),
                accelerator=accelerator,
                chip="test",
                driver="1",
                simulated=False,
            )
        )
    return folder, recipe


Start = Callable[..., Server]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    running: list[Server] = []

    def begin(
        pools: Mapping[str, str] | None = None,
        *,
        api_key: str = "",
        slots: int = 32,
        hang_timeout_s: float = 60.0,
        allow_origins: Sequence[str] = (),
        **sections: Any,
    ) -> Server:
        pools = pools or {"main": "cpu"}
        folder, recipe = make_run(tmp_path_factory.mktemp("serve") / "run", pools, **sections)
        accelerator = recipe.pools[recipe.order[0]].accelerator
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                START,
                str(folder.root),
                accelerator,
                api_key,
                str(slots),
                str(hang_timeout_s),
                *allow_origins,
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        server = Server("", process, folder)
        running.append(server)
        lines = []
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "answers on http" in line:
                server.url = line.split("answers on ")[1].split()[0]
                return server
        raise AssertionError("the server did not start:\n" + "".join(lines))

    yield begin
    for server in running:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="session")
def server(start: Start) -> Server:
    return start()


def wait_until(true: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Wait for something another process does."""
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
