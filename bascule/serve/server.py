"""`bascule serve`: open the door, start the engine, answer until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata, resources
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from bascule.config.load import read_resolved
from bascule.config.recipe import Recipe
from bascule.data.tasks.registry import get as get_task
from bascule.data.text_tokenizer import open_tokenizer
from bascule.errors import BasculeError, DeviceFault, UsageError
from bascule.folder import RunFolder
from bascule.ledger import Ledger, last, of_kind, read_ledger
from bascule.records import (
    AnyRecord,
    Placement,
    PoolCondemned,
    PoolReadmitted,
    RunFinished,
    Verdict,
    WeightsRenewed,
)
from bascule.serve.broker import Broker
from bascule.serve.door import Door
from bascule.serve.hush import hush
from bascule.serve.inflight import Candidate
from bascule.serve.openai import Renew, application
from bascule.serve.renewal import Renewal
from bascule.serve.service import Service
from bascule.terminal import let_go_of_dead_terminal

BODY_LIMIT_BYTES = 1 << 20
DRAIN_S = 30
EXAMPLES = 4
EXAMPLE_SEED = 7


def run(
    folder: RunFolder,
    accelerator: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    slots: int = 256,
    hang_timeout_s: float = 30.0,
    precision: str | None = None,
    allow_origins: Sequence[str] = (),
) -> None:
    """Serve a finished run's model until SIGTERM or Ctrl-C. Other pools whose verdict says `infer` stand by.

    Raises UsageError when the port is taken, the accelerator is unknown or the model folder is damaged, DeviceFault when no chip
    can serve.
    """
    recipe = read_resolved(folder.recipe)
    with bind(host, port) as listener:
        asyncio.run(
            _serve(
                folder,
                recipe,
                accelerator,
                listener,
                api_key,
                slots,
                hang_timeout_s,
                precision,
                allow_origins,
            )  # fmt: skip
        )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the model is loaded: a port in use is known at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        why = error.strerror if isinstance(error, OSError) else "ports end at 65535"
        raise UsageError(
            f"Cannot listen on {host}:{port} ({why}). Choose another with --host and --port, or end what uses it."
        ) from None
    listener.listen(1024)
    return listener


async def _serve(
    folder: RunFolder,
    recipe: Recipe,
    accelerator: str,
    listener: socket.socket,
    api_key: str | None,
    slots: int,
    hang_timeout_s: float,
    precision: str | None,
    allow_origins: Sequence[str],
) -> None:
    ledger = Ledger(folder.ledger)
    records = read_ledger(folder.ledger)

    def open_broker(model: Path) -> Broker:
        return Broker(
            model,
            candidates(recipe, read_ledger(folder.ledger), accelerator),
            threads=recipe.threads,
            seed=recipe.seed,
            slots=slots,
            reproducible=recipe.serve.reproducible,
            precision=precision or recipe.serve.precision,
            speculate=recipe.serve.speculate,
            max_queue=recipe.serve.max_queue,
            hang_timeout_s=hang_timeout_s,
            fault_logs=folder.ground_truth,
            audit_every=recipe.serve.audit_every,
            note=lambda what, candidate, text: _note(ledger, what, candidate, text),
        )

    def open_referee(model: Path, precision: str) -> Broker | None:
        """The CPU judges what another chip answers: int8 in the same precision, bf16 in fp32, from which its bound was measured."""
        if not recipe.serve.audit_every or all(
            one.accelerator == "cpu" for one in candidates(recipe, records, accelerator)
        ):
            return None
        return Broker(
            model, [Candidate("referee", "cpu")], threads=recipe.threads, slots=1, precision="fp32" if precision == "bf16" else precision
        )  # fmt: skip

    name = recipe.name
    tries: list[str] = []
    service = Service(
        open_broker(folder.model), open_tokenizer(folder.model), model=name, timeout_s=recipe.serve.timeout_s
    )  # fmt: skip
    renewal = Renewal(service, open_broker, open_referee)

    async def renew(model: str | None, sha256: str | None) -> dict[str, Any]:
        target = folder.root / model if model else folder.model
        done = await renewal.renew(target, sha256)
        if done.changed:
            ledger.append(
                WeightsRenewed(
                    sha256=done.weights_sha256, folder=str(target), worst=done.worst, seconds=done.seconds
                )
            )  # fmt: skip
        return asdict(done)

    app = application(
        service,
        about=lambda: {**about(name, service.broker, records), "examples": tries},
        page=page(),
        renew=renew if api_key else None,
    )
    local = listener.getsockname()[0] in ("127.0.0.1", "::1")
    if not local and not api_key:
        ledger.warn(
            "open server",
            f"whoever reaches {_url(listener)} can use this server: it asks for no key. Give one with --api-key-file, or leave --host out.",
        )
    door: ASGIApp = Door(app, api_key=api_key, local_only=local, body_limit_bytes=BODY_LIMIT_BYTES)
    if (
        allow_origins
    ):  # outside the door: a page may read refusals too, and asks before it has shown a key
        door = CORSMiddleware(
            door, allow_origins=allow_origins, allow_methods=["GET", "POST"], allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )  # fmt: skip
    server = DrainingServer(
        service,
        uvicorn.Config(
            door,
            log_level="warning",
            timeout_graceful_shutdown=DRAIN_S,
            server_header=False,
            access_log=False,
            lifespan="off",
        ),
    )
    hush()
    await service.broker.start()
    try:
        chip = service.broker.about
        asked = precision or recipe.serve.precision
        if asked != "fp32" and chip["dtype"] == "float32":
            _say(f"precision {asked} was asked for; it is served in fp32: bf16 and int8 are for larger models, int8 for CPUs.")  # fmt: skip
        if chip["kl_to_fp32"]:
            _say(
                f"It computes in {chip['dtype']}: {chip['kl_to_fp32']:.1e} nats a token from fp32, measured on {chip['chip']}."
            )
        _say(
            f"{name} answers on {_url(listener)} ({chip['chip']}, {chip['accelerator']}); the chat page is at the same address."
        )
        # Making problems imports a large library: it must not stand between the start and the first answer.
        beside = [
            asyncio.create_task(_fill(tries, recipe)),
            asyncio.create_task(
                _appoint(service.broker, open_referee(folder.model, str(chip["precision"])), ledger)
            ),
            asyncio.create_task(server.drain()),
        ]

        def on_hangup() -> None:
            """A terminal that closed ends what was started in it; sent by hand, or to a server without one, SIGHUP renews."""
            if let_go_of_dead_terminal():
                signal.raise_signal(signal.SIGTERM)
            else:
                beside.append(asyncio.create_task(_renew_and_say(renew)))

        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_hangup)
        with contextlib.suppress(asyncio.CancelledError):
            await server.serve(sockets=[listener])
        for task in beside:
            task.cancel()
    finally:
        await renewal.close()


class DrainingServer(uvicorn.Server):
    """uvicorn closes its port on the first signal. Here new requests are told 503 and when to come back, and `/ready` says so, until the
    answers under way have ended or DRAIN_S are over; a second signal does not wait for them."""

    def __init__(self, service: Service, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._service = service
        self._asked: tuple[int, FrameType | None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            super().handle_exit(sig, frame)
        self._service.draining, self._asked = True, (sig, frame)

    async def drain(self) -> None:
        while self._asked is None:
            await asyncio.sleep(0.1)
        end = time.monotonic() + DRAIN_S
        while self._service.broker.running and time.monotonic() < end and not self.should_exit:
            await asyncio.sleep(0.1)
        self.config.timeout_graceful_shutdown = max(1, int(end - time.monotonic()))
        if not self.should_exit:
            super().handle_exit(*self._asked)


def candidates(recipe: Recipe, records: Sequence[AnyRecord], accelerator: str) -> list[Candidate]:
    """The accelerator asked for first, then every other pool that is fit for `infer` and not condemned, in the owner's order."""
    verdicts = {
        record.pool: record for record in of_kind(records, Verdict) if record.role == "infer"
    }
    placed = last(records, Placement)
    order = [placed.infer] if placed else []
    order += [pool for pool in recipe.order if pool not in order]
    first = next((pool for pool in order if recipe.pools[pool].accelerator == accelerator), None)
    out = _condemned(records)
    standby = [
        pool
        for pool in order
        if pool != first
        and pool not in out
        and pool in verdicts
        and verdicts[pool].verdict == "fit"
    ]
    found = [
        _candidate(recipe, pool, verdicts.get(pool))
        for pool in ([first] if first else []) + standby
    ]
    return found if first else [Candidate(None, accelerator), *found]


