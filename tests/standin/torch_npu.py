"""Stands where Huawei's `torch_npu` would: PyTorch loads it by itself through its entry point, and then there is a device `npu`.

    python tests/standin/torch_npu.py BUILD            compiles npu.cpp into BUILD (once; about half a core-minute)
    PYTHONPATH=tests/standin:BUILD bascule qualify npu

STANDIN_NPU_FAULTS plants faults, as words KIND:OPERATOR. Kinds: missing, host (falls back to the host and says so), quiet (does not say
so), zero (one value in each result), nan, dead (507015). OPERATOR is `aten::mm`, or a collective of hccl.py, which knows `zero` only.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

__version__ = torch.__version__.partition("+")[0]
NAME = "bascule_standin_npu"
FAULTS = [word.split(":", 1) for word in os.environ.get("STANDIN_NPU_FAULTS", "").split()]


def compile_into(build: Path) -> None:
    """The extension, and the metadata by which PyTorch and `bascule doctor` find a package torch-npu of torch's own version."""
    from torch.utils import cpp_extension

    meta = build / f"torch_npu-{__version__}.dist-info"
    meta.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("npu.cpp")
    cpp_extension.load(NAME, [str(source)], build_directory=str(build), extra_cflags=["-O1", "-g0"], is_python_module=False)  # fmt: skip
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch-npu\nVersion: {__version__}\n")  # fmt: skip
    (meta / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")


def _autoload() -> None:
    """What the entry point names: loading the module was all."""


def _put_in_place() -> None:
    """For good: PyTorch allows one private-use device. `torch.npu.extension.set_limit(device, bytes)` makes memory short."""
    import hccl

    extension: Any = __import__(NAME)
    torch.utils.rename_privateuse1_backend("npu")
    extension.install_hooks()
    for kind, operator in FAULTS:
        extension.plant(kind, operator)
    extension.register_kernels()
    torch._register_device_module("npu", _device_module(extension))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    hccl.register({operator for _, operator in FAULTS})


def _device_module(extension: Any) -> Any:
    module: Any = types.ModuleType("torch.npu")
    module.extension = extension
    module.is_available = lambda: True
    module.device_count = extension.device_count
    module.current_device = extension.current_device
    module.set_device = extension.set_device
    module.get_device_name = lambda index=0: "stand-in for an Ascend chip"
    module.get_device_properties = lambda index=0: types.SimpleNamespace(
        total_memory=extension.total(index)
    )
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.is_initialized = lambda: True
    module.synchronize = torch.accelerator.synchronize
    module.Stream, module.Event = torch.Stream, torch.Event
    module.current_stream = torch.accelerator.current_stream
    module.stream = lambda stream: stream
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    return module


if __name__ == "__main__":
    compile_into(Path(sys.argv[1]))
else:
    _put_in_place()
