"""Do two groups of training runs learn the same? Two one-sided tests (TOST), three answers, power stated. No torch.

The figure of a run is its mean log loss over a late window; the margin is a relative difference, so a margin of 0.005 on the log is
plus or minus 0.5 % of the loss. *equal*: both one-sided tests reject a difference beyond the margin. *different*: not equal, and a
two-sided test rejects no difference. *too few runs*: neither; `runs_needed` says how many would have been enough.
Sources: Schuirmann 1987 (TOST), Welch 1947 (unequal spreads); what the field does instead is in guard.md 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

Answer = Literal["equal", "different", "too few runs"]

MARGIN = 0.005
ALPHA = 0.05
# In the battery "different" condemns a chip, so it must be rare when wrong: one false alarm in a hundred comparisons of equal chips.
ALPHA_DIFFERENT = 0.01
WANTED_POWER = 0.8
MAX_RUNS = 10_000


@dataclass(frozen=True)
class Equivalence:
    """`difference`: mean of A minus mean of B in log loss, so 0.01 is 1 % more loss. `p_lower`, `p_upper`: the one-sided tests
    against -margin and +margin; `p_different`: the two-sided test against none. `power`: chance of "equal" if A and B truly are,
    with this spread and these numbers. `runs_needed`: per group (pairs, when paired) for 80 % power; None beyond 10,000."""

    answer: Answer
    margin: float
    difference: float
    ci90: tuple[float, float]
    p_lower: float
    p_upper: float
    p_different: float
    power: float
    runs_needed: int | None
    runs: tuple[int, int]
    spread: float
    paired: bool

    def sentence(self) -> str:
        low, high = self.ci90
        words = (
            f"{self.answer}: loss differs by {100 * self.difference:+.3f} % (90 % interval {100 * low:+.3f} to {100 * high:+.3f} %, "
            f"margin {100 * self.margin:g} %, power {self.power:.0%}, {self.runs[0]} and {self.runs[1]} runs"
        )
        if self.answer == "too few runs":
            words += f"; {self._needed()}"
        return words + ")"

    def _needed(self) -> str:
        if self.runs_needed:
            return f"{self.runs_needed} needed"
        if not math.isfinite(self.spread):
            return "a single run shows no spread, so nobody can say how many are needed"
        return f"no number of runs below {MAX_RUNS:,} would do"


def compare(
    a: Sequence[float],
    b: Sequence[float],
    *,
    margin: float = MARGIN,
    paired: bool = False,
    alpha_different: float = ALPHA_DIFFERENT,
) -> Equivalence:
    """Compare two groups of log losses, one number per run. `paired`: run i of both shares start and data order.

    Raises ValueError for empty groups, unequal pairs, or numbers that are not finite (a diverged run is no number: say so).
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if not len(x) or not len(y) or (paired and len(x) != len(y)):
        raise ValueError(
            f"{len(x)} and {len(y)} runs cannot be compared{' as pairs' if paired else ''}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a loss is not finite")
    difference = float(x.mean() - y.mean())
    error, freedom, spread = _paired_error(x - y) if paired else _welch_error(x, y)
    return _judge(
        difference, error, freedom, spread, (len(x), len(y)), margin, paired, alpha_different
    )


def late_mean_log(losses: Sequence[float], share: float = 0.25) -> float:
    """Mean log of the last `share` of a loss series; the window is fixed before anyone looks."""
    count = max(1, round(len(losses) * share))
    return float(np.mean(np.log(np.asarray(losses[-count:], dtype=np.float64))))


def _paired_error(differences: np.ndarray) -> tuple[float, float, float]:
    n = len(differences)
    spread = float(differences.std(ddof=1)) if n > 1 else math.inf
    return spread / math.sqrt(n), max(1.0, n - 1), spread


