"""Which layers of a vendor's software are here, and do they match? Read from files and versions only: no chip is opened, no torch.

Ascend: chip -> driver and firmware -> CANN toolkit -> torch_npu -> torch. torch_npu is built for one torch and must have its version;
which CANN a torch_npu wants stands in the table of its own README (github.com/Ascend/pytorch), which grows too fast to be copied here.
NVIDIA: chip -> driver -> the CUDA that torch was built with. The oldest driver of each CUDA: NVIDIA's "CUDA Compatibility" guide.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580, 0)}
_SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"


@dataclass(frozen=True)
class Layer:
    """`found`: what is here, None when nothing is. `trouble`: what does not match and how to mend it, empty when all is well."""

    name: str
    found: str | None
    trouble: str = ""


def ascend(torch: str, torch_npu: str | None, cann_home: str | None, root: Path = Path("/")) -> list[Layer]:  # fmt: skip
    """`torch`, `torch_npu`: versions; `cann_home`: ASCEND_HOME_PATH, which CANN's set_env.sh sets."""
    chips = len(list(root.glob("dev/davinci[0-9]*")))
    driver = _field(root / "usr/local/Ascend/driver/version.info", "Version")
    cann = _cann(Path(cann_home)) if cann_home else None
    asleep = not cann and (root / "usr/local/Ascend/ascend-toolkit").is_dir()
    if not (chips or driver or cann or asleep or torch_npu):
        return [Layer("Ascend", None, "no chip, driver, CANN toolkit or torch_npu")]
    return [
        Layer("Ascend chips", str(chips) if chips else None, "" if chips else "no /dev/davinci*: no chip, no driver, or a container that was not given one"),
        Layer("Ascend driver", driver, "" if driver else "install driver and firmware of your chip from hiascend.com"),
        Layer("CANN toolkit", cann, "" if cann else (f"installed but not loaded: {_SET_ENV}" if asleep else "install it from hiascend.com, in the version that torch_npu's README names for it")),
        Layer("torch_npu", torch_npu, _torch_npu_trouble(torch, torch_npu)),
    ]  # fmt: skip


def nvidia(torch: str, built_with: str | None, root: Path = Path("/"), *, works: bool = False) -> list[Layer]:  # fmt: skip
    """`built_with`: the CUDA of this torch (torch.version.cuda), None for a build without. `works`: a chip answers, which some sandboxes
    allow while they hide the driver's version."""
    driver = nvidia_driver(root) or ("of hidden version" if works else None)
    if driver is None:
        words = "no NVIDIA driver is loaded (no /proc/driver/nvidia/version). With a chip: install the driver, then a CUDA build of torch."
        return [Layer("NVIDIA", None, words)]
    cure = "" if built_with else f"torch {torch} is built without CUDA: pip install torch --index-url https://download.pytorch.org/whl/cu128"  # fmt: skip
    return [
        Layer("NVIDIA driver", driver, _driver_trouble(driver, built_with)),
        Layer("torch's CUDA", built_with, cure),
    ]


def nvidia_driver(root: Path = Path("/")) -> str | None:
    try:
        text = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text)
    return found[1] if found else "unknown"


def lines(layers: Sequence[Layer]) -> list[str]:
    return [
        f"{layer.name:<14} {layer.found or 'missing'}{': ' + layer.trouble if layer.trouble else ''}"
        for layer in layers
    ]


def _torch_npu_trouble(torch: str, torch_npu: str | None) -> str:
    wanted = torch.partition("+")[0]
    if torch_npu is None:
        return f"pip install torch-npu=={wanted} (its version must be torch's)"
    if _numbers(torch_npu)[:3] == _numbers(wanted)[:3]:
        return ""
    return f"does not match torch {wanted}: pip install torch-npu=={wanted}, or torch=={torch_npu.partition('.post')[0]}"


def _driver_trouble(driver: str, built_with: str | None) -> str:
    if not built_with:
        return ""
    oldest = OLDEST_DRIVER.get(_numbers(built_with)[0])
    if oldest is None or not _numbers(driver) or _numbers(driver)[:2] >= oldest:
        return ""
    return f"too old for CUDA {built_with}: needs {oldest[0]}.{oldest[1]} or later, or a torch built for an older CUDA"


def _cann(home: Path) -> str | None:
    """The version stands in `*-linux/ascend_toolkit_install.info`; a home without the file is there but unnamed."""
    for path in sorted(home.glob("*-linux/ascend_*_install.info")):
        if version := _field(path, "version"):
            return version
    return "of unknown version" if home.is_dir() else None


def _field(path: Path, name: str) -> str | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{name}\s*=\s*(\S+)", text, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else "unknown"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
