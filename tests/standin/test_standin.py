"""The Ascend path under a stand-in private-use device named `npu`, in a process of its own: PyTorch takes one such name for good."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("ninja") is None,
    reason="needs a C++ compiler and ninja",
)
def test_the_behaviour_suite_and_the_model_pass_on_a_foreign_device(
    pytestconfig: pytest.Config,
) -> None:
    build = pytestconfig.cache.mkdir("standin_npu") if pytestconfig.cache else HERE / "build"
    suite = [
        str(HERE / "on_npu.py"),
        str(HERE.parent / "accelerators" / "test_contract.py"),
        "-k",
        "npu",
        "-p",
        "no:cacheprovider",
    ]
    ran = subprocess.run(
        [sys.executable, str(HERE / "install.py"), str(build), *suite],
        capture_output=True,
        text=True,
        timeout=380,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and int(passed[1]) >= 38 and "skipped" not in ran.stdout, ran.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(
    shutil.which("c++") is None or shutil.which("ninja") is None,
    reason="needs a C++ compiler and ninja",
)
def test_ddp_runs_unchanged_over_hccl(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    build = pytestconfig.cache.mkdir("standin_npu") if pytestconfig.cache else HERE / "build"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), str(build), str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=380)[0] for process in ranks]
    assert all(text.strip().endswith("ok") for text in said), said
