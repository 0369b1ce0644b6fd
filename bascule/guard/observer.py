"""What is looked at while a step runs, and what it showed: its products, one audited part, the weights between two updates.

The modes are entered around the chip's work and read after it, so that the chip is waited for once. What follows from a break is
the guard's to say (guard/guard).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from bascule.guard import audit, host, invariants, update
from bascule.guard.bits import Kept, Survey, changed
from bascule.guard.checksum import Checksums, Violation, parameter_names

KEPT_EVERY = 8
"""Steps between looks at the bits of moments and router biases, unless all is checked anyway. Weights, the other third of these bytes, are
looked at always: on a CPU each pass over all of them costs some 0.4 % of a step of a small model."""


@dataclass(frozen=True)
class Break:
    """Something that is wrong with the present weights, or with what became data: the step that did it, and who saw it."""

    step: int
    sentinel: str
    measured: float
    detail: str
    bound: float = 1.0


class Observer:
    """Of one model on one chip. A step's looks are dropped when the next step begins."""

    def __init__(self) -> None:
        self.capture: audit.Capture | None = None
        self.expected: update.Expected | None = None
        self.reach: Mapping[str, tuple[float, float]] = {}
        self._names: tuple[int, dict[int, str]] = (0, {})
        self._parameters: tuple[int, dict[str, nn.Parameter]] = (0, {})
        self._survey: Survey | None = None
        self._step: Checksums | None = None
        self._score: Checksums | None = None
        self._commit: tuple[int, Checksums] | None = None
        self._bits: tuple[int, Tensor] | None = None
        self.kept: Callable[[], Mapping[str, Tensor]] = dict
        self._kept: tuple[int, Kept] | None = None
        self._moved: tuple[int, Tensor, Tensor] | None = None
        self.withheld_s, self.paged = 0.0, False
        self.own_s = 0.0

    # ---- looking

    @contextmanager
    def score(self, model: nn.Module) -> Iterator[None]:
        """GRPO's old log-probabilities become part of the batch, so replays of the batch could not see that they are wrong:
        every such forward is checked, and judged with the step that follows."""
        self._score = Checksums(names=self._names_of(model))
        with self._score:
            yield

    @contextmanager
    def step(
        self, step: int, model: nn.Module, *, products: bool, part: audit.Part | None
    ) -> Iterator[None]:
        self._step, self.capture = None, None
        if self._bits is None or self._bits[0] != step:
            self._bits = (step, self._look_at(model)[0])
        with ExitStack() as stack:
            if part is not None:
                self.capture = stack.enter_context(audit.capturing(part, step))
            if products:
                self._step = Checksums(names=self._names_of(model), turn=step)
                stack.enter_context(self._step)  # type: ignore[arg-type]
            before, pages = host.withheld_s(), host.pages_fetched()
            yield
            self.withheld_s = host.withheld_s() - before
            self.paged = host.pages_fetched() > pages

    @contextmanager
    def commit(self, step: int, model: nn.Module, *, products: bool) -> Iterator[None]:
        """The update's own products (Muon's iteration). A wrong one is found after the weights have changed, so it is judged
        with the next step, and leads to a rollback. `own_s`: seconds of it in our own passes over the weights."""
        begin = host.own_time_s()
        follows = self._moved is not None and self._moved[0] == step - 1
        before = self._moved[2] if self._moved and follows else self._look_at(model)[1]
        self.own_s = host.own_time_s() - begin
        if not products:
            yield
        else:
            mode = Checksums(names=self._names_of(model), turn=step)
            self._commit = (step, mode)
            with mode:
                yield
        begin = host.own_time_s()
        bits, lengths = self._look_at(model)
        self._bits, self._moved = (step + 1, bits), (step, before, lengths)
        if products or step % KEPT_EVERY == 0:
            self._kept = (step + 1, Kept(self.kept(), self._kept and self._kept[1]))
        self.own_s += host.own_time_s() - begin

    def accepted(self) -> None:
        """The step will commit: the weights change now, and nobody holds them to their old bits."""
        self._bits = None

    # ---- what it showed

    @property
    def checked(self) -> bool:
        """Did the last step run under checksums?"""
        return self._step is not None

    @property
    def slowed(self) -> bool:
        return bool(self.watched)

    @property
    def watched(self) -> str:
        """What the guard did in the last step beside letting it run; steps of one kind take one time."""
        kinds = (("products", self._step), ("a part", self.capture))
        return " and ".join(word for word, mode in kinds if mode is not None)

    def violations(self) -> list[Violation]:
        """Of the step's own products."""
        return self._step.violations() if self._step is not None else []

    def products(self) -> list[int]:
        """How many products were checked since the last step was judged, by each of the modes that looked."""
        modes = (self._step, self._commit and self._commit[1], self._score)
        return [mode.products_checked for mode in modes if mode is not None]

    def breaks(self, step: int, model: nn.Module) -> list[Break]:
        """What is wrong with the weights that `step` begins with: the update that led to them, where it was looked at, or their
        memory. Each look is told once."""
        found = [*self._update_products(), *self._score_products(step)]
        found += self._audited_update(step, model)
        found += self._overreach(step, model)
        return found + self._rotten(step, model)

    def _update_products(self) -> list[Break]:
        looked, self._commit = self._commit, None
        if looked is None:
            return []
        step, mode = looked
        return [Break(step, "update checksum", v.ratio, str(v)) for v in mode.violations()[:1]]

    def _score_products(self, step: int) -> list[Break]:
        mode, self._score = self._score, None
        found = [] if mode is None else mode.violations()
        return [Break(step, "score checksum", v.ratio, str(v)) for v in found[:1]]

    def _audited_update(self, step: int, model: nn.Module) -> list[Break]:
        expected, self.expected = self.expected, None
        if expected is None or expected.step != step - 1:
            return []
        wrong = update.check(expected, model)
        if wrong is None:
            return []
        return [Break(wrong.step, "update audit", wrong.error, str(wrong), wrong.bound)]

    def _overreach(self, step: int, model: nn.Module) -> list[Break]:
        """Every update is held to the most that its optimizer can do: a wrong product inside Muon's iteration throws weights far."""
        if self._moved is None or self._moved[0] != step - 1 or not self.reach:
            return []
        names = list(self._parameters_of(model))
        far = invariants.overreach(self._moved[1], self._moved[2], self.reach, names)
        if far is None:
            return []
        detail = f"the update of step {step - 1} moved {far[0]} {far[1]:.3g} times as far as its optimizer can"
        return [Break(step - 1, "update size", far[1], detail)]

    def _rotten(self, step: int, model: nn.Module) -> list[Break]:
        if self._bits is None or self._bits[0] != step:
            return []
        now, _ = self._look_at(model)
        rotten = changed(self._bits[1], now, list(self._parameters_of(model)))
        if rotten is None and self._kept is not None and self._kept[0] == step:
            rotten = self._kept[1].rotten(self.kept())
        if rotten is None:
            return []
        detail = f"the bits of {rotten} changed while nobody wrote to it"
        return [Break(step, "memory", math.inf, detail)]

    # ---- the model, walked once: that takes longer than adding up a small model's bits

    def _names_of(self, model: nn.Module) -> dict[int, str]:
        if self._names[0] != id(model):
            self._names = (id(model), parameter_names(model))
        return self._names[1]

    def _parameters_of(self, model: nn.Module) -> dict[str, nn.Parameter]:
        if self._parameters[0] != id(model):
            self._parameters = (id(model), dict(model.named_parameters()))
        return self._parameters[1]

    def _look_at(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Bits and lengths of the present weights."""
        parameters = list(self._parameters_of(model).values())
        if self._survey is None or not self._survey.still_of(parameters):
            self._survey = Survey(parameters)
        return self._survey.look()
