"""New weights while serving: a second engine reads them, is audited, and takes over; what the old one has begun, the old one finishes.

Nobody waits and nothing is mixed: a request belongs to the engine it was handed to. For that while both models are in memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bascule.data.text_tokenizer import open_tokenizer
from bascule.data.tokenizer import Tokenizer
from bascule.errors import CheckFailed, UsageError
from bascule.infer.sequence import Sampling
from bascule.serve.broker import Broker
from bascule.serve.inflight import Answer, Refused
from bascule.serve.service import Service

PROBES = ("1+2=?", "Why?", "9-8+0+7=?")
PROBE_TOKENS = 24
LOOK_S = 0.2


@dataclass(frozen=True)
class Renewed:
    """`changed` is false when the folder holds what is served already. `worst`: of the audit's log-probabilities."""

    changed: bool
    weights_sha256: str
    worst: float
    seconds: float


class Renewal:
    """`open_broker(folder)` makes an unstarted broker; `open_referee(folder, precision)` another kind of chip, or None
    where there is none."""

    def __init__(
        self,
        service: Service,
        open_broker: Callable[[Path], Broker],
        open_referee: Callable[[Path, str], Broker | None],
    ) -> None:
        self.service = service
        self._open_broker, self._open_referee = open_broker, open_referee
        self._one_at_a_time = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    async def renew(self, folder: Path, sha256: str | None = None) -> Renewed:
        """Serve `folder` from now on; `sha256`: the weights it must hold. The old model goes on when anything is wrong.

        Raises UsageError for a folder that cannot be served here, CheckFailed when the audit says no, DeviceFault when no chip can.
        """
        async with self._one_at_a_time:
            start = time.monotonic()
            self._check_vocabulary(folder)
            broker = self._open_broker(folder)
            try:
                await broker.start()
                worst = await self._audited(broker, folder, sha256)
            except BaseException:
                await broker.close()
                raise
            found = str(broker.about["weights_sha256"])
            changed = found != self.service.broker.about["weights_sha256"]
            if changed:
                self.service.broker, old = broker, self.service.broker
                self._retire(old)
            else:
                await broker.close()
            return Renewed(changed, found, worst, time.monotonic() - start)

    async def close(self) -> None:
        """Old engines that are still speaking end with the server."""
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await self.service.broker.close()

    def _check_vocabulary(self, folder: Path) -> None:
        ours, theirs = self.service.tokenizer, open_tokenizer(folder)
        if _vocabulary(ours) != _vocabulary(theirs):
            raise UsageError(
                f"'{folder}' has another vocabulary or chat template than the model that is served; requests in flight and their clients "
                "rely on it. Start a server of its own for it."
            )

    async def _audited(self, broker: Broker, folder: Path, sha256: str | None) -> float:
        """What the new engine says is scored again, on the referee's chip, or where there is none by reading it in one go."""
        about = broker.about
        if sha256 is not None and sha256 != about["weights_sha256"]:
            raise CheckFailed(
                f"'{folder}' holds the weights {about['weights_sha256']}; {sha256} were asked for. Copy the folder again."
            )
        if about["context"] != self.service.context:
            raise UsageError(
                f"'{folder}' has a context of {about['context']} tokens, the model that is served {self.service.context}. Start a server of its own."
            )
        referee = self._open_referee(folder, str(about["precision"]))
        if referee is not None:
            await referee.start()
            broker.appoint(referee)
        judge = referee or broker
        if judge.about["weights_sha256"] != about["weights_sha256"]:
            raise CheckFailed(
                f"'{folder}' changed while it was read. Write it whole, then renew again."
            )
        worst = max([await _probe(broker, judge, self.service.tokenizer, text) for text in PROBES])
        if not worst <= broker.audit_bound:
            raise CheckFailed(
                f"The new weights were refused: log-probabilities of what they say differ by {worst:.2g} from the referee's ({broker.audit_bound:.2g} is "
                "allowed). Qualify the chip; the old weights go on serving."
            )
        return worst

    def _retire(self, old: Broker) -> None:
        async def wait() -> None:
            try:
                while old.tickets or old.scorings:
                    await asyncio.sleep(LOOK_S)
            finally:
                await old.close()

        task = asyncio.create_task(wait(), name="retire engine")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)


async def _probe(broker: Broker, judge: Broker, tokenizer: Tokenizer, text: str) -> float:
    prompt = tokenizer.encode(tokenizer.prompt(text), replace_unknown=True)
    room = int(broker.about["context"]) - len(prompt)
    ticket = broker.submit(prompt, Sampling(temperature=0.0, max_tokens=min(PROBE_TOKENS, room)))
    while True:
        arrival = await ticket.arrivals.get()
        if isinstance(arrival, Refused):
            raise CheckFailed(
                f"The new weights were refused: {arrival}. The old ones go on serving."
            )
        if arrival.finish is not None:
            break
    return await judge.worst_difference(Answer(prompt, ticket.said[0], ticket.logprobs[0], 1.0))


def _vocabulary(tokenizer: Tokenizer) -> tuple[tuple[str, ...], str]:
    return tokenizer.symbols, tokenizer.template
