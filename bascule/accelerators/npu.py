"""Huawei Ascend through the public API of `torch_npu`: device `npu`, collectives `hccl`.

There is no Ascend chip in our CI: there, this path runs against a stand-in private-use device named `npu` (tests/standin).

Trap: once torch_npu is installed and the CANN toolkit is not, `import torch` itself fails, because PyTorch loads such back ends
by itself (`ImportError: libhccl.so`, wrapped in a RuntimeError). That happens before this file can be imported, so the sentence for it
stands in install.py, which needs no torch; TORCH_DEVICE_BACKEND_AUTOLOAD=0 lets the other chips work.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

from bascule.accelerators import install
from bascule.accelerators.base import ChipInfo
from bascule.accelerators.generic import GenericAccelerator, device_index
from bascule.errors import AcceleratorUnavailable


class NpuAccelerator(GenericAccelerator):
    collective_backend = "hccl"
    graphs = "NPUGraph"

    def info(self) -> ChipInfo:
        module = torch.get_device_module("npu")
        named = getattr(module, "get_device_name", None)
        return ChipInfo(
            vendor="Huawei",
            name=str(named(self.device.index)) if named else "npu",
            driver=f"torch {torch.__version__}, torch_npu {_torch_npu_version()}",
            memory_bytes=self.total_bytes(),
            simulated=False,
            base=None,
        )

    def total_bytes(self) -> int | None:
        """torch_npu answers through its device properties; older ones do not fill in `torch.accelerator.get_memory_info`."""
        properties = getattr(torch.get_device_module("npu"), "get_device_properties", None)
        if properties is None:
            return super().total_bytes()
        return int(properties(self.device.index).total_memory)


def open_npu(name: str) -> NpuAccelerator:
    """Open `npu` or `npu:N`. Raises AcceleratorUnavailable with what to install."""
    if torch._C._get_privateuse1_backend_name() != "npu":
        _load_torch_npu(name)
    module = torch.get_device_module("npu")
    if not module.is_available():
        raise AcceleratorUnavailable(
            f"'{name}' cannot be opened: torch_npu is loaded but finds no Ascend chip. Check `npu-smi info`. {install.ASCEND}"
        )
    try:
        index = device_index(name, module.device_count())
    except ValueError as error:
        raise AcceleratorUnavailable(f"'{name}' cannot be opened: {error}.") from None
    return NpuAccelerator(name, torch.device("npu", index))


def _load_torch_npu(name: str) -> None:
    if importlib.util.find_spec("torch_npu") is None:
        raise AcceleratorUnavailable(
            f"'{name}' cannot be opened: the package torch_npu is not installed. {install.ASCEND}"
        )
    try:
        importlib.import_module("torch_npu")
    except (ImportError, RuntimeError, OSError) as error:
        raise AcceleratorUnavailable(
            f"'{name}' cannot be opened: importing torch_npu failed with '{error}'. {install.ASCEND} {install.AUTOLOAD}"
        ) from error


def _torch_npu_version() -> str:
    if importlib.util.find_spec("torch_npu") is None:
        return "absent (stand-in device)"
    return str(getattr(importlib.import_module("torch_npu"), "__version__", "unknown"))
