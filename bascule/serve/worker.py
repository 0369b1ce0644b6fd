"""The engine's process: one model on one chip, requests in and tokens out over a socket, continuous batching between.

    python -m bascule.serve.worker --model out/demo/model --accelerator cpu --fd 5

Lines of JSON both ways. In: `submit`, `score`, `cancel`. Out: `ready` once; after every tick `said` (a list of
[job, choice, token, logprob, alternatives, finish]), `began` ([job, tokens found in the prefix store]), `refused` ([job, why] of
forms that cannot be followed), `scored`, `load` and `warned` (why a step could not be recorded, once);
`fault` as the last line of a chip that failed. A process of its own, because a failing chip can take its process with it, and because
the server must go on answering while the chip computes. It ends when the server closes the socket.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch

from bascule.accelerators.base import Accelerator, Work
from bascule.accelerators.registry import open_accelerator
from bascule.data.text_tokenizer import open_tokenizer
from bascule.data.tokenizer import Tokenizer
from bascule.errors import BasculeError, DeviceFault, OutOfMemory
from bascule.infer.batch import CHUNK, Batch, Prefill
from bascule.infer.compiled import why_not
from bascule.infer.linear import DTYPES, Precision
from bascule.infer.row import Row
from bascule.infer.score import divergence, score
from bascule.infer.sequence import Sampling
from bascule.infer.stamp import marks, settings
from bascule.model.transformer import Transformer
from bascule.model.weights import fingerprint, load_hf
from bascule.serve.grammar import Grammars

TOGETHER_TOKENS = 512  # short prompts that are read in one go per tick
SHORT_TOKENS = 64
CACHE_BYTES = 1 << 30
TRIED_TOKENS = 64


@dataclass(eq=False)
class Seat(Row):
    """A row and whose it is."""

    job: int = 0
    choice: int = 0
    told: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.told = len(self.said)


class Desk:
    """Takes jobs, runs the batch, hands out tokens. One thread owns it."""

    def __init__(
        self,
        model: Transformer,
        accelerator: Accelerator,
        tokenizer: Tokenizer,
        *,
        slots: int,
        reproducible: bool = False,
        precision: Precision = "fp32",
        speculate: int = 0,
    ) -> None:
        length = model.config.max_position_embeddings
        token_bytes = model.new_cache(1, 1).memory_bytes
        self.batch = Batch(
            model,
            slots=slots,
            length=length,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            tokens=CACHE_BYTES // token_bytes,
            share=True,
            reproducible=reproducible,
            precision=precision,
            speculate=speculate,
            native=_real_cpu(accelerator),
            record=accelerator.recorder("infer"),
        )
        self.accelerator = accelerator
        self.waiting: deque[list[Seat]] = deque()
        self.reading: tuple[list[Seat], Prefill] | None = None
        self.jobs = 0
        self._grammars = Grammars(tokenizer, model.config.vocab_size)
        self.to_score: deque[dict[str, Any]] = deque()
        self._scored: list[list[Any]] = []
        self._said: list[list[Any]] = []
        self._began: list[list[int]] = []
        self._refused: list[list[Any]] = []
        self._warned = ""

    @property
    def busy(self) -> bool:
        return bool(self.to_score or self.waiting or self.reading or self.batch.rows)

    def submit(self, job: dict[str, Any]) -> None:
        sampling = settings(job["sampling"])
        seats = [
            Seat(
                job["prompt"],
                sampling,
                index=row["choice"],
                top=job["top"],
                constraint=self._grammars.constraint(**job["form"]) if job["form"] else None,
                said=list(row["said"]),
                job=job["id"],
                choice=row["choice"],
            )
            for row in job["rows"]
        ]
        self.jobs += 1
        # Choices that have said different things already (another engine failed) no longer share what has to be read.
        alike: dict[tuple[int, ...], list[Seat]] = {}
        for seat in seats:
            alike.setdefault(tuple(seat.said), []).append(seat)
        most = (
            self.batch.slots
        )  # a larger group would never fit, and those behind it would wait for ever
        for group in alike.values():
            self.waiting.extend(group[at : at + most] for at in range(0, len(group), most))

    def cancel(self, job: int, choice: int | None) -> None:
        def meant(seat: Row) -> bool:
            return isinstance(seat, Seat) and seat.job == job and choice in (None, seat.choice)

        self.waiting = deque(
            left for group in self.waiting if (left := [seat for seat in group if not meant(seat)])
        )
        if self.reading is not None:
            left = [seat for seat in self.reading[0] if not meant(seat)]
            if not left:
                self.batch.drop(self.reading[1])
            self.reading = (left, self.reading[1]) if left else None
        for row in list(self.batch.rows):
            if meant(row):
                self.batch.cancel(row)

    @torch.inference_mode()
    def tick(self) -> dict[str, Any]:
        """Read some prompts, say one token for every running row; returns the line to send."""
        self._said, self._began, self._refused, self._scored = [], [], [], []
        with self.accelerator.session(Work("infer", max(1, self.jobs))):
            self._note(self.batch.step())
            self._take_back()
            self._read_long()
            self._read_short()
            self._score_one()
        return {
            "said": self._said,
            "began": self._began,
            "refused": self._refused,
            "scored": self._scored,
            "load": self.load(),
            "warned": self._new_trouble(),
        }

    def _new_trouble(self) -> str:
        """What the batch has to complain of, once: each shape of step that cannot be recorded has its own words."""
        told, self._warned = self._warned, self.batch.trouble
        return "" if told == self._warned else self._warned

    def _score_one(self) -> None:
        if self.to_score:
            job = self.to_score.popleft()
            model, prompt = self.batch.reader, job["prompt"]
            found = (
                marks(model, prompt, job["said"])
                if job["said"]
                else score(model, prompt, job["top"], job["temperature"])
            )
            self._scored.append([job["id"], found])

    def _take_back(self) -> None:
        """Rows that had to give their blocks to older ones come first again."""
        for row in self.batch.preempted:
            assert isinstance(row, Seat)
            self.waiting.appendleft([row])
        self.batch.preempted.clear()

    def _read_long(self) -> None:
        if (
            self.reading is None
            and self.waiting
            and _length(self.waiting[0]) > SHORT_TOKENS
            and self._fits(self.waiting[0])
        ):
            seats = self.waiting.popleft()
            prefill = self.batch.prefill(seats[0])
            self._began.append([seats[0].job, prefill.known])
            self.reading = (seats, prefill)
        if self.reading is not None:
            seats, prefill = self.reading
            prefill.advance(CHUNK)
            if prefill.done:
                self.reading = None
                self._note(self.batch.enter(seats, prefill))

    def _read_short(self) -> None:
        groups: list[list[Seat]] = []
        taken = 0
        while self.waiting and taken < TOGETHER_TOKENS:
            seats = self.waiting[0]
            if _length(seats) > SHORT_TOKENS or not self._fits(*groups, seats):
                break
            groups.append(self.waiting.popleft())
            self._began.append([seats[0].job, 0])
            taken += _length(seats)
        if groups:
            self._note(self.batch.join(groups))

    def _fits(self, *groups: list[Seat]) -> bool:
        reading = len(self.reading[0]) if self.reading is not None else 0
        return self.batch.fits(groups, reserved=reading)

    def _note(self, rows: Sequence[Row]) -> None:
        for row in rows:
            assert isinstance(row, Seat)
            if row.trouble:
                self._refused.append([row.job, row.trouble])
                continue
            for back in range(row.told - len(row.said), 0):  # two where a guess was right
                tops = row.tops[back] if row.top is not None else None
                finish = row.finish if back == -1 else None
                self._said.append(
                    [row.job, row.choice, row.said[back], row.logprobs[back], tops, finish]
                )
            row.told = len(row.said)

    def load(self) -> dict[str, float]:
        return {
            "running": len(self.batch.rows),
            "waiting": sum(map(len, self.waiting)) + (len(self.reading[0]) if self.reading else 0),
            "cache_used_ratio": self.batch.used_tokens / self.batch.capacity_tokens,
            "prefix_queries": self.batch.blocks.queries,
            "prefix_hits": self.batch.blocks.hits,
            "preemptions": self.batch.preemptions,
            "guessed": self.batch.guessed,
            "guesses_kept": self.batch.kept,
        }


def _real_cpu(accelerator: Accelerator) -> bool:
    """Compiled steps bypass torch, through which the faults of a simulated chip act."""
    return accelerator.device.type == "cpu" and not accelerator.info().simulated


def _length(seats: Sequence[Seat]) -> int:
    return len(seats[0].prompt) + len(seats[0].said)


class Line:
    """The socket to the server: a thread reads, the owner writes. The process ends with its server."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.arrived: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True, name="listen").start()

    def send(self, message: dict[str, Any]) -> None:
        self._connection.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    def _listen(self) -> None:
        with self._connection.makefile("rb") as stream:
            for line in stream:
                self.arrived.put(json.loads(line))
        os._exit(0)


