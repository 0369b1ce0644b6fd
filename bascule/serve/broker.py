"""The server's hold on its engine: hands requests to the engine's process, tokens back to the requests, and when the chip fails,
moves on: the next pool with an `infer` verdict takes over every unfinished request from its prompt, its seed and what it had said.
Nothing is answered from the failed chip's cache, and nobody's stream breaks. No torch here.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from bascule.errors import DeviceFault, UsageError
from bascule.infer.sequence import Sampling
from bascule.serve import audits
from bascule.serve.inflight import Answer, Candidate, Marks, Referee, Refused, Said, Ticket
from bascule.serve.process import EngineProcess
from bascule.serve.scorings import Scorings
from bascule.serve.suspects import Suspects

State = Literal["starting", "serving", "moving", "down", "closed"]
CRASHED = 1  # exit code of Python after an exception; a chip that fails says so first, or ends the process by a signal
CRASHES = 2  # in a row, with nothing said and nobody to blame between them
CRASHED_BY = (
    "The engine ended twice on this request. It is not tried again; the server's log says why."
)
RESTARTS = 2  # of the same pool, when its process died and no other pool is left
FORM_FAILED = "This answer cannot follow its form: {why}. The form is too large, or asks for characters that the model's vocabulary does not have."


class Broker:
    """Lives in the server's event loop. `note(kind, text)` tells the ledger about faults and moves."""

    def __init__(
        self,
        model: Path,
        candidates: Sequence[Candidate],
        *,
        threads: int = 1,
        seed: int = 0,
        slots: int = 256,
        reproducible: bool = False,
        precision: str = "fp32",
        speculate: int = 0,
        max_queue: int = 64,
        hang_timeout_s: float = 30.0,
        start_timeout_s: float = 180.0,
        fault_logs: Path | None = None,
        audit_every: int = 0,
        note: Callable[[str, Candidate, str], None] = lambda kind, candidate, text: None,
    ) -> None:
        self.candidates = list(candidates)
        self.state: State = "starting"
        self.trouble = ""
        self.moves = 0
        self.about: dict[str, Any] = {}
        self.load: dict[str, float] = {}
        self.tickets: dict[int, Ticket] = {}
        self.changed = asyncio.Event()
        self._model, self._threads, self._seed, self._slots = model, threads, seed, slots
        self._precision = precision
        self._mode = ["--speculate", str(speculate), *(["--reproducible"] if reproducible else [])]
        self._max_queue, self._hang_s, self._start_s = max_queue, hang_timeout_s, start_timeout_s
        self._fault_logs, self._note = fault_logs, note
        self.audits = audits.Audits(audit_every)
        self._failed: set[int] = set()
        self._sentence = ""  # why we end an engine that may still be alive
        self._deaths = self._crashes = 0
        self._suspects = Suspects(self._hand_over)
        self._at = 0
        self._ids = itertools.count(1)
        self.scorings = Scorings(self._ids, self._ask_score)
        self._engine: EngineProcess | None = None
        self._heard_s = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def candidate(self) -> Candidate:
        return self.candidates[self._at]

    @property
    def running(self) -> int:
        """Sequences in flight, waiting ones and prompts to be scored included."""
        return sum(len(ticket.open) for ticket in self.tickets.values()) + len(self.scorings)

    @property
    def limit(self) -> int:
        """Sequences that may be in flight together."""
        return int(self.about.get("slots", self._slots)) + self._max_queue

    async def start(self) -> None:
        """Open the first candidate that works. Raises DeviceFault when none does, UsageError when what was asked is at fault."""
        await self._open_next("start")
        self._spawn(self._watch(), "watch engine")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def appoint(self, referee: Referee) -> None:
        """From now on every `audit_every`-th answer is compared with what `referee` thinks of it."""
        self.audits.appoint(referee)

    async def worst_difference(self, answer: Answer) -> float:
        """This broker as another one's referee."""
        self._check_answering()
        text = [*answer.prompt, *answer.said]
        scores = await self.scorings.read(text, temperature=answer.temperature)
        ours = [tops[0][1] for tops in scores[-len(answer.said) :]]
        return max(abs(a - b) for a, b in zip(ours, answer.logprobs, strict=True))

    async def close(self) -> None:
        self.state = "closed"
        for task in self._tasks:
            task.cancel()
        await self._end_engine()
        await self.audits.dismiss()

    @property
    def audit_bound(self) -> float:
        """Allowed between two right engines of this precision."""
        return audits.bound(float(self.about["audit_noise"]))

    def submit(
        self,
        prompt: list[int],
        sampling: Sampling,
        *,
        choices: int = 1,
        top: int | None = None,
        form: dict[str, Any] | None = None,
    ) -> Ticket:
        """`form`: the keywords of the worker's Grammars.constraint. Raises Refused with 429 when the queue is full, 503 when no chip answers."""
        self._check_answering()
        self.check_queue(choices)
        ticket = Ticket(
            next(self._ids),
            prompt,
            sampling,
            top,
            form,
            [[] for _ in range(choices)],
            set(range(choices)),
            dtype=str(self.about.get("dtype")),
        )
        self.tickets[ticket.id] = ticket
        self._suspects.take(ticket)
        return ticket

    def check_queue(self, more: int) -> None:
        """Raises Refused with 429 when `more` sequences do not fit."""
        if self.running + more > self.limit:
            raise Refused(
                429,
                f"{self.running} sequences are in flight, {self.limit} are the limit of this server. Try again in a moment.",
                retry_after_s=1,
            )

    def _check_answering(self) -> None:
        if self.state in ("down", "closed"):
            raise Refused(503, f"No chip answers: {self.trouble or 'the server is closing'}.")

    async def score(self, prompt: list[int], top: int) -> Marks:
        """What the model thinks of a prompt's tokens. Raises Refused when no chip answers."""
        self._check_answering()
        return await self.scorings.read(prompt, top=top)

    async def marks(self, prompt: list[int], said: list[int]) -> Marks:
        """The marks of an answer, for its stamp. Raises Refused when no chip answers."""
        self._check_answering()
        return await self.scorings.read(prompt, said=said)

    def _ask_score(self, message: dict[str, Any]) -> None:
        if not self.tickets:
            self._heard_s = time.monotonic()
        self._send(message)

    def cancel(self, ticket: Ticket, choice: int | None = None) -> None:
        """The reader has enough of one choice, or of all. Safe to call at any time, more than once."""
        if ticket.id not in self.tickets:
            return
        ticket.open -= {choice} if choice is not None else set(ticket.open)
        if not ticket.open:
            del self.tickets[ticket.id]
        self._send({"cancel": [ticket.id, choice]})
        if not ticket.open:
            self._suspects.clear(ticket)

    def _hand_over(self, ticket: Ticket) -> None:
        if not self.tickets or len(self.tickets) == 1:
            self._heard_s = time.monotonic()  # the engine was idle and silent by right
        self._send(
            {
                "submit": {
                    "id": ticket.id,
                    "prompt": ticket.prompt,
                    "sampling": asdict(ticket.sampling),
                    "top": ticket.top,
                    "form": ticket.form,
                    "rows": [
                        {"choice": choice, "said": ticket.said[choice]}
                        for choice in sorted(ticket.open)
                    ],
                }
            }
        )

    def _send(self, message: dict[str, Any]) -> None:
        """While a move is under way there is nobody to send to; the next engine gets every open ticket anyhow."""
        if self._engine is not None and self.state == "serving":
            self._engine.say(message)

    # ---- the engine's life

    async def _open_next(self, why: str) -> None:
        """Try candidates in order, those that failed left out."""
        while True:
            left = [at for at in range(len(self.candidates)) if at not in self._failed]
            if not left:
                self._give_up(why)
                raise DeviceFault(
                    f"No chip can serve this model: {self.trouble}. See `bascule qualify`, or name another with --on."
                )
            self._at = left[0]
            try:
                await self._open()
            except DeviceFault as error:
                self._fail(str(error), "serving chip did not start")
                continue
            except UsageError as error:
                if self.moves and self._precision != "fp32":
                    # Refused at the start, when somebody can choose; in the middle of answers fp32 is better than none.
                    self._note("precision fallback", self.candidate, f"{error} It serves in fp32 from now on.")  # fmt: skip
                    self._precision = "fp32"
                    await self.audits.dismiss()
                    continue
                self.trouble = str(error)
                self._give_up(why)
                raise
            return

    async def _open(self) -> None:
        """Start the engine's process on the present candidate and hand it all open tickets."""
        arguments = ["--model", str(self._model), "--threads", str(self._threads), "--seed", str(self._seed), "--slots", str(self._slots),
                     "--precision", self._precision, *self._mode]  # fmt: skip
        if self._fault_logs is not None:
            log = self._fault_logs / f"{self.candidate.pool or 'chip'}-serve.jsonl"
            arguments += ["--fault-log", str(log)]
        self._sentence = ""
        engine = await EngineProcess.start(self.candidate.accelerator, arguments, self._start_s)
        if self.about and self.about["weights_sha256"] != engine.ready["weights_sha256"]:
            self._drop_begun()
        self._engine, self.about = engine, engine.ready
        self.state = "serving"
        self._heard_s = time.monotonic()
        if self.about["fallback_note"]:
            self._note("accelerator fallback", self.candidate, self.about["fallback_note"])
        if self.about["decoder_note"]:
            why = f"{self.about['decoder_note']}; steps go through torch and are several times slower. Install g++ or clang++."
            self._note("no compiled decoder", self.candidate, why)
        for ticket in self.tickets.values():
            ticket.moves += self.moves > 0
            if not self._suspects.pending:
                self._hand_over(ticket)
        self._suspects.begin()
        self.scorings.ask_again()
        self._spawn(self._listen(engine), "listen to engine")

    def _drop_begun(self) -> None:
        """The folder holds other weights than the engine that failed had: no answer may be half of one and half of the other."""
        for ticket in list(self.tickets.values()):
            if any(ticket.said):
                ticket.arrivals.put_nowait(
                    Refused(
                        503,
                        "The weights were replaced while this answer was being written. Ask again.",
                    )
                )
                del self.tickets[ticket.id]

    async def _listen(self, engine: EngineProcess) -> None:
        """Until the engine ends. A fault line, or an end without one, is a failure of the chip or its process."""
        while (message := await engine.hear()) is not None:
            if "fault" in message:
                await self._move(message["fault"]["message"], died=False)
                return
            self._deliver(message)
        if not engine.at_end and not self._sentence:
            engine.kill()  # alive, but what it wrote is no message: waiting for its end could take for ever
        if self.state != "closed":
            code = await engine.code()
            if code == CRASHED and self._crashes < CRASHES:
                await self._restart_after_crash()
            else:
                ended = f"the engine's process ended with exit code {code}"
                await self._move(self._sentence or ended, died=True)

    async def _watch(self) -> None:
        """An engine that owes tokens and is silent for too long is hung: end it, which `_listen` then sees."""
        while True:
            await asyncio.sleep(min(1.0, self._hang_s / 4))
            if (
                self.state == "serving"
                and (self.tickets or self.scorings)
                and time.monotonic() - self._heard_s > self._hang_s
            ):
                self._end_for(f"it said nothing for {self._hang_s:g} s")

    def _end_for(self, why: str) -> None:
        """Leave the present chip for a reason of ours. `_listen` sees the end of its engine and moves on; the ledger gets this reason."""
        self._sentence = why
        self._failed.add(self._at)
        if self._engine is not None:
            self._engine.kill()

    async def _restart_after_crash(self) -> None:
        """Our own exception in the engine (its traceback is on stderr): no chip is to blame, but a request may be."""
        guilty = self._suspects.accuse(self.tickets.values())
        self._crashes += guilty is None
        if guilty is not None:
            self.cancel(guilty)
            guilty.arrivals.put_nowait(Refused(500, CRASHED_BY))
        self.scorings.crashed(Refused(500, CRASHED_BY))
        self._note(
            "engine crashed", self.candidate,
            f"an exception of its own, see stderr; started again{'' if guilty is None else ', without the request that did it'}",
        )  # fmt: skip
        await self._move("", died=True, blame=False)

    async def _move(self, reason: str, *, died: bool, blame: bool = True) -> None:
        """The present candidate failed. Go on elsewhere, or once more here if only its process died and nothing else is left."""
        self.state = "moving"
        self.moves += 1
        await self._end_engine()
        self._deaths += died and blame
        only_one = all(at in self._failed for at in range(len(self.candidates)) if at != self._at)
        again = died and only_one and self._at not in self._failed and self._deaths <= RESTARTS
        if blame:
            self._suspects = Suspects(self._hand_over)
        if blame and not again:
            self._fail(reason)
        elif blame:
            self._note(
                "engine restarted",
                self.candidate,
                f"serving on '{self.candidate.accelerator}': {reason}; started again, unfinished answers go on",
            )
        try:
            await self._open_next(reason)
        except (DeviceFault, UsageError) as error:
            for ticket in list(self.tickets.values()):
                ticket.arrivals.put_nowait(Refused(503, str(error)))
            self.tickets.clear()
            self.scorings.refuse_all(Refused(503, str(error)))
        self._announce()

    def _fail(self, reason: str, what: str = "serving chip failed") -> None:
        self._failed.add(self._at)
        self.trouble = f"{self.trouble}; {reason}" if self.trouble else reason
        self._note(what, self.candidate, reason)

    def _give_up(self, why: str) -> None:
        self.state = "down"
        self._announce()

    def _announce(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def _end_engine(self) -> None:
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await engine.end()

    async def _audit(self, ticket: Ticket, choice: int, moves: int) -> None:
        """Let the referee score a finished answer; an engine that it contradicts is ended."""
        said, logprobs = ticket.said[choice], ticket.logprobs[choice]
        answer = Answer(ticket.prompt, said, logprobs, ticket.sampling.temperature or 1.0)
        worst = await self.audits.difference(answer)
        if not worst <= self.audit_bound and moves == self.moves:
            self._end_for(
                f"log-probabilities of an audited answer differ by {worst:.2g} from the referee's ({self.audit_bound:.2g} is allowed)"
            )

    def _deliver(self, message: dict[str, Any]) -> None:
        self._heard_s = time.monotonic()
        self.load = message["load"]
        if message.get("warned"):
            self._note("steps run operator by operator", self.candidate, message["warned"])
        for job, cached in message["began"]:
            if job in self.tickets:
                self.tickets[job].cached_tokens = cached
        for job, scores in message["scored"]:
            self.scorings.take(job, scores)
        for job, why in message["refused"]:
            refused = self.tickets.get(job)
            if refused is not None:
                self.cancel(refused)
                refused.arrivals.put_nowait(Refused(400, FORM_FAILED.format(why=why.strip())))
        for job, choice, token, logprob, tops, finish in message["said"]:
            ticket = self.tickets.get(job)
            if ticket is None or choice not in ticket.open:
                continue  # cancelled meanwhile
            self._crashes = 0
            self._suspects.clear(ticket)
            ticket.said[choice].append(token)
            ticket.logprobs[choice].append(logprob)
            if finish is not None:
                # One that two chips wrote, because serving moved, proves nothing.
                if self.audits.due() and not ticket.moves and self.candidate.accelerator != "cpu":
                    self._spawn(self._audit(ticket, choice, self.moves), "audit")
                ticket.open.discard(choice)
                if not ticket.open:
                    del self.tickets[job]
            ticket.arrivals.put_nowait(Said(choice, token, logprob, tops, finish))
