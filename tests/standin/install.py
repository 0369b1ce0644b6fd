"""Puts the stand-in device in place under the name `npu`, in this process and for good (PyTorch allows one private-use device).

`python install.py BUILD_FOLDER PYTEST_ARGUMENTS...` compiles npu.cpp (once; about half a core-minute), installs it, and runs pytest.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("npu.cpp")


def install(build: Path) -> Any:
    """Returns the extension (also `torch.npu.extension`); its `set_limit(device, bytes)` makes memory short."""
    build.mkdir(parents=True, exist_ok=True)
    extension = cpp_extension.load(
        "bascule_standin_npu",
        [str(SOURCE)],
        build_directory=str(build),
        extra_cflags=["-O1", "-g0"],
    )
    torch.utils.rename_privateuse1_backend("npu")
    extension.install_hooks()
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
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    torch._register_device_module("npu", module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return extension


if __name__ == "__main__":
    install(Path(sys.argv[1]))
    sys.exit(pytest.main(sys.argv[2:]))
