"""A disk that takes no more: every writer of tensors says so as an OSError, and a worker ends with one sentence."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bascule.stages.launch import ENDING_FILE
from bascule.tensors import save_tensors

# The size limit of the process stands for the full disk: the system refuses the write in the same place.
LIMITED = """
import resource, sys
from pathlib import Path
import torch
{imports}
weight = torch.zeros(100_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
root = Path(sys.argv[1])
try:
    {call}
except OSError as error:
    sys.exit(0 if error.errno and error.filename else f"number or path is missing: {{error!r}}")
sys.exit("nothing was raised")
"""
PROPOSAL = (
    "from types import SimpleNamespace as N\n"
    "batch = N(tensors={'tokens': torch.zeros(9)}, notes={})\n"
    "step = N(batch=batch, grads={'w': torch.zeros(100_000)}, phase='sft', step=1, loss=1.0, grad_norm=1.0)\n"
)
WRITERS = {
    "snapshot": ("from bascule.train.storage import write_tensors", "write_tensors(root / 'a.safetensors', {'w': weight})"),
    "witness": (f"from bascule.train.checkpoint import write_witness\n{PROPOSAL}", "write_witness(root / 'a.safetensors', step)"),
    "live weights": ("from bascule.place.sync import publish", "publish(root, {'w': weight}, 1)"),
    "model": (
        "from bascule.config.model import ModelConfig\nfrom bascule.model import weights\nfrom bascule.model.transformer import Transformer\n"
        "config = ModelConfig(preset='tick', vocab_size=4096)\nmodel = Transformer(config)",
        "weights.save_hf(model, config, root)",
    ),
    "incident": ("from bascule.guard.incident import _save", "_save(root / 'a.safetensors', {'w': weight})"),
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_an_oserror_with_its_number_and_path(writer: str, tmp_path: Path) -> None:
    imports, call = WRITERS[writer]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(imports=imports, call=call), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.glob(".*")), "a half-written file was left behind"


def test_a_folder_that_is_not_there_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(OSError) as refused:
        save_tensors({"a": torch.zeros(2)}, tmp_path / "no" / "a.safetensors")
    assert refused.value.errno == errno.ENOENT


TRAINER = """
import json, resource, sys
from bascule.stages import trainer
from bascule.config.load import load_recipe
from bascule.folder import RunFolder, write_json_atomic
from pathlib import Path
folder = RunFolder(Path(sys.argv[1])).create()
recipe = load_recipe(Path(sys.argv[2]), ["guard.enabled=false", "sft.steps=2", 'train.phases=["sft"]', "data.train_problems=64", "data.eval_problems=4"])
write_json_atomic(folder.recipe, json.loads(recipe.model_dump_json()))
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
sys.exit(trainer.main(["--run", sys.argv[1], "--attempt", "1", "--pool", "nvidia", "--socket", sys.argv[1] + "/s"]))
"""


def test_a_trainer_whose_disk_is_full_ends_with_one_sentence(tmp_path: Path) -> None:
    recipe = Path(__file__).resolve().parents[1] / "runs" / "tiny.toml"
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, str(tmp_path), str(recipe)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    ending = json.loads((tmp_path / "heartbeats" / ENDING_FILE).read_text())
    assert "File too large" in str(ending) and "run the same command again" in str(ending)
