"""`bascule doctor`: what this machine can run, which versions are there, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from argparse import Namespace
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

from bascule.config.environment import environment, set_environment_default

# PyTorch would load torch_npu by itself, and `import torch` fails where CANN is not loaded: just where a doctor is called for. Here the
# registry loads it, and its failure is one line of the answer.
set_environment_default("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import torch  # noqa: E402

from bascule.accelerators import cuda, stack  # noqa: E402
from bascule.accelerators.registry import REAL, open_accelerator  # noqa: E402
from bascule.errors import AcceleratorUnavailable  # noqa: E402
from bascule.faults.catalogue import profiles  # noqa: E402
from bascule.model import kernels  # noqa: E402
from bascule.stages.answer import Answer  # noqa: E402

PACKAGES = (
    "bascule",
    "torch",
    "torch-npu",
    "numpy",
    "pydantic",
    "safetensors",
    "tokenizers",
    "reasoning-gym",
    "transformers",
)


def main(arguments: Namespace) -> Answer:
    """Exit 0: a machine with only a CPU is a machine bascule runs on."""
    del arguments
    packages = {name: _version(name) for name in PACKAGES}
    accelerators = {name: _try(name) for name in REAL}
    layers = [
        *stack.ascend(torch.__version__, packages["torch-npu"], environment("ASCEND_HOME_PATH")),
        *cuda.layers(),
    ]
    lines = [
        f"machine        {platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}",
        f"cpu            {torch.backends.cpu.get_cpu_capability()}, C++ compiler: {shutil.which('g++') or shutil.which('clang++') or 'none'}{_kernels()}",
        *(f"{name:<14} {found or 'not installed'}" for name, found in packages.items()),
        *(f"{name:<14} {text}" for name, text in accelerators.items()),
        *stack.lines(layers),
        f"{'simulated':<14} {len(profiles())} ways to fail, each opened as sim:NAME or sim:NAME@npu; `bascule faults` lists them",
    ]
    return Answer(
        text="\n".join(lines),
        data={
            "packages": packages,
            "accelerators": accelerators,
            "stack": [asdict(layer) for layer in layers],
            "simulated": list(profiles()),
        },
    )


def _kernels() -> str:
    why = kernels.why_not()
    return f"; our own kernels are not used, training and serving are slower: {why}" if why else "; our own kernels compiled"  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _try(name: str) -> str:
    """Open the accelerator and name its chip, or say in its own words why it does not open."""
    try:
        chip = open_accelerator(name).info()
    except AcceleratorUnavailable as error:
        return f"no: {error}"
    memory = f", {chip.memory_bytes / 2**30:.1f} GiB" if chip.memory_bytes else ""
    return f"yes: {chip.vendor} {chip.name}{memory}, {chip.driver}"
