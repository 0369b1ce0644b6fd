"""A finding leaves with its own reproduction: inputs as safetensors and a short script that needs torch and safetensors only.

The vendor's engineers run `python reproduce.py --device npu`; it prints the same figures as the finding. On a simulated chip the
script shows the operator and inputs; the planted fault acts only inside bascule's session, so the bascule command is the one to run.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bascule.folder import write_json_atomic
from bascule.qualify.context import CheckContext
from bascule.qualify.hold import Miss
from bascule.tensors import save_tensors

_TEMPLATE = Path(__file__).with_name("reproduce_operator.py.txt")
_PLAIN = Path(__file__).with_name("reproduce_plain.py.txt")


def operator_script(context: CheckContext, miss: Miss) -> Path:
    """Write `evidence/<check>-<role>-<operator>/` with inputs, script and environment; return the script's path."""
    ask = context.ask
    name = f"{ask.check.name}-{ask.role}-{miss.call.base_name}" if ask else miss.call.base_name
    folder = _folder(context, name)
    inputs: dict[str, Tensor] = {}
    args, kwargs = tree_map(lambda leaf: _literal(leaf, inputs), (miss.call.args, miss.call.kwargs))
    save_tensors(inputs, folder / "inputs.safetensors")
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        finding=f"{miss.call.name}: {miss.why}",
        command=context.command(),
        operator=str(miss.call.op).replace("aten.", "torch.ops.aten.", 1),
        signature=miss.call.signature,
        args=_source(args),
        kwargs=_source(kwargs),
        output=miss.output,
        gradients=miss.differentiated,
    )
    return _write(folder, text)


def plain_script(
    context: CheckContext,
    name: str,
    finding: str,
    body: str,
    inputs: dict[str, Tensor] | None = None,
) -> Path:
    """Write a stand-alone script around `body`, which may use `torch`, `device`, `stored[name]` of `inputs`, and
    `show(name, got, want)`."""
    folder = _folder(context, name)
    save_tensors(inputs or {"none": torch.zeros(0)}, folder / "inputs.safetensors")
    text = Template(_PLAIN.read_text(encoding="utf-8")).substitute(
        finding=finding, command=context.command(), body=body.strip()
    )
    return _write(folder, text)


class _Code(str):
    """Text that stands for itself in the script's source, unquoted."""

    def __repr__(self) -> str:
        return str(self)


def _literal(leaf: Any, inputs: dict[str, Tensor]) -> Any:
    if isinstance(leaf, Tensor):
        key = f"t{len(inputs)}"
        span = (
            1 + sum((n - 1) * s for n, s in zip(leaf.shape, leaf.stride(), strict=True))
            if leaf.numel()
            else 0
        )
        inputs[key] = torch.as_strided(leaf, (span,), (1,), leaf.storage_offset()).clone()
        return _Code(f"load({key!r}, {tuple(leaf.shape)}, {leaf.stride()})")
    if isinstance(leaf, (torch.dtype, torch.layout, torch.memory_format)):
        return _Code(str(leaf))
    if isinstance(leaf, torch.device):
        return _Code("device")
    if isinstance(leaf, float) and leaf in (float("inf"), float("-inf")):
        return _Code(f"float('{leaf}')")
    return leaf


def _source(value: Any) -> str:
    return repr(value)


def _folder(context: CheckContext, name: str) -> Path:
    folder = context.workdir / "evidence" / re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    folder.mkdir(parents=True, exist_ok=True)
    info = context.accelerator.info()
    write_json_atomic(
        folder / "environment.json",
        {
            "accelerator": context.accelerator.name,
            "chip": info.name,
            "driver": info.driver,
            "simulated": info.simulated,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "command": context.command(),
        },
    )
    return folder


def _write(folder: Path, text: str) -> Path:
    path = folder / "reproduce.py"
    path.write_text(text, encoding="utf-8")
    return path
