"""Calculon on the published runs it can express, beside ours on the same rows.

    git clone https://github.com/calculon-ai/calculon && pip install numpy pandas psutil   (in an environment of its own)
    python benchmarks/plan_calculon.py CALCULON_FOLDER --python THAT_PYTHON [--runs FILE.csv]

Calculon expresses GPT-shaped dense models (as many key heads as heads, two feed-forward matrices) on A100-80: those rows are
run with its own `a100_80g.json`. What a paper does not print (micro-batch, virtual stages) is filled by the same rule for both.
Where recomputation is not printed both are run without and with selective recomputation. Ours predicts each row without its family.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

from plan_peers import Said, asked, by_source, peer_scored, show

from bascule.plan.job import Job
from bascule.plan.runs_table import Row, job_of
from bascule.plan.score import score_training

RECOMPUTE = {"none": "none", "selective": "attn_only", "full": "full"}


def expressible(row: Row) -> bool:
    job = job_of(row)
    s = job.shape
    gpt = not s.moe and s.latent is None and s.kv_heads == s.heads and not s.gated
    return gpt and job.chip.name == "A100-80 SXM" and job.layout.zero <= 1 and bool(row["tp"])


def execution(job: Job, recompute: str) -> dict[str, object]:
    lay = job.layout
    return {
        "num_procs": job.chips, "tensor_par": lay.tp, "pipeline_par": lay.pp, "data_par": lay.dp,
        "tensor_par_net": 0, "pipeline_par_net": 1, "data_par_net": 1,
        "batch_size": job.global_batch, "microbatch_size": lay.micro_batch, "datatype": "float16",
        "fused_activation": True, "attention_type": "multihead", "activation_recompute": recompute,
        "pipeline_interleaving": max(v for v in range(1, lay.vpp + 1) if job.shape.layers // lay.pp % v == 0), "optimizer_sharding": lay.zero == 1 and lay.dp > 1,
        "tensor_par_comm_type": "rs_ag" if recompute == "attn_only" else "ar", "tensor_par_overlap": "none",
        "seq_par_ag_redo": False, "data_par_overlap": False, "weight_offload": False,
        "activations_offload": False, "optimizer_offload": False, "training": True,
    }  # fmt: skip


def calculon_tokens(job: Job, recompute: str, folder: Path, python: str) -> Said:
    """Tokens a second and chip as Calculon has them, or why it refuses."""
    s = job.shape
    application = {
        "hidden": s.hidden, "feedforward": s.ffn, "seq_size": job.sequence,
        "attn_heads": s.heads, "attn_size": s.head_dim, "num_blocks": s.layers,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        names = [
            str(Path(place) / name) for name in ("application.json", "execution.json", "out.json")
        ]
        for name, value in zip(names, (application, execution(job, recompute)), strict=False):
            Path(name).write_text(json.dumps(value), encoding="utf-8")
        system = str(folder / "systems" / "a100_80g.json")
        done = subprocess.run(
            [python, str(folder / "bin" / "calculon"), "llm", names[0], names[1], system, names[2]],
            capture_output=True, text=True, env={"PYTHONPATH": str(folder)}, check=False,
        )  # fmt: skip
        if not Path(names[2]).exists():
            return None, (done.stdout + done.stderr).strip().splitlines()[-1]
        seconds = json.loads(Path(names[2]).read_text(encoding="utf-8"))["total_time"]
    return job.tokens_per_step / seconds / job.chips, ""


def main() -> None:
    folder, python, rows = asked(__doc__, expressible)
    for unknown in ("attn_only", "none"):

        def tokens(row: Row, otherwise: str = unknown) -> Said:
            job = job_of(row)
            recompute = RECOMPUTE[job.layout.recompute] if row["recompute"] else otherwise
            return calculon_tokens(job, recompute, folder, python)

        show(
            f"Calculon, recomputation '{unknown}' where not printed",
            by_source(peer_scored(rows, tokens)),
        )
    show("ours", by_source(score_training(rows)))


if __name__ == "__main__":
    main()
