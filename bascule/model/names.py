"""Parameter names, read: to which layer does a tensor belong?"""

from __future__ import annotations

import functools


@functools.cache  # asked of every parameter at every step
def layer_of(name: str) -> str:
    """`module.layers.3.attn.weight` belongs to `module.layers.3`, `lm_head.weight` to `lm_head`."""
    parts = name.split(".")
    numbered = next((at for at, part in enumerate(parts) if part.isdecimal()), len(parts) - 2)
    return ".".join(parts[: numbered + 1]) or name
