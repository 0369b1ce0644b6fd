"""The rollout engine's process: exact, restartable, and honest about what went wrong. A real process on a real socket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bascule.accelerators.cpu import CpuAccelerator
from bascule.config.load import recipe_from
from bascule.config.model import ModelConfig
from bascule.data.tokenizer import Tokenizer
from bascule.errors import DeviceFault, NonFiniteLogits, SnapshotError
from bascule.folder import RunFolder
from bascule.guard import watchdog
from bascule.infer.engine import Engine
from bascule.infer.sampling import Sampling
from bascule.ledger import Ledger, of_kind
from bascule.model.transformer import Transformer
from bascule.model.weights import initialise
from bascule.place import sync
from bascule.place.client import RolloutClient
from bascule.place.rollout import open_host
from bascule.records import RolloutRequest, Warned

PROMPTS = [[1, 6, 20, 21, 22], [1, 6, 30]]


class Running:
    """A run folder with one pool, and its rollout process."""

    def __init__(self, root: Path, accelerator: str = "cpu", **train: str) -> None:
        self.folder = RunFolder(root / "run").create()
        recipe = recipe_from(
            {
                "name": "t",
                "model": {"preset": "tick"},
                "pools": {"ascend": {"accelerator": accelerator}},
                "train": train,
            },
            source="test",
        )
        self.folder.recipe.write_text(json.dumps(recipe.model_dump(mode="json")))
        self.socket = Path(tempfile.mkdtemp(prefix="bascule")) / "s"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        arguments = [
            "--run",
            str(self.folder.root),
            "--pool",
            "ascend",
            "--socket",
            str(self.socket),
        ]
        self.process = subprocess.Popen([sys.executable, "-m", "bascule.place.rollout", *arguments])

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def die_at_work_and_rise(self) -> None:
        """Killed once it says that it samples (a fixed moment would come too late on a fast machine), then started again."""
        while (beat := watchdog.read(self.folder.heartbeats / "rollout.json")) is None or (
            beat.phase != "sample"
        ):
            time.sleep(0.002)
        self.kill()
        self.start()

    def weights(self, seed: int, version: int) -> tuple[Transformer, RolloutRequest]:
        """Publish a random model; a request that asks for it."""
        model = Transformer(ModelConfig(preset="tick", vocab_size=Tokenizer().vocab_size)).eval()
        initialise(model, seed)
        path, sha256 = sync.publish(self.folder.weights, model.state_dict(), version)
        request = RolloutRequest(step=1, prompts=PROMPTS, group_size=3, max_tokens=12, seed=5)
        return model, replace(
            request, weights_version=version, weights_path=str(path), weights_sha256=sha256
        )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = Running(tmp_path_factory.mktemp("rollout"))
    made.start()
    yield made
    made.kill()


def local(model: Transformer, request: RolloutRequest) -> list[list[int]]:
    tokenizer = Tokenizer()
    engine = Engine(model, CpuAccelerator(), eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, native=True)  # fmt: skip
    sampling = Sampling(max_tokens=request.max_tokens, seed=request.seed, step=request.step)
    return [
        item.tokens
        for item in engine.generate(request.prompts, sampling, group_size=request.group_size)
    ]


def test_the_reply_is_what_the_engine_says_here(running: Running) -> None:
    model, request = running.weights(seed=1, version=1)
    reply = RolloutClient(running.socket).sample(request)
    assert [item.tokens for item in reply.completions] == local(model, request)
    assert (reply.weights_version, reply.pool) == (1, "ascend")


def test_newer_weights_are_loaded_before_answering(running: Running) -> None:
    client = RolloutClient(running.socket)
    _, old = running.weights(seed=1, version=2)
    first = client.sample(old)
    model, new = running.weights(seed=2, version=3)
    second = client.sample(new)
    assert [item.tokens for item in second.completions] == local(model, new)
    assert first.completions != second.completions


def test_weights_that_do_not_match_their_hash_are_an_error_and_the_engine_goes_on(
    running: Running,
) -> None:
    client = RolloutClient(running.socket)
    _, good = running.weights(seed=1, version=4)
    with pytest.raises(SnapshotError, match="pool 'ascend'"):
        client.sample(replace(good, weights_sha256="0" * 64, weights_version=5))
    assert client.sample(good).weights_version == 4


def test_non_finite_weights_give_an_error_that_names_the_pool(running: Running) -> None:
    _, request = running.weights(seed=1, version=6)
    state = {
        name: torch.full_like(tensor, float("nan"))
        for name, tensor in running.weights(1, 6)[0].state_dict().items()
    }
    path, sha256 = sync.publish(running.folder.weights, state, 7)
    bad = replace(request, weights_version=7, weights_path=str(path), weights_sha256=sha256)
    with pytest.raises(NonFiniteLogits, match="pool 'ascend'"):
        RolloutClient(running.socket).sample(bad)


def test_it_beats_while_idle(running: Running) -> None:
    RolloutClient(running.socket).hello()
    time.sleep(1.5)
    beat = watchdog.read(running.folder.heartbeats / "rollout.json")
    assert beat is not None and beat.phase == "idle" and time.time() - beat.time_s < 5


def test_a_killed_engine_is_asked_again_and_the_answer_is_the_same(tmp_path: Path) -> None:
    running = Running(tmp_path)
    running.start()
    model, request = running.weights(seed=1, version=1)
    request = replace(request, max_tokens=100, group_size=30)
    waits: list[float] = []
    client = RolloutClient(running.socket, on_wait=lambda: waits.append(time.monotonic()))
    assert client.hello()["pool"] == "ascend"
    fate = threading.Thread(target=running.die_at_work_and_rise)
    fate.start()
    reply = client.sample(request)
    fate.join()
    running.kill()
    assert client.retried == 1 and waits
    assert [item.tokens for item in reply.completions] == local(model, request)


def test_an_engine_that_never_comes_is_a_device_fault_with_advice(tmp_path: Path) -> None:
    with pytest.raises(DeviceFault, match="logs/"):
        RolloutClient(tmp_path / "none", patience_s=0.3).hello()


def test_an_engine_that_hangs_is_reported_after_the_patience(running: Running) -> None:
    assert running.process is not None
    client = RolloutClient(running.socket, patience_s=1.5)
    client.hello()
    os.kill(running.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(DeviceFault, match="did not answer"):
            client.hello()
    finally:
        os.kill(running.process.pid, signal.SIGCONT)


def test_a_cpu_pool_samples_in_fp32_whatever_was_asked_and_says_so(tmp_path: Path) -> None:
    folder = Running(tmp_path, rollout_precision="bf16").folder
    assert open_host(folder.root, "ascend").engine.precision == "fp32"
    (warned,) = of_kind(Ledger(folder.ledger).read(), Warned)
    assert "a CPU pool samples in fp32" in warned.detail
