"""Ascend without an Ascend chip: every way in which it is missing ends in a sentence that says what to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bascule.accelerators import install
from bascule.accelerators.registry import open_accelerator
from bascule.errors import AcceleratorUnavailable

pytestmark = pytest.mark.skipif("torch_npu" in sys.modules, reason="torch_npu is loaded here")


def broken_torch_npu(folder: Path) -> Path:
    """A package that fails as torch_npu does without CANN, with the entry point by which `import torch` loads it."""
    package = folder / "torch_npu"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "def _autoload():\n    pass\nraise ImportError('libhccl.so: cannot open shared object file: No such file or directory')\n"
    )
    meta = folder / "torch_npu-2.13.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.13.0\n")
    (meta / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return folder


def python(code: str, path: Path, **environment: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_without_the_package_the_sentence_names_the_extra_and_the_toolkit() -> None:
    with pytest.raises(
        AcceleratorUnavailable,
        match=r"torch_npu is not installed.*CANN toolkit.*pip install bascule\[npu\]",
    ):
        open_accelerator("npu")


def test_with_the_package_but_without_cann_the_sentence_names_the_missing_library(
    tmp_path: Path,
) -> None:
    said = python(
        "from bascule.accelerators.registry import open_accelerator\n"
        "from bascule.errors import AcceleratorUnavailable\n"
        "try: open_accelerator('npu:0')\n"
        "except AcceleratorUnavailable as error: print(error)\n",
        broken_torch_npu(tmp_path),
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert "libhccl.so" in said and "CANN toolkit" in said and "npu:0" in said


def test_when_import_torch_itself_fails_the_sentence_says_why_and_three_ways_out(
    tmp_path: Path,
) -> None:
    said = python(
        "from bascule.accelerators.install import explain_torch_import\n"
        "try: import torch\n"
        "except Exception as error: print(explain_torch_import(error))\n",
        broken_torch_npu(tmp_path),
        TORCH_DEVICE_BACKEND_AUTOLOAD="1",
    )
    assert (
        "torch_npu" in said and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in said and "set_env.sh" in said
    )


def test_doctor_still_answers_there_and_names_each_layer(tmp_path: Path) -> None:
    said = python(
        "import sys\nfrom bascule.cli import main\nsys.exit(main(['doctor']))",
        broken_torch_npu(tmp_path),
    )
    assert (
        "libhccl.so" in said and "CANN toolkit   missing" in said and "cpu            yes" in said
    )


def test_another_failure_of_import_torch_is_not_explained_away() -> None:
    assert (
        install.explain_torch_import(ImportError("libgomp.so.1: cannot open shared object file"))
        is None
    )
