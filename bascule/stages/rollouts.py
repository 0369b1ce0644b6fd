"""The trainer's use of the rollout engine: samples for GRPO and for evaluation, with exactly the weights they are asked of."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bascule.errors import BasculeError, RolloutFailed, UsageError
from bascule.infer.sampling import Sampling
from bascule.ledger import Ledger
from bascule.place import sync
from bascule.place.client import RolloutClient
from bascule.records import Completion, RolloutReply, RolloutRequest, WeightsSynced
from bascule.train.step import Stepper

BEAT_S = 1.0


class Rollouts:
    """`beat` says that the trainer lives while it waits. `pool` is where the last answer came from."""

    def __init__(
        self,
        socket: Path,
        stepper: Stepper,
        weights: Path,
        ledger: Ledger,
        beat: Callable[[], None],
    ) -> None:
        self.stepper, self.weights, self.ledger, self.beat = stepper, weights, ledger, beat
        self.pool: str | None = None
        # The supervisor watches the engine's silence and restarts it; a slow engine that moves is waited for.
        self._client = RolloutClient(socket, patience_s=math.inf, tries=10, on_wait=self._waiting)
        self._one_at_a_time = threading.Lock()
        self._published: tuple[int, Path, str] | None = None

    def sample(self, request: RolloutRequest) -> RolloutReply:
        """Ask with the weights of the last committed step, and wait."""
        return self._heard(self._ask(self._with_weights(request)))

    def ahead(self, request: RolloutRequest) -> Callable[[], RolloutReply]:
        """Ask with the weights of the last committed step, and go on: the result waits for the answer when it is called.

        The thread is a daemon: a trainer that leaves (a condemned chip, a stop) does not wait for an answer it will not use.
        """
        request = self._with_weights(request)
        found: list[RolloutReply | Exception] = []

        def ask() -> None:
            try:
                found.append(self._ask(request))
            except BasculeError as error:  # raised again where the answer is wanted
                found.append(error)

        thread = threading.Thread(target=ask, daemon=True, name="rollout ahead")
        thread.start()

        def answer() -> RolloutReply:
            while thread.is_alive():
                thread.join(BEAT_S)
                self.beat()
            if not found:
                raise RolloutFailed(f"Rollouts asked ahead for step {request.step} ended without an answer; see logs/.")  # fmt: skip
            if isinstance(found[0], Exception):
                raise found[0]
            return self._heard(found[0])

        return answer

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        group_size: int = 1,
        first_index: int = 0,
    ) -> list[Completion]:
        """Engine.generate's words, answered by the rollout engine: evaluation runs where inference runs."""
        return self.sample(
            RolloutRequest(
                step=self.stepper.step, prompts=[list(prompt) for prompt in prompts], group_size=group_size, first_index=first_index,
                max_tokens=sampling.max_tokens, temperature=sampling.temperature, seed=sampling.seed, purpose=sampling.purpose,
            )
        ).completions  # fmt: skip

    def _waiting(self) -> None:
        """Only the main thread's waiting is life: a beat from beside it would hide that it hangs."""
        if threading.current_thread() is threading.main_thread():
            self.beat()

    def _ask(self, request: RolloutRequest) -> RolloutReply:
        try:
            with self._one_at_a_time:
                return self._client.sample(request)
        except UsageError:
            raise  # what was asked is impossible on every chip
        except BasculeError as error:
            raise RolloutFailed(f"Rollouts failed at step {request.step}: {error}") from error

    def _heard(self, reply: RolloutReply) -> RolloutReply:
        self.pool = reply.pool
        return reply

    def _with_weights(self, request: RolloutRequest) -> RolloutRequest:
        version, path, sha256 = self._publish()
        return replace(
            request,
            weights_version=version,
            weights_path=str(path.resolve()),
            weights_sha256=sha256,
        )

    def _publish(self) -> tuple[int, Path, str]:
        step = self.stepper.step
        if self._published is None or self._published[0] != step:
            start = time.perf_counter()
            path, sha256 = sync.publish(self.weights, self.stepper.model.state_dict(), step)
            self._published = (step, path, sha256)
            self.ledger.append(
                WeightsSynced(
                    version=step, sha256=sha256, size_bytes=path.stat().st_size, seconds=time.perf_counter() - start
                )
            )  # fmt: skip
        return self._published