def work(desk: Desk, line: Line) -> None:
    """For ever: take what arrived, tick, report. Waits without spinning while there is nothing to do."""
    while True:
        _take(desk, line, wait=not desk.busy)
        while desk.busy:
            line.send(desk.tick())
            _take(desk, line, wait=False)
        line.send(
            {"said": [], "began": [], "refused": [], "scored": [], "load": desk.load()}
        )  # what was cancelled last is gone too


def _take(desk: Desk, line: Line, *, wait: bool) -> None:
    while True:
        try:
            message = line.arrived.get(block=wait)
        except queue.Empty:
            return
        wait = False
        if "submit" in message:
            desk.submit(message["submit"])
        elif "score" in message:
            desk.to_score.append(message["score"])
        elif "cancel" in message:
            desk.cancel(*message["cancel"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Serve one model on one chip to a bascule server.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--accelerator", required=True)
    parser.add_argument(
        "--fd", type=int, required=True, help="number of the connected socket this process inherits"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of simulated chips")
    parser.add_argument(
        "--slots", type=int, default=256, help="sequences that run together at most"
    )
    parser.add_argument("--reproducible", action="store_true")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32")
    parser.add_argument("--speculate", type=int, default=0, help="guess while at most so many run")
    parser.add_argument("--fault-log", type=Path)
    options = parser.parse_args(arguments)
    line = Line(socket.socket(fileno=options.fd))
    try:
        start = time.perf_counter()
        accelerator = open_accelerator(
            options.accelerator, seed=options.seed, fault_log=options.fault_log
        )
        accelerator.prepare(options.threads)
        tokenizer = open_tokenizer(options.model)
        model, _ = load_hf(options.model)
        sha256 = fingerprint(model)
        desk = Desk(
            accelerator.move(model).eval(),
            accelerator,
            tokenizer,
            slots=options.slots,
            reproducible=options.reproducible,
            precision=options.precision,
            speculate=options.speculate,
        )
        about = _about(desk, sha256, time.perf_counter() - start)
        kl, noise = _cost_of_precision(desk, tokenizer.eos_id)
        line.send({"ready": {**about, "kl_to_fp32": kl, "audit_noise": noise}})
        work(desk, line)
    except torch.AcceleratorError as error:
        line.send({"fault": {"kind": DeviceFault.__name__, "message": f"The chip failed: {error}"}})
    except torch.OutOfMemoryError as error:
        line.send(
            {
                "fault": {
                    "kind": OutOfMemory.__name__,
                    "message": f"The chip's memory is exhausted: {error}",
                }
            }
        )
    except BasculeError as error:
        line.send({"fault": {"kind": type(error).__name__, "message": str(error)}})
    return 1


def _about(desk: Desk, sha256: str, seconds: float) -> dict[str, Any]:
    chip = desk.accelerator.info()
    return {
        "accelerator": desk.accelerator.name,
        "chip": chip.name,
        "vendor": chip.vendor,
        "driver": chip.driver,
        "simulated": chip.simulated,
        "fallback_note": desk.accelerator.fallback_note,
        "weights_sha256": sha256,
        "dtype": str(_dtype(desk.batch)).removeprefix("torch."),
        "precision": desk.batch.precision,
        "decoder": "compiled"
        if desk.batch.native
        else "recorded"
        if desk.batch.records
        else "torch",
        "decoder_note": why_not() if _real_cpu(desk.accelerator) else "",
        "reproducible": desk.batch.reproducible,
        "slots": desk.batch.slots,
        "context": desk.batch.length,
        "start_s": seconds,
    }


def _dtype(batch: Batch) -> torch.dtype:
    plain = batch.model.lm_head.weight.dtype
    return plain if batch.precision == "fp32" else DTYPES[batch.precision]


@torch.inference_mode()
def _cost_of_precision(desk: Desk, first: int) -> tuple[float, float]:
    """On a text that this engine says itself: nats a token from fp32, and how far (RMS) a log-probability may lie from what a right
    referee of the same precision says. int8 rounds weights, alike everywhere; bf16 rounds activations too, each time a little differently."""
    batch = desk.batch
    if batch.precision == "fp32":
        return 0.0, 0.0
    row = Row([first], Sampling(max_tokens=min(TRIED_TOKENS, batch.length - 1)))
    with desk.accelerator.session(Work("infer", 1)):
        batch.join([[row]])
        while batch.rows:
            batch.step()
        judge = batch.model if batch.precision == "bf16" else batch.reader
        read = [tops[0][1] for tops in score(judge, row.text, 0)]
        squares = [(a - b) ** 2 for a, b in zip(read, row.logprobs, strict=True)]
        return divergence(batch.model, batch.reader, row.text), fmean(squares) ** 0.5


if __name__ == "__main__":
    raise SystemExit(main())