def about(name: str, broker: Broker, records: Sequence[AnyRecord]) -> dict[str, Any]:
    """What `/version` and the page tell: versions, the chip that answers, its verdict, and what stands by."""
    candidate, finished = broker.candidate, last(records, RunFinished)
    return {
        "version": metadata.version("bascule"),
        "model": name,
        "status": broker.state,
        "context": broker.about.get("context"),
        "reproducible": broker.about.get("reproducible"),
        "dtype": broker.about.get("dtype"),
        "decoder": broker.about.get("decoder"),
        "kl_to_fp32": broker.about.get("kl_to_fp32"),
        "weights_sha256": broker.about.get("weights_sha256"),
        "trained_steps": finished.steps if finished else None,
        "chip": {
            "pool": candidate.pool,
            "accelerator": candidate.accelerator,
            "name": broker.about.get("chip"),
            "driver": broker.about.get("driver"),
            "simulated": broker.about.get("simulated"),
            "verdict": candidate.verdict,
            "verdict_id": candidate.verdict_id,
            "reasons": list(candidate.reasons),
        },
        "standby": [
            other.pool or other.accelerator for other in broker.candidates if other is not candidate
        ],
        "moves": broker.moves,
        "audits": {"done": broker.audits.done, "worst_logprob_difference": broker.audits.worst},
        "trouble": broker.trouble or None,
    }


