"""A foreign engine serves only what the run's model says: a wrong rotation and rounded weights are refused, with the cure; right ones pass."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from bascule.config.model import ModelConfig
from bascule.errors import UsageError
from bascule.folder import RunFolder
from bascule.ledger import of_kind, read_ledger
from bascule.records import Admission
from bascule.serve.engines import Sglang
from tests.serve.conftest import make_run, wait_until

CURE = r"""--compilation-config {\"custom_ops\":[\"-rotary_embedding\"]}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(tmp_path_factory.mktemp("foreign") / "run", {"main": "cpu"})[0]


def start(run: RunFolder, tmp_path: Path, words: str, port: int = 0) -> subprocess.Popen[str]:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "stand_in.py"} "$@"\n'
    )
    python.chmod(0o755)
    code = "import sys; from bascule.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(run.root), "--engine", "vllm", "--python", str(python), "--port", str(port),
         "--engine-args", words], stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


ROUNDED = pytest.param(f"{CURE} --round-to bfloat16", marks=pytest.mark.slow, id="rounded weights")


@pytest.mark.parametrize("words", [pytest.param("", id="wrong rotation"), ROUNDED])
def test_an_engine_that_computes_something_else_is_refused_with_figures_and_the_cure(
    words: str, run: RunFolder, tmp_path: Path
) -> None:
    process = start(run, tmp_path, words)
    _, told = process.communicate(timeout=180)
    assert process.returncode == 3, told
    assert "refused" in told and f"--engine-args '{CURE}'" in told and "is right" in told
    finding = of_kind(read_ledger(run.ledger), Admission)[-1]
    assert not finding.accepted
    assert max(finding.reading, finding.speaking) > 10 * finding.bound


def test_the_cured_engine_is_admitted_and_answers_at_our_address(
    run: RunFolder, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = start(run, tmp_path, CURE, port)

    def answers() -> bool:
        assert process.poll() is None
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/hello", timeout=60) as reply:
                return b"/hello" in reply.read()
        except urllib.error.URLError:
            return False

    wait_until(answers, 180)
    finding = of_kind(read_ledger(run.ledger), Admission)[-1]
    assert finding.accepted and finding.reading <= finding.bound < finding.power
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def test_an_engine_that_cannot_start_says_why(run: RunFolder, tmp_path: Path) -> None:
    process = start(run, tmp_path, "--no-such-type --round-to nothing")
    _, told = process.communicate(timeout=180)
    assert process.returncode == 5
    assert "no attribute 'nothing'" in told and "engine-vllm.log" in told


def test_a_signal_while_the_engine_starts_ends_it_and_what_it_started(
    run: RunFolder, tmp_path: Path
) -> None:
    python, child = tmp_path / "slow", tmp_path / "child"
    python.write_text(f"#!/bin/sh\nsleep 600 & echo $! > {child}\nwait\n")
    python.chmod(0o755)
    code = "import sys; from bascule.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["serve", str(run.root), "--engine", "vllm", "--python", str(python), "--port", "0"]
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE)
    wait_until(lambda: child.exists() and bool(child.read_text().strip()), 120)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    started = Path(f"/proc/{child.read_text().strip()}/stat")
    wait_until(lambda: not started.exists() or started.read_text().split()[2] == "Z", 20)


def test_an_engine_that_cannot_take_a_key_safely_is_not_opened_without_it() -> None:
    with pytest.raises(UsageError, match="use --engine vllm"):
        Sglang().environment(ModelConfig(preset="tick"), "secret")
    assert Sglang().environment(ModelConfig(preset="tick"), None)
