"""Calculon on the published runs it can express, beside ours on the same rows.

    git clone https://github.com/calculon-ai/calculon && pip install numpy pandas psutil   (in an environment of its own)
    python benchmarks/plan_calculon.py CALCULON_FOLDER --python THAT_PYTHON [--runs FILE.csv]

Calculon expresses GPT-shaped dense models (as many key heads as heads, two feed-forward matrices) on A100-80: those rows are
run with its own `a100_80g.json`. What a paper does not print (micro-batch, virtual stages) is filled by the same rule for both.
Where recomputation is not printed both are run without and with selective recomputation. Ours predicts each row without its family.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bascule.plan.fit import DATA, measured_tokens
from bascule.plan.job import Job
from bascule.plan.runs_table import Row, job_of, read_rows
from bascule.plan.score import Scored, as_text, report, score_training, training_rows

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


def calculon_tokens(
    job: Job, recompute: str, folder: Path, python: str
) -> tuple[float | None, str]:
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


def score_calculon(rows: Sequence[Row], unknown: str, folder: Path, python: str) -> list[Scored]:
    result = []
    for row in rows:
        job = job_of(row)
        recompute = RECOMPUTE[job.layout.recompute] if row["recompute"] else unknown
        value, why = calculon_tokens(job, recompute, folder, python)
        result.append(Scored(row["id"], row["family"].split("|")[0], row["family"], measured_tokens(row) or 1.0, value, None, None, why))  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("calculon", type=Path)
    parser.add_argument("--python", default="python3")
    parser.add_argument("--runs", type=Path, default=DATA / "runs.csv")
    options = parser.parse_args()
    rows = [row for row in training_rows(read_rows(options.runs)) if expressible(row)]
    for unknown in ("attn_only", "none"):
        found = score_calculon(rows, unknown, options.calculon, options.python)
        print(f"Calculon, recomputation '{unknown}' where not printed\n{as_text(report(found))}\n")
    kept = {row["id"] for row in rows}
    ours = [one for one in score_training(rows) if one.name in kept]
    by_source = [Scored(one.name, one.family.split("|")[0], one.family, one.published, one.predicted, one.low, one.high) for one in ours]  # fmt: skip
    print(f"ours\n{as_text(report(by_source))}")


if __name__ == "__main__":
    main()
