"""The rollout engine's process: it answers sampling requests over a unix socket on the pool placed for `infer`.

    python -m bascule.place.rollout --run out/demo --pool ascend --socket /tmp/x/s

Each request may name a version of the weights; the engine loads that version, verified, before it answers. It keeps no other
state, so it can be killed and started again at any instant. Sockets are served by threads, but everything the chip computes
happens in the main thread, one request at a time: a simulated chip's session, its faults and torch's modes belong to a thread.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import socket
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bascule.accelerators.base import Accelerator, Work
from bascule.accelerators.registry import open_accelerator
from bascule.config.load import read_resolved
from bascule.config.model import ModelConfig
from bascule.config.recipe import Recipe
from bascule.data.text_tokenizer import open_or_own, sized
from bascule.errors import BasculeError, DeviceFault, OutOfMemory, UsageError, nearest
from bascule.folder import RunFolder
from bascule.guard.watchdog import STARTING, beat
from bascule.infer.compiled import compiled, why_not
from bascule.infer.engine import Engine
from bascule.infer.linear import Precision
from bascule.infer.routes import with_routes
from bascule.infer.sampling import Sampling
from bascule.infer.sequence import request_from_json
from bascule.ledger import Ledger
from bascule.model.transformer import Transformer
from bascule.place import sync
from bascule.place.rollout_decoder import decided
from bascule.records import RolloutReply, RolloutRequest

IDLE_BEAT_S = 1.0


class Host:
    """The model on its chip, and which version of the weights lies in it."""

    def __init__(
        self,
        config: ModelConfig,
        accelerator: Accelerator,
        pool: str,
        *,
        eos_id: int,
        pad_id: int,
        heartbeat: Path,
        native: bool = False,
        precision: Precision = "fp32",
        warn: Callable[[str], object] = warnings.warn,
    ) -> None:
        self.pool = pool
        self.accelerator = accelerator
        self.version: int | None = None
        self.sha256: str | None = None
        self.served = 0
        self._heartbeat = heartbeat
        self.model = accelerator.move(Transformer(config)).eval()
        self.engine = Engine(
            self.model, accelerator, eos_id=eos_id, pad_id=pad_id, native=native, precision=precision, on_progress=self._beat, warn=warn
        )  # fmt: skip

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Reply to one message. An error is a reply that names this pool; only what is not ours ends the process."""
        try:
            if message["do"] == "hello":
                return {"ok": True, "hello": self._hello()}
            return {"ok": True, "reply": asdict(self.sample(request_from_json(message["request"])))}
        except torch.OutOfMemoryError as error:
            return self._error(OutOfMemory(f"The chip's memory is exhausted: {error}"))
        except BasculeError as error:
            return self._error(error)

    def sample(self, request: RolloutRequest) -> RolloutReply:
        start = time.perf_counter()
        self._take_weights(request)
        sampling = Sampling(
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            max_tokens=request.max_tokens,
            seed=request.seed,
            purpose=request.purpose,
            step=request.step,
        )
        completions = self.engine.generate(
            request.prompts,
            sampling,
            group_size=request.group_size,
            first_index=request.first_index,
            work_step=max(1, request.step),
        )
        if request.routes:
            with self.accelerator.session(Work("infer", max(1, request.step))):
                completions = with_routes(
                    self.model, request.prompts, completions, device=self.accelerator.device
                )
        self.served += 1
        return RolloutReply(completions, self.version, self.pool, time.perf_counter() - start)

    def beat_idle(self) -> None:
        self._beat(self.served, "idle")

    def _beat(self, step: int, phase: str = "sample") -> None:
        beat(self._heartbeat, step, phase)

    def _take_weights(self, request: RolloutRequest) -> None:
        """Load the version asked for, if it is not here. The model is overwritten only after the hash agreed."""
        if request.weights_version is None or (request.weights_version, request.weights_sha256) == (
            self.version,
            self.sha256,
        ):
            return
        if request.weights_path is None or request.weights_sha256 is None:
            raise DeviceFault(
                f"Weights of version {request.weights_version} were asked for without their path and SHA-256."
            )
        state = sync.load(
            Path(request.weights_path), request.weights_sha256, request.weights_version
        )
        self.version = None  # half-written until the next line is through
        with self.accelerator.session(Work("infer", max(1, request.step))):
            self.model.load_state_dict(state)
        self.version, self.sha256 = request.weights_version, request.weights_sha256

    def _hello(self) -> dict[str, Any]:
        chip = self.accelerator.info()
        return {
            "pool": self.pool,
            "accelerator": self.accelerator.name,
            "chip": chip.name,
            "pid": os.getpid(),
            "version": self.version,
        }

    def _error(self, error: BasculeError) -> dict[str, Any]:
        return {
            "ok": False,
            "error": {"kind": type(error).__name__, "message": str(error), "pool": self.pool},
        }


