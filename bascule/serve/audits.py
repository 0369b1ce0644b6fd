"""Some finished answers are scored once more by another kind of chip that holds the same model. No torch here."""

from __future__ import annotations

from bascule.serve.inflight import Answer, Referee, Refused

# Between two right chips fp32 differs by about 1e-5 (inference.md 5.2: vLLM against transformers 1e-6, llama.cpp 4e-4 with an fp16
# cache); a corrupted matrix product moves some token by tenths.
BOUND = 5e-3
MARGIN = 12.0  # times the RMS measured at the engine's start; bf16 on SmolLM2 stays under 4 times (docs/serve.md)


class Audits:
    """`done` and `worst` (largest difference of a log-probability, in nats) are of all answers compared so far."""

    def __init__(self, every: int) -> None:
        """`every`: of so many finished answers one is audited; 0: none."""
        self._every, self._finished = every, 0
        self._referee: Referee | None = None
        self.done, self.worst = 0, 0.0

    def appoint(self, referee: Referee) -> None:
        self._referee = referee

    async def dismiss(self) -> None:
        """No audits from now on."""
        if self._referee is not None:
            referee, self._referee = self._referee, None
            await referee.close()

    def due(self) -> bool:
        """One more answer is finished: is it to be audited?"""
        self._finished += 1
        return self._referee is not None and self._every > 0 and self._finished % self._every == 0

    async def difference(self, answer: Answer) -> float:
        """Largest difference from what the referee says, nats; 0 when it is gone, which was noted when it went."""
        if self._referee is None:
            return 0.0
        try:
            worst = await self._referee.worst_difference(answer)
        except Refused:
            return 0.0
        self.done += 1
        self.worst = max(self.worst, worst)
        return worst


def bound(noise: float) -> float:
    """Allowed between two right engines. `noise`: RMS between two ways to compute, measured at the engine's start."""
    return max(BOUND, MARGIN * noise)