def examples(recipe: Recipe) -> list[str]:
    """Questions of the kind the model was trained on, for the page; drawn with a seed of their own."""
    each = max(1, EXAMPLES // len(recipe.data.tasks))
    return [
        problem.question
        for task in recipe.data.tasks
        for problem in get_task(task.name).problems(EXAMPLE_SEED, each, task.options)
    ]


async def _appoint(broker: Broker, referee: Broker | None, ledger: Ledger) -> None:
    """Started beside the server, never in its way; once appointed, the broker closes it."""
    if referee is None:
        return
    try:
        await referee.start()
    except asyncio.CancelledError:
        await referee.close()
        raise
    except (DeviceFault, UsageError) as error:
        ledger.warn("no audit", f"the referee did not start, so answers are not audited: {error}")
        return
    broker.appoint(referee)


async def _renew_and_say(renew: Renew) -> None:
    """SIGHUP: nobody waits for an answer, so the outcome goes to stderr."""
    try:
        done = await renew(None, None)
    except BasculeError as error:
        _say(f"The weights stay as they are: {error}")
        return
    word = "are served now" if done["changed"] else "were served already"
    _say(f"The weights {done['weights_sha256'][:12]} {word}.")


async def _fill(tries: list[str], recipe: Recipe) -> None:
    tries += await asyncio.to_thread(examples, recipe)


def page() -> str:
    return resources.files("bascule.serve").joinpath("page.html").read_text(encoding="utf-8")


def _candidate(recipe: Recipe, pool: str, verdict: Verdict | None) -> Candidate:
    return Candidate(
        pool,
        recipe.pools[pool].accelerator,
        verdict.verdict if verdict else None,
        _verdict_id(verdict) if verdict else None,
        verdict.reasons if verdict else (),
    )


def _verdict_id(verdict: Verdict) -> str:
    """Names one verdict of the ledger: by its content, since records have no numbers."""
    return hashlib.sha256(verdict.model_dump_json().encode()).hexdigest()[:16]


def _condemned(records: Sequence[AnyRecord]) -> set[str | None]:
    found: set[str | None] = set()
    for record in records:
        if isinstance(record, PoolCondemned) and record.role == "infer":
            found.add(record.pool)
        elif isinstance(record, PoolReadmitted) and record.role == "infer":
            found.discard(record.pool)
    return found


def _note(ledger: Ledger, what: str, candidate: Candidate, text: str) -> None:
    """Every failure and move is a warning in the run's ledger; a chip that failed while serving is condemned for `infer`. One that did not
    start is not: the run's folder may lie on another machine today."""
    ledger.warn(what, f"{candidate.pool or candidate.accelerator}: {text}")
    if what == "serving chip failed" and candidate.pool is not None:
        ledger.append(
            PoolCondemned(
                pool=candidate.pool,
                role="infer",
                incident_id=None,
                reason=f"failed while serving: {text}",
            )
        )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
