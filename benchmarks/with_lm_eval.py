"""lm-eval against our API, on a finished run's own held-out problems; its exact match stands beside our greedy score.

    python -m venv lm && lm/bin/pip install 'lm_eval[api]'        # an environment of its own: no torch is needed there
    python benchmarks/with_lm_eval.py out/demo --python lm/bin/python --limit 128

Serves the run, writes its held-out problems as a task for lm-eval (docs/new_task_guide.md there), has lm-eval ask them greedily over
`/v1/chat/completions`, and asks our engine the same ones. The thought comes back as `reasoning_content`, so the message's content
is the answer alone. For lm-eval's own tasks name them instead (`--tasks gsm8k`; the data sets come from the Hub).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from bascule.infer.evaluate import evaluate
from bascule.stages.course import heldout_only
from bascule.stages.finished import Finished, open_finished

TASK = {
    "task": "bascule_heldout",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--python", required=True, help="an interpreter that has lm_eval[api]")
    parser.add_argument("--limit", type=int, default=128, help="held-out problems asked")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--tasks", default=None, help="lm-eval's own tasks instead")
    options = parser.parse_args()
    run = open_finished(options.run, None)
    server = subprocess.Popen(
        [sys.executable, "-m", "bascule.cli", "serve", options.run, "--port", str(options.port)],
        stdout=subprocess.DEVNULL,
    )
    try:
        model = wait_for_model(options.port, server)
        with tempfile.TemporaryDirectory() as folder:
            tasks = options.tasks or write_task(Path(folder), run, options.limit)
            ask(options.python, options.port, model, tasks, Path(folder), options.limit)
            found = results(Path(folder))
    finally:
        server.terminate()
        server.wait()
    if not options.tasks:
        found["our greedy score"] = greedy(run, options.limit)
    print(json.dumps(found, indent=1))


def write_task(folder: Path, run: Finished, limit: int) -> str:
    """The task's file and its data; YAML is a superset of JSON, which is what is written."""
    problems = heldout_only(run.recipe, run.tokenizer).heldout[:limit]
    data = folder / "heldout.jsonl"
    data.write_text(
        "".join(json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in problems)
    )
    task = {
        **TASK,
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "generation_kwargs": {"until": [], "max_gen_toks": run.recipe.grpo.max_completion_tokens, "temperature": 0},
    }  # fmt: skip
    (folder / "bascule_heldout.yaml").write_text(json.dumps(task))
    return str(TASK["task"])


def wait_for_model(port: int, server: subprocess.Popen[bytes]) -> str:
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as answer:
                return str(json.load(answer)["data"][0]["id"])
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise SystemExit(f"The server ended with code {server.returncode}; its reason stands above.")


def ask(python: str, port: int, model: str, tasks: str, folder: Path, limit: int) -> None:
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    arguments = f"base_url={url},model={model},num_concurrent=8,tokenized_requests=False"
    subprocess.run(
        [
            python, "-m", "lm_eval", "--model", "local-chat-completions", "--model_args", arguments, "--apply_chat_template",
            "--tasks", tasks, "--include_path", str(folder), "--output_path", str(folder / "out"), "--limit", str(limit),
        ],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def results(folder: Path) -> dict[str, Any]:
    [path] = (folder / "out").rglob("results_*.json")
    return dict(json.loads(path.read_text())["results"])


def greedy(run: Finished, limit: int) -> float:
    course = heldout_only(run.recipe, run.tokenizer)
    problems = course.heldout[:limit]
    score = evaluate(
        run.engine, course.prompts(problems), course.verifier(problems), samples=1, ks=(1,),
        max_tokens=run.recipe.grpo.max_completion_tokens, seed=run.recipe.seed,
    )  # fmt: skip
    return score.greedy


if __name__ == "__main__":
    main()