class Question:
    """A message on its way to the main thread, and the reply on its way back."""

    def __init__(self, message: dict[str, Any]) -> None:
        self.message = message
        self.answered = threading.Event()
        self.reply: dict[str, Any] = {}


def serve(host: Host, path: Path) -> None:
    """Answer for ever. Clients may come and go; one that left still gets its work done, its reply goes nowhere."""
    questions: queue.Queue[Question] = queue.Queue()
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(16)
        threading.Thread(
            target=_accept, args=(listener, questions), daemon=True, name="accept"
        ).start()
        while True:
            host.beat_idle()
            try:
                question = questions.get(timeout=IDLE_BEAT_S)
            except queue.Empty:
                continue
            question.reply = host.answer(question.message)
            question.answered.set()


def _accept(listener: socket.socket, questions: queue.Queue[Question]) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(
            target=_talk, args=(connection, questions), daemon=True, name="talk"
        ).start()


def _talk(connection: socket.socket, questions: queue.Queue[Question]) -> None:
    try:
        with connection, connection.makefile("rwb") as stream:
            for line in stream:
                question = Question(json.loads(line))
                questions.put(question)
                question.answered.wait()
                stream.write(json.dumps(question.reply, separators=(",", ":")).encode() + b"\n")
                stream.flush()
    except ConnectionError:
        return  # the client went away; its next try is a new connection


def compiled_steps(recipe: Recipe, accelerator: Accelerator, ledger: Ledger) -> bool:
    """Does an engine of this run decode in compiled steps on this chip? Where it should and has no compiler, the ledger is warned."""
    wanted = decided(recipe).decoder == "compiled" and accelerator.device.type == "cpu"
    wanted = wanted and not accelerator.needs_operators("infer")
    if wanted and compiled() is None:
        ledger.warn(
            "decoding goes through torch's operators",
            f"{why_not()}; it is several times slower, and its last bits are not those of a machine with a compiler",
        )
    return wanted


def open_host(run: Path, pool: str, threads: int | None = None) -> Host:
    """Read the run's recipe, open the pool's accelerator, build the model (weights arrive with the first request)."""
    folder = RunFolder(run)
    heartbeat = folder.heartbeats / "rollout.json"
    beat(heartbeat, 0, STARTING)
    recipe: Recipe = read_resolved(folder.recipe)
    if pool not in recipe.pools:
        raise UsageError(
            f"The recipe has no pool '{pool}'; pools: {', '.join(recipe.pools)}.{nearest(pool, recipe.pools)}"
        )
    accelerator = open_accelerator(
        recipe.pools[pool].accelerator,
        seed=recipe.seed,
        fault_log=folder.ground_truth / f"{pool}-rollout.jsonl",
    )
    ledger = Ledger(folder.ledger, pool=pool)
    if accelerator.fallback_note:
        ledger.warn("accelerator fallback", accelerator.fallback_note)
    accelerator.prepare(threads or recipe.threads)
    tokenizer = open_or_own(folder.tokenizer)
    config = sized(recipe.model, tokenizer)
    native = compiled_steps(recipe, accelerator, ledger)
    precision = recipe.train.rollout_precision
    if precision != "fp32" and accelerator.device.type == "cpu":
        precision = "fp32"
        ledger.warn(
            "rollout precision", "train.rollout_precision = bf16 was asked for; a CPU pool samples in fp32"
        )  # fmt: skip
    return Host(
        config,
        accelerator,
        pool,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        heartbeat=heartbeat,
        native=native,
        precision=precision,
        warn=partial(ledger.warn, "steps run operator by operator"),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Answer sampling requests of a run on one pool.")
    parser.add_argument("--run", type=Path, required=True, help="the run folder, out/NAME")
    parser.add_argument("--pool", required=True, help="the pool to open")
    parser.add_argument(
        "--socket",
        type=Path,
        required=True,
        help="path of the unix socket to listen on (under 100 characters)",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: the recipe's)")
    options = parser.parse_args(arguments)
    serve(open_host(options.run, options.pool, options.threads), options.socket)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
