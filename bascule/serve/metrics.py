"""What the server counts, in Prometheus' text format. The stems are vLLM's, so that its dashboards need one rename."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field

PREFIX = "bascule:"
SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass
class Histogram:
    buckets: list[int] = field(default_factory=lambda: [0] * (len(SECONDS) + 1))
    total: float = 0.0
    count: int = 0

    def observe(self, seconds: float) -> None:
        self.buckets[bisect_left(SECONDS, seconds)] += 1
        self.total += seconds
        self.count += 1


class Metrics:
    """Counters by (name, labels), histograms by name. One event loop owns it, so nothing is locked."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.counters: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        self.histograms: dict[str, Histogram] = defaultdict(Histogram)

    def count(self, name: str, by: float = 1.0, **labels: str) -> None:
        self.counters[name, tuple(sorted(labels.items()))] += by

    def observe(self, name: str, seconds: float) -> None:
        self.histograms[name].observe(seconds)

    def render(self, gauges: dict[str, float], counters: dict[str, float]) -> str:
        """`gauges` and `counters` are figures the engine keeps itself, read at this moment."""
        lines: list[str] = []
        for name, value in gauges.items():
            lines += [
                f"# TYPE {PREFIX}{name} gauge",
                f"{PREFIX}{name}{self._labels()} {_exact(value)}",
            ]
        for name, value in counters.items():
            lines += [
                f"# TYPE {PREFIX}{name} counter",
                f"{PREFIX}{name}{self._labels()} {_exact(value)}",
            ]
        named: dict[str, list[str]] = defaultdict(list)
        for (name, labels), value in sorted(self.counters.items()):
            named[name].append(f"{PREFIX}{name}{self._labels(*labels)} {_exact(value)}")
        for name, samples in named.items():
            lines += [f"# TYPE {PREFIX}{name} counter", *samples]
        for name, histogram in sorted(self.histograms.items()):
            lines += [f"# TYPE {PREFIX}{name} histogram", *self._histogram(name, histogram)]
        return "\n".join(lines) + "\n"

    def _histogram(self, name: str, histogram: Histogram) -> list[str]:
        lines, below = [], 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), histogram.buckets, strict=True):
            below += count
            lines.append(f"{PREFIX}{name}_bucket{self._labels(('le', bound))} {below}")
        return [
            *lines,
            f"{PREFIX}{name}_sum{self._labels()} {_exact(histogram.total)}",
            f"{PREFIX}{name}_count{self._labels()} {histogram.count}",
        ]

    def _labels(self, *labels: tuple[str, str]) -> str:
        inside = ",".join(
            f'{key}="{_escaped(value)}"' for key, value in (("model_name", self.model), *labels)
        )
        return "{" + inside + "}"


def _exact(value: float) -> str:
    """`:g` would round a counter beyond a million, and rates of it with it."""
    return str(int(value)) if value == int(value) else repr(value)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
