"""SimuMax on the published runs it can express, beside ours on the same rows.

    git clone https://github.com/MooreThreads/SimuMax && pip install numpy pandas sympy tqdm matplotlib tabulate graphviz   (in an environment of its own)
    python benchmarks/plan_simumax.py SIMUMAX_FOLDER --python THAT_PYTHON [--runs FILE.csv]

SimuMax ships measured kernel tables of two chips; of the rows, those on B200 at bf16 are its own (`simumax|...`), and its tables were
taken on the machine that ran them. Ours predicts each row without its family, and without everything its table says.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from plan_anchor import compare, table_of
from plan_peers import Said, asked, peer_scored, show

from bascule.plan.job import Job
from bascule.plan.runs_table import Row, job_of
from bascule.plan.score import score_training

SYSTEM = "configs/system/b200_bf16_ceperm.json"

# Run by SimuMax's own Python: one job in JSON on stdin, seconds of a step on stdout.
DRIVER = """
import contextlib, io, json, sys
job = json.load(sys.stdin)
with contextlib.redirect_stdout(io.StringIO()):
    from simumax.core.config import ModelConfig, StrategyConfig, SystemConfig
    from simumax.core.perf_llm import PerfLLM
    perf = PerfLLM()
    perf.configure(strategy_config=StrategyConfig(**job["strategy"]), model_config=ModelConfig(**job["model"]),
                   system_config=SystemConfig.init_from_config_file(job["system"]))
    perf.run_estimate()
    said = perf.analysis_cost().data["duration_time_per_iter"]
if isinstance(said, str):
    value, unit = said.split()[:2]
    said = float(value) * {"s": 1e3, "ms": 1.0, "us": 1e-3}[unit]
print(said / 1e3)
"""


def expressible(row: Row) -> bool:
    """Dense, grouped keys and gated feed-forward, on the chip whose table it ships, whole layers to a stage."""
    job = job_of(row)
    s = job.shape
    plain = not s.moe and s.latent is None and s.gated and not s.local_layers
    return (
        plain
        and job.chip.name == "B200 SXM"
        and job.precision == "bf16"
        and job.layout.zero <= 1
        and job.chips == 8
    )


def strategy(job: Job) -> dict[str, object]:
    lay = job.layout
    return {
        "seq_len": job.sequence, "micro_batch_size": lay.micro_batch, "micro_batch_num": job.micro_batches, "dtype": "bf16",
        "world_size": job.chips, "tp_size": lay.tp, "pp_size": lay.pp, "cp_size": lay.cp, "ep_size": 1, "etp_size": 1,
        "interleaving_size": 1, "enable_sequence_parallel": lay.tp > 1, "zero_state": 1, "enable_recompute": False,
        "cross_entropy_loss_fusion": True, "overlap_grad_reduce": False, "pp_comm_async": False,
        "enable_straggler_model": False, "mem_factor": 0.94, "te_version": "2.11.0",
    }  # fmt: skip


def model(job: Job) -> dict[str, object]:
    s = job.shape
    return {
        "model_type": "dense", "model_name": s.name, "hidden_size": s.hidden, "head_num": s.heads, "kv_head_num": s.kv_heads,
        "head_size": s.head_dim, "intermediate_size": s.ffn, "layer_num": s.layers, "vocab_size": s.vocab, "use_swiglu": True,
    }  # fmt: skip


def simumax_tokens(job: Job, folder: Path, python: str) -> Said:
    """Tokens a second and chip as SimuMax has them, or why it refuses."""
    question = {"strategy": strategy(job), "model": model(job), "system": str(folder / SYSTEM)}
    done = subprocess.run(
        [python, "-c", DRIVER], input=json.dumps(question), capture_output=True, text=True, check=False,
        cwd=folder, env={"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
    )  # fmt: skip
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return job.tokens_per_step / float(done.stdout.split()[-1]) / job.chips, ""


def main() -> None:
    folder, python, rows = asked(__doc__, expressible)
    theirs = peer_scored(rows, lambda row: simumax_tokens(job_of(row), folder, python))
    show(f"SimuMax, {len(rows)} rows", theirs)
    show("ours, family left out", score_training(rows))
    whole = score_training(rows, by=lambda point: table_of(point.family))
    show("ours, all of its table left out", whole)
    print(compare(rows, tables=True, least=2).line("ours, one row given as --anchor") + "\n")
    ours = {one.name: one for one in whole}
    for one in theirs:
        said = "refused" if one.error is None else f"{one.error:+.1%}"
        print(
            f"{one.name}: SimuMax {said}, ours without the table {ours[one.name].error or 0:+.1%}"
        )


if __name__ == "__main__":
    main()
