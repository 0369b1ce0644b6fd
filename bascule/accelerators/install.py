"""Sentences on what to install for Ascend. No torch here: one of them is needed exactly when `import torch` fails."""

from __future__ import annotations

ASCEND = "Install the Ascend driver and firmware and the CANN toolkit (source its set_env.sh), then `pip install bascule[npu]`; torch and torch_npu must have the same version number."
AUTOLOAD = "torch_npu is installed but the CANN toolkit is not loaded, and PyTorch loads such back ends by itself: source CANN's set_env.sh, uninstall torch-npu, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to go on without Ascend."


def explain_torch_import(error: BaseException) -> str | None:
    """The sentence for an `import torch` that failed because of a back end it loaded by itself; None when it failed otherwise.

    PyTorch raises RuntimeError("Failed to load the backend extension: torch_npu. ...") from the ImportError of libhccl.so.
    """
    text = f"{error} {error.__cause__ or ''}"
    if "backend extension: torch_npu" not in text and "libhccl" not in text:
        return None
    return f"`import torch` failed: {str(error).splitlines()[0]} {AUTOLOAD}"
