"""Random numbers as pure functions of (seed, purpose, step, index).

A number does not depend on which chip drew it, in which order, or how often the process was restarted: that is what makes a
resumed, replayed or migrated run the same run (DESIGN, "Processes"). The generator is SplitMix64 (Steele, Lea, Flood 2014)
used as a counter-based hash; it passes BigCrush as a stream and is a few lines in numpy. It is not for secrets.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, elementwise; wraps modulo 2^64 on purpose."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def key(seed: int, purpose: str, *parts: int) -> int:
    """Return a 64-bit key for one purpose at one place, for instance `key(seed, "sft.batch", step)`."""
    text = "/".join([str(seed), purpose, *(str(part) for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def bits(key_: int, index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 random bits for every entry of `index` (any shape), under `key_`."""
    with np.errstate(over="ignore"):
        return _mix(np.uint64(key_) + (index + np.uint64(1)) * _GOLDEN)


def uniform(key_: int, shape: tuple[int, ...], *, start: int = 0) -> NDArray[np.float64]:
    """Uniform numbers in (0, 1), never 0 or 1, of `shape`; entry i in row-major order is number `start + i` of the key."""
    count = int(np.prod(shape, dtype=np.int64))
    index = np.arange(start, start + count, dtype=np.uint64)
    return ((bits(key_, index) >> np.uint64(11)).astype(np.float64).reshape(shape) + 0.5) * 2.0**-53


def number(key_: int) -> float:
    """`uniform(key_, (1,))[0]` in plain Python, some ten times as fast: for code that needs one number at each of many places."""
    word = 2**64 - 1
    z = (key_ + int(_GOLDEN)) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return (((z ^ (z >> 31)) >> 11) + 0.5) * 2.0**-53


def integers(key_: int, high: int, count: int) -> NDArray[np.int64]:
    """`count` integers in [0, high), with replacement."""
    return np.minimum((uniform(key_, (count,)) * high).astype(np.int64), high - 1)


def permutation(key_: int, count: int) -> NDArray[np.int64]:
    """A permutation of range(count)."""
    return np.argsort(bits(key_, np.arange(count, dtype=np.uint64)), kind="stable").astype(np.int64)


def generator(key_: int) -> np.random.Generator:
    """A numpy generator for code that needs many distributions at one place (data making); do not keep it across steps."""
    return np.random.Generator(np.random.PCG64(key_))