def _welch_error(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Standard error, Welch's degrees of freedom, pooled spread of one run."""
    if len(x) < 2 or len(y) < 2:
        return math.inf, 1.0, math.inf
    vx, vy = float(x.var(ddof=1)) / len(x), float(y.var(ddof=1)) / len(y)
    total = vx + vy
    freedom = (
        len(x) + len(y) - 2.0
        if total == 0
        else total**2 / (vx**2 / (len(x) - 1) + vy**2 / (len(y) - 1))
    )
    pooled = ((len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)) / (len(x) + len(y) - 2)
    return math.sqrt(total), freedom, math.sqrt(float(pooled))


def _judge(
    difference: float,
    error: float,
    freedom: float,
    spread: float,
    runs: tuple[int, int],
    margin: float,
    paired: bool,
    alpha_different: float,
) -> Equivalence:
    p_lower = _tail((difference + margin), error, freedom)
    p_upper = _tail((margin - difference), error, freedom)
    p_different = min(1.0, 2.0 * _tail(abs(difference), error, freedom))
    reach = t_quantile(1.0 - ALPHA, freedom) * error if math.isfinite(error) else math.inf
    if max(p_lower, p_upper) < ALPHA:
        answer: Answer = "equal"
    elif p_different < alpha_different:
        answer = "different"
    else:
        answer = "too few runs"
    return Equivalence(
        answer=answer,
        margin=margin,
        difference=difference,
        ci90=(difference - reach, difference + reach),
        p_lower=p_lower,
        p_upper=p_upper,
        p_different=p_different,
        power=power(error, freedom, margin),
        runs_needed=runs_needed(spread, margin, paired=paired),
        runs=runs,
        spread=spread,
        paired=paired,
    )


def power(error: float, freedom: float, margin: float) -> float:
    """Chance that both one-sided tests reject when there is no difference (shifted central t; a test holds it to simulation)."""
    if error == 0.0:
        return 1.0
    if not math.isfinite(error):
        return 0.0
    return max(0.0, 2.0 * t_cdf(margin / error - t_quantile(1.0 - ALPHA, freedom), freedom) - 1.0)


def runs_needed(spread: float, margin: float, *, paired: bool) -> int | None:
    """Runs per group (or pairs) for 80 % power with this spread of one run (or of one pair's difference)."""
    if not math.isfinite(spread):
        return None

    def enough(n: int) -> bool:
        error = spread / math.sqrt(n) if paired else spread * math.sqrt(2.0 / n)
        return power(error, n - 1.0 if paired else 2.0 * n - 2.0, margin) >= WANTED_POWER

    if not enough(MAX_RUNS):
        return None
    low, high = 1, MAX_RUNS  # low: not enough; high: enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _tail(distance: float, error: float, freedom: float) -> float:
    """P(T > distance / error); with no spread at all the answer is certain."""
    if error == 0.0:
        return 0.0 if distance > 0.0 else (0.5 if distance == 0.0 else 1.0)
    return 0.5 if not math.isfinite(error) else 1.0 - t_cdf(distance / error, freedom)


def t_cdf(t: float, freedom: float) -> float:
    """Student's t distribution, through the regularised incomplete beta function."""
    tail = 0.5 * _incomplete_beta(freedom / 2.0, 0.5, freedom / (freedom + t * t))
    return 1.0 - tail if t > 0 else tail


@lru_cache(maxsize=4096)
def t_quantile(p: float, freedom: float) -> float:
    """Inverse of `t_cdf` for p in (0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < p:
        high *= 2.0
    for _ in range(50):
        middle = (low + high) / 2.0
        low, high = (middle, high) if t_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2.0


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by Lentz's continued fraction (Numerical Recipes 6.4): scipy would be 35 MB for one function."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1.0) / (a + b + 2.0):
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    front = (
        math.exp(
            math.lgamma(a + b)
            - math.lgamma(a)
            - math.lgamma(b)
            + a * math.log(x)
            + b * math.log1p(-x)
        )
        / a
    )
    c, d = 1.0, 1.0 / _not_zero(1.0 - (a + b) * x / (a + 1.0))
    total = d
    for m in range(1, 300):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 / _not_zero(1.0 + numerator * d)
            c = _not_zero(1.0 + numerator / c)
            total *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return front * total


def _not_zero(value: float) -> float:
    return value if abs(value) > 1e-300 else 1e-300
