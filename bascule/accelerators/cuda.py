"""NVIDIA chips through `torch.cuda` (AMD's ROCm builds of PyTorch answer to the same name)."""

from __future__ import annotations

import importlib.util

import torch

from bascule.accelerators import stack
from bascule.accelerators.base import ChipInfo
from bascule.accelerators.generic import GenericAccelerator, device_index
from bascule.config.environment import set_environment_default
from bascule.errors import AcceleratorUnavailable


class CudaAccelerator(GenericAccelerator):
    collective_backend = "nccl"
    graphs = "CUDAGraph"

    def info(self) -> ChipInfo:
        properties = torch.cuda.get_device_properties(self.device)
        return ChipInfo(
            vendor="AMD" if torch.version.hip else "NVIDIA",
            name=properties.name,
            driver=f"torch {torch.__version__}, runtime {torch.version.hip or torch.version.cuda}",
            memory_bytes=properties.total_memory,
            simulated=False,
            base=None,
        )

    def prepare(self, threads: int) -> None:
        """cuBLAS is bit-reproducible only with a fixed workspace, and reads this variable when its handle is made: call early.

        PyTorch lets it add the parts of a long bf16 or fp16 product in that type; the noise floor that chips are held to accumulates in fp32.
        """
        super().prepare(threads)
        set_environment_default("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = False

    def telemetry(self) -> dict[str, float]:
        """Watts and degrees from NVML, when the `nvidia-ml-py` package and the driver's library are there."""
        if importlib.util.find_spec("pynvml") is None:
            return {}
        import pynvml  # type: ignore[import-not-found]  # the import waits for here: it is an optional package

        try:
            return {
                "power_w": torch.cuda.power_draw(self.device) / 1000.0,
                "temperature_c": float(torch.cuda.temperature(self.device)),
            }
        except (RuntimeError, pynvml.NVMLError):
            return {}


def open_cuda(name: str) -> CudaAccelerator:
    """Open `cuda` or `cuda:N`. Raises AcceleratorUnavailable saying what is missing."""
    if not torch.cuda.is_available():
        trouble = (
            "this PyTorch is built for it, but finds no chip with a driver. Try `nvidia-smi` (ROCm: `rocm-smi`)"
            if torch.version.cuda or torch.version.hip
            else "this PyTorch is built without it. Install a CUDA build of PyTorch and the NVIDIA driver"
        )
        raise AcceleratorUnavailable(
            f"'{name}' cannot be opened (torch {torch.__version__}): {trouble}, or name another pool, for instance 'cuda|cpu'."
        )
    try:
        index = device_index(name, torch.cuda.device_count())
    except ValueError as error:
        raise AcceleratorUnavailable(f"'{name}' cannot be opened: {error}.") from None
    return CudaAccelerator(name, torch.device("cuda", index))


def layers() -> list[stack.Layer]:
    """The layers of NVIDIA's software under this torch, for `bascule doctor`."""
    return stack.nvidia(torch.__version__, torch.version.cuda, works=torch.cuda.is_available())
